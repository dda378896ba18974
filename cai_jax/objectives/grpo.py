"""Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300): several responses to a prompt are compared.

There is no value model: a response is as good as its score stands above those of its group. What Liu et al. 2025
(Dr. GRPO, arXiv 2503.20783) found biased can be turned off: the division by the group's deviation, which weighs easy
and hard prompts up, and the mean over a response's own tokens, which lets long wrong responses off lightly.
"""

import jax.numpy as jnp

from . import ppo
from .logprobs import as_float, assert_same_shape, masked_fill, masked_mean

SMALLEST = 1e-4  # is added to the deviation of a group


def advantages(scores_B, real_B, group, scale=True):
    """(score - mean of its group) / deviation of its group, [B]; `group` rows in a row belong together.

    Rows with `real` 0 have no score: they count in no group and get 0, as does the only real row of a group. The
    deviation is the unbiased one (divided by count - 1), plus 1e-4; without `scale` it does not divide.
    """
    assert_same_shape(scores_B, real_B)
    real_PG = jnp.asarray(real_B).astype(bool).reshape(-1, group)
    scores_PG = masked_fill(jnp.asarray(scores_B).reshape(-1, group), real_PG)
    count_P1 = real_PG.sum(axis=1, keepdims=True)
    mean_P1 = scores_PG.sum(axis=1, keepdims=True) / jnp.maximum(count_P1, 1)
    centred_PG = masked_fill(scores_PG - mean_P1, real_PG)
    if scale:
        variance_P1 = jnp.square(centred_PG).sum(axis=1, keepdims=True) / jnp.maximum(count_P1 - 1, 1)
        centred_PG = centred_PG / (jnp.sqrt(variance_P1) + SMALLEST)
    return centred_PG.reshape(-1)


def terms(logprobs_BT, old_logprobs_BT, ref_logprobs_BT, advantages_B, mask_BT, clip, kl_coef):
    """Loss of each token and, under the names of its metrics, arrays [B, T]: clipped surrogate + kl_coef * k3.

    The KL to the reference is a part of the loss, with its gradient, and not of the reward (equations 3 and 4).
    """
    assert_same_shape(logprobs_BT, ref_logprobs_BT)
    advantages_BT = jnp.broadcast_to(as_float(advantages_B)[:, None], jnp.shape(mask_BT))
    policy_BT, metrics = ppo.policy_terms(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT, clip)
    kl_BT = ppo.kl(masked_fill(logprobs_BT, mask_BT), masked_fill(ref_logprobs_BT, mask_BT), "k3")
    return policy_BT + kl_coef * kl_BT, {**metrics, "kl_loss": kl_BT}


def per_response(x_BT, mask_BT, length_norm):
    """Sum over a row's real tokens divided by their number ("response") or by T ("limit"), [B].

    Raises:
      ValueError: unknown length_norm.
    """
    if length_norm not in ("response", "limit"):
        raise ValueError(f"unknown length_norm {length_norm!r}: use response or limit")
    x_BT = masked_fill(x_BT, mask_BT)
    lengths_B = jnp.asarray(mask_BT).astype(bool).sum(axis=1)
    return x_BT.sum(axis=1) / (jnp.maximum(lengths_B, 1) if length_norm == "response" else x_BT.shape[1])


def loss(
    logprobs_BT, old_logprobs_BT, ref_logprobs_BT, advantages_B, mask_BT, clip, kl_coef, length_norm="response"
):
    """Mean over the responses (rows with a token) of the loss of each.

    Returns:
      loss and metrics, means over tokens: clip_fraction, approx_kl, ratio_mean (see ppo.policy_loss), kl_loss.
    """
    arrays = logprobs_BT, old_logprobs_BT, ref_logprobs_BT, advantages_B, mask_BT
    terms_BT, metrics = terms(*arrays, clip, kl_coef)
    has_tokens_B = jnp.asarray(mask_BT).astype(bool).any(axis=1)
    rows_B = per_response(terms_BT, mask_BT, length_norm)
    return masked_mean(rows_B, has_tokens_B), {name: masked_mean(x_BT, mask_BT) for name, x_BT in metrics.items()}
