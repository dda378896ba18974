"""Scalar heads on the decoder: the reward of a whole text, the value of every position."""

import jax.numpy as jnp

from cai_jax.models.families import ModelConfig
from cai_jax.models.kernels import cast, dot
from cai_jax.models.transformer import hidden_states, positions_from_mask


def values(
    config: ModelConfig, params, tokens_BT, positions_BT, segments_BT=None, remat="none", attention="auto", dtype=None
):
    """The scalar head at every position, `[B, T]` float32. `params` hold a `score` kernel `[D, 1]`.

    For `remat`, `attention` and `dtype` see `transformer.hidden_states`.
    """
    hidden_BTD = hidden_states(
        config, params, tokens_BT, positions_BT, segments_BT, remat, attention, dtype=dtype
    )
    return scalar_head(params, hidden_BTD, dtype)


def scalar_head(params, hidden_BTD, dtype=None):
    """The `score` kernel of `params` at hidden states, `[B, T]` float32."""
    return dot(hidden_BTD, cast(params["score"], dtype) if dtype else params["score"])[..., 0]


def reward(config: ModelConfig, params, tokens_BT, mask_BT=None):
    """Score of every row, `[B]` float32, read at its last real token; left or right padding give the same."""
    tokens_BT = jnp.asarray(tokens_BT)
    positions_BT = positions_from_mask(tokens_BT, mask_BT)
    return last_real(values(config, params, tokens_BT, positions_BT), positions_BT)


def last_real(x_BT, positions_BT):
    """The entry at the last real token of each row, `[B]`."""
    last_B = jnp.argmax(positions_BT, axis=1)
    return jnp.take_along_axis(x_BT, last_B[:, None], axis=1)[:, 0]
