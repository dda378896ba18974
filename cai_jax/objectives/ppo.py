"""Proximal policy optimization over tokens: every detail of the recipe, with its source beside it.

Masks mark the response tokens, end token included, that exist; T is any frame that holds them (with or without
the prompt before them). What stands outside the mask never changes a result or a gradient.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from .logprobs import as_float, assert_same_shape, masked_fill, masked_mean


def kl(logprobs_BT, ref_logprobs_BT, estimator):
    """Estimate of KL(policy, reference) at each sampled token, [B, T], in nats.

    With r = log(reference / policy) at the sampled token: k1 = -r (unbiased, of either sign), k2 = r^2 / 2
    (biased, low variance), k3 = exp(r) - 1 - r (unbiased, never negative). Source: Schulman 2020,
    joschu.net/blog/kl-approx.html.

    Raises:
      ValueError: unknown estimator.
    """
    assert_same_shape(logprobs_BT, ref_logprobs_BT)
    log_ratio_BT = as_float(ref_logprobs_BT) - as_float(logprobs_BT)
    if estimator == "k1":
        return -log_ratio_BT
    if estimator == "k2":
        return jnp.square(log_ratio_BT) / 2
    if estimator == "k3":
        return jnp.expm1(log_ratio_BT) - log_ratio_BT
    raise ValueError(f"unknown KL estimator {estimator!r}: use k1, k2 or k3")


def rewards(scores_B, kl_BT, mask_BT, kl_coef, kl_per="token"):
    """Reward of each token, [B, T]: -kl_coef * kl, plus the row's score on its last real token.

    The last real token is the last true position of the mask: the end token where there is one (Ziegler et al.
    2019, arXiv 1909.08593, section 2). A row without tokens gets nothing. Always floating, whatever the
    dtype of the scores. With kl_per "sequence" the KL of the whole row is charged on its last real token: the sum is
    the same, and each token pays for those before it too.

    Raises:
      ValueError: kl_per is neither "token" nor "sequence".
    """
    if kl_per not in ("token", "sequence"):
        raise ValueError(f"unknown place of the KL {kl_per!r}: use token or sequence")
    assert_same_shape(kl_BT, mask_BT)
    assert_same_shape(scores_B, jnp.asarray(mask_BT)[:, 0])
    mask_BT = jnp.asarray(mask_BT).astype(bool)
    length = mask_BT.shape[1]
    last_B = length - 1 - jnp.argmax(mask_BT[:, ::-1], axis=1)
    is_last_BT = mask_BT & (jnp.arange(length)[None, :] == last_B[:, None])
    penalty_BT = -kl_coef * masked_fill(kl_BT, mask_BT)
    if kl_per == "sequence":
        penalty_BT = jnp.where(is_last_BT, penalty_BT.sum(axis=1, keepdims=True), 0)
    return penalty_BT + jnp.where(is_last_BT, as_float(scores_B)[:, None], 0)


def next_kl_coef(kl_coef, kl, target, horizon, rows):
    """The adaptive KL coefficient after an update of `rows` rollouts whose KL was `kl` nats a response.

    kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * rows / horizon): Ziegler et al. 2019 (arXiv 1909.08593), section
    2.2, whose K is rows / horizon in their code.
    """
    error = np.clip(kl / target - 1, -0.2, 0.2)
    return kl_coef * (1 + error * rows / horizon)


@flax.struct.dataclass
class Moments:
    """Running count, mean and sum of squared differences from it, of all scores so far; float32 scalars."""

    count: jax.Array
    mean: jax.Array
    squares: jax.Array

    def scale(self) -> float:
        """The deviation (of the population); 1 where the scores do not differ."""
        deviation = np.sqrt(float(self.squares) / max(float(self.count), 1.0))
        return float(deviation) if deviation > 1e-6 else 1.0


def no_scores() -> Moments:
    """The moments before the first score."""
    zero = np.float32(0)
    return Moments(zero, zero, zero)


def with_scores(moments: Moments, scores_B) -> Moments:
    """The moments with more scores in them, on the host (Chan et al. 1979: merging of two sets)."""
    scores_B = np.asarray(scores_B, np.float64)
    count, mean, squares = float(moments.count), float(moments.mean), float(moments.squares)
    more, total = len(scores_B), count + len(scores_B)
    if not more:
        return moments
    step = scores_B.mean() - mean
    squares += np.square(scores_B - scores_B.mean()).sum() + step**2 * count * more / total
    return Moments(np.float32(total), np.float32(mean + step * more / total), np.float32(squares))


def advantages(rewards_BT, values_BT, mask_BT, gamma, lam):
    """Generalized advantage estimates and returns, two arrays [B, T]; 0 outside the mask, unwhitened.

    A_t = d_t + gamma lam A_t+1 with d_t = r_t + gamma V_t+1 - V_t, and return_t = A_t + V_t (Schulman et al.
    2015, arXiv 1506.02438). t + 1 is the next real token of the row; after the last one V and A are 0, because
    the episode ends there.
    """
    assert_same_shape(rewards_BT, values_BT, mask_BT)
    mask_BT = jnp.asarray(mask_BT).astype(bool)
    rewards_BT = masked_fill(rewards_BT, mask_BT)
    values_BT = masked_fill(values_BT, mask_BT)

    def backwards(following, column):
        next_advantage_B, next_value_B = following
        reward_B, value_B, real_B = column
        delta_B = reward_B + gamma * next_value_B - value_B
        advantage_B = (delta_B + gamma * lam * next_advantage_B).astype(next_advantage_B.dtype)
        carry = (jnp.where(real_B, advantage_B, next_advantage_B), jnp.where(real_B, value_B, next_value_B))
        return carry, jnp.where(real_B, advantage_B, 0)

    start_B = jnp.zeros_like(rewards_BT[:, 0], dtype=jnp.result_type(rewards_BT, values_BT))
    columns = (rewards_BT.T, values_BT.astype(start_B.dtype).T, mask_BT.T)
    _, advantages_TB = jax.lax.scan(backwards, (start_B, start_B), columns, reverse=True)
    return advantages_TB.T, advantages_TB.T + values_BT


def whiten(x_BT, mask_BT, shift_mean=True):
    """x scaled to unit variance over the real tokens of the batch, and shifted to mean 0 if shift_mean.

    Mean and variance are over the mask alone; the variance is the unbiased one (divided by count - 1), plus
    1e-8. 0 outside the mask. A mask with one true position has variance 0.
    """
    x_BT = masked_fill(x_BT, mask_BT)
    mean = masked_mean(x_BT, mask_BT)
    centred_BT = masked_fill(x_BT - mean, mask_BT)
    # The correction stays float32 even for float64 arrays: TRL, whose numbers we are held to, divides integer
    # counts, which rounds it so. It is off by 1e-8 at most.
    count = jnp.asarray(mask_BT).astype(bool).sum(dtype=jnp.float32)
    variance = masked_mean(jnp.square(centred_BT), mask_BT) * (count / jnp.maximum(count - 1, 1))
    whitened_BT = centred_BT * jax.lax.rsqrt(variance + 1e-8)
    return whitened_BT if shift_mean else masked_fill(whitened_BT + mean, mask_BT)


def policy_terms(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT, clip):
    """What policy_loss takes the mean of: loss_BT and, under the names of its metrics, arrays [B, T]."""
    assert_same_shape(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT)
    change_BT = masked_fill(logprobs_BT, mask_BT) - masked_fill(old_logprobs_BT, mask_BT)
    advantages_BT = masked_fill(advantages_BT, mask_BT)
    ratio_BT = jnp.exp(change_BT)
    free_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * jnp.clip(ratio_BT, 1 - clip, 1 + clip)
    metrics = {
        "clip_fraction": (clipped_BT > free_BT).astype(ratio_BT.dtype),
        "approx_kl": jnp.square(change_BT) / 2,
        "ratio_mean": masked_fill(ratio_BT, mask_BT),
    }
    return jnp.maximum(free_BT, clipped_BT), metrics


def policy_loss(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT, clip):
    """Clipped surrogate, mean over real tokens: max(-A r, -A clip(r, 1 - clip, 1 + clip)), r = exp(new - old).

    Source: Schulman et al. 2017, arXiv 1707.06347, equation 7. `old` is what the sampler recorded.

    Returns:
      loss and metrics: clip_fraction (share of tokens where the clipped side decides), approx_kl (mean of
      (new - old)^2 / 2), ratio_mean.
    """
    loss_BT, metrics_BT = policy_terms(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT, clip)
    return masked_mean(loss_BT, mask_BT), _means(metrics_BT, mask_BT)


def value_terms(values_BT, old_values_BT, returns_BT, mask_BT, clip):
    """What value_loss takes the mean of: loss_BT and, under the names of its metrics, arrays [B, T]."""
    assert_same_shape(values_BT, old_values_BT, returns_BT, mask_BT)
    values_BT = masked_fill(values_BT, mask_BT)
    old_values_BT = masked_fill(old_values_BT, mask_BT)
    returns_BT = masked_fill(returns_BT, mask_BT)
    near_BT = jnp.clip(values_BT, old_values_BT - clip, old_values_BT + clip)
    free_BT = jnp.square(values_BT - returns_BT)
    clipped_BT = jnp.square(near_BT - returns_BT)
    loss_BT = jnp.maximum(free_BT, clipped_BT) / 2
    return loss_BT, {"clip_fraction": (clipped_BT > free_BT).astype(loss_BT.dtype)}


def value_loss(values_BT, old_values_BT, returns_BT, mask_BT, clip):
    """Clipped value loss, mean over real tokens: max((V - R)^2, (V' - R)^2) / 2, V' within clip of the old value.

    Source: the code of Ziegler et al. 2019, as set out by Huang et al. 2024 (arXiv 2403.17031).

    Returns:
      loss and metrics: clip_fraction (share of tokens where the clipped side decides).
    """
    loss_BT, metrics_BT = value_terms(values_BT, old_values_BT, returns_BT, mask_BT, clip)
    return masked_mean(loss_BT, mask_BT), _means(metrics_BT, mask_BT)


def _means(metrics_BT, mask_BT):
    return {name: masked_mean(x_BT, mask_BT) for name, x_BT in metrics_BT.items()}
