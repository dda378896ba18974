"""Scalar heads on the decoder: the reward of a whole text, the value of every position.

A reward model may have several heads on one decoder: their mean is the score, their deviation says how sure it is. K is
the number of heads.
"""

import jax.numpy as jnp

from cai_jax.models.families import ModelConfig
from cai_jax.models.kernels import cast, dot
from cai_jax.models.transformer import hidden_states, positions_from_mask


def head_values(
    config: ModelConfig, params, tokens_BT, positions_BT, segments_BT=None, remat="none", attention="auto", dtype=None
):
    """Every head at every position, `[B, T, K]` float32. `params` hold a `score` kernel `[D, K]`.

    For `remat`, `attention` and `dtype` see `transformer.hidden_states`.
    """
    hidden_BTD = hidden_states(
        config, params, tokens_BT, positions_BT, segments_BT, remat, attention, dtype=dtype
    )
    return scalar_heads(params, hidden_BTD, dtype)


def scalar_heads(params, hidden_BTD, dtype=None):
    """The `score` kernel of `params` at hidden states, `[B, T, K]` float32."""
    return dot(hidden_BTD, cast(params["score"], dtype) if dtype else params["score"])


def values(config: ModelConfig, params, tokens_BT, positions_BT, *rest, **options):
    """The mean of the heads at every position, `[B, T]` float32; arguments as in `head_values`."""
    return head_values(config, params, tokens_BT, positions_BT, *rest, **options).mean(axis=-1)


def reward(config: ModelConfig, params, tokens_BT, mask_BT=None):
    """Score of every row, the mean of its heads, `[B]` float32; left or right padding give the same."""
    return reward_heads(config, params, tokens_BT, mask_BT).mean(axis=-1)


def reward_heads(config: ModelConfig, params, tokens_BT, mask_BT=None):
    """Score of every row by every head, `[B, K]` float32, read at its last real token."""
    tokens_BT = jnp.asarray(tokens_BT)
    positions_BT = positions_from_mask(tokens_BT, mask_BT)
    return last_real(head_values(config, params, tokens_BT, positions_BT), positions_BT)


def last_real(x_BT, positions_BT):
    """The entry at the last real token of each row: `[B]`, or `[B, K]` of `[B, T, K]`."""
    last_B = jnp.argmax(positions_BT, axis=1)
    return jnp.take_along_axis(x_BT, last_B.reshape(-1, *[1] * (x_BT.ndim - 1)), axis=1)[:, 0]


def cautious(scores_BK, penalty: float):
    """Score of every row, `[B]`: the mean of its heads less `penalty` times their deviation.

    Where heads that saw different samples of the pairs do not agree, the score is a guess, and a policy that is trained
    to raise it finds such places (Coste et al. 2023, arXiv 2310.02743, section 3.3).
    """
    return scores_BK.mean(axis=-1) - penalty * scores_BK.std(axis=-1)


def with_one_head(params: dict) -> dict:
    """The params of a reward model with the mean of its heads as its only one: where a value model starts."""
    return {**params, "score": params["score"].mean(axis=-1, keepdims=True)}
