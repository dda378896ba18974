"""Weights as decoding wants them, and the key/value cache.

The cache is time-major `[S, K, B, N]`, one pair of arrays a layer, with one scalar write cursor: a write is one
contiguous slab. An entry has a position for every row; -1 is an empty entry or a pad, which nobody sees.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cai_jax.models import kernels
from cai_jax.models.families import ModelConfig
from cai_jax.models.transformer import (
    NEGATIVE,
    block,
    embed,
    layer_data,
    rms_norm,
    rope_tables,
    softcap,
    visible,
)


@flax.struct.dataclass
class Cache:
    """Keys and values of all layers up to a common time."""

    keys: tuple  # L arrays [S, K, B, N]
    values: tuple  # L arrays [S, K, B, N]
    positions_SB: jax.Array
    segments_SB: jax.Array


def empty_cache(config: ModelConfig, rows: int, length: int, dtype) -> Cache:
    """A cache for `rows` rows of at most `length` entries."""
    shape = (length, config.n_kv_heads, rows, config.head_dim)
    return Cache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)),
        positions_SB=jnp.full((length, rows), -1, jnp.int32),
        segments_SB=jnp.zeros((length, rows), jnp.int32),
    )


def cache_bytes(config: ModelConfig, rows: int, length: int, dtype) -> int:
    """Bytes of the keys and values of `rows` rows of `length` entries."""
    entries = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return entries * rows * length * jnp.dtype(dtype).itemsize


@partial(jax.jit, static_argnames=("config", "dtype"))
def prepare(config: ModelConfig, params, dtype):
    """Weights for the sampler: cast, a dict a layer instead of stacked layers, projections fused and transposed."""
    params = kernels.cast(params, dtype)
    stacked = dict(params["layers"])
    for fused, parts in (("qkv", ("q", "k", "v")), ("gate_up", ("gate", "up"))):
        for suffix in ("", "_bias"):
            if parts[0] + suffix in stacked:
                pieces = [stacked.pop(part + suffix) for part in parts]
                stacked[fused + suffix] = jnp.concatenate(pieces, axis=-1)
    for name in ("qkv", "o", "gate_up", "down"):
        stacked[name] = kernels.Transposed(jnp.swapaxes(stacked[name], 1, 2))
    layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(config.n_layers))
    return {**params, "layers": layers}


def extend(config: ModelConfig, weights, cache: Cache, tokens_BT, positions_BT, segments_BT, cursor, prefix=None):
    """Run tokens through the decoder, appending them to the cache at `cursor`.

    Returns the cache and the final-norm hidden states `[B, T, D]`. A token sees every earlier entry of its row that
    is of its own segment or of segment 0, and all of `prefix`, a one-row cache that every row shares.
    """
    cache = cache.replace(
        positions_SB=_write(cache.positions_SB, positions_BT.T, cursor),
        segments_SB=_write(cache.segments_SB, segments_BT.T, cursor),
    )
    x_BTD = embed(config, weights, tokens_BT)
    rope_RBTN = rope_tables(config, positions_BT)
    windows_L, _ = layer_data(config)
    keys, values = list(cache.keys), list(cache.values)
    for i, layer_weights in enumerate(weights["layers"]):

        def attend(q_BTHN, k_BTKN, v_BTKN, i=i):
            keys[i] = _write(keys[i], k_BTKN.transpose(1, 2, 0, 3), cursor)
            values[i] = _write(values[i], v_BTKN.transpose(1, 2, 0, 3), cursor)
            see = partial(visible, positions_BT, window=windows_L[i], query_segments_BT=segments_BT)
            own = see(cache.positions_SB.T, key_segments_BS=cache.segments_SB.T)
            parts = [("skbn", keys[i], values[i], own)]
            if prefix is not None:
                shared = see(prefix.positions_SB.T, key_segments_BS=prefix.segments_SB.T)
                parts.insert(0, ("skn", prefix.keys[i][:, :, 0], prefix.values[i][:, :, 0], shared))
            return _attention_over_parts(config, q_BTHN, parts)

        x_BTD = block(config, layer_weights, x_BTD, rope_RBTN[config.rope_of_layer[i]], attend)
    cache = cache.replace(keys=tuple(keys), values=tuple(values))
    return cache, rms_norm(config, x_BTD, weights["final_norm"])


def _attention_over_parts(config: ModelConfig, q_BTHN, parts):
    """Attention whose keys lie in several places: (letters of keys and values, keys, values, visible_BTS) each.

    A prefix that all rows share ("skn") is read once for the whole batch instead of once a row.
    """
    rows, length, heads, size = q_BTHN.shape
    q_BTKGN = q_BTHN.reshape(rows, length, config.n_kv_heads, -1, size)
    scores = []
    for letters, keys, _, visible_BTS in parts:
        part = jnp.einsum(f"btkgn,{letters}->bkgts", q_BTKGN, keys, preferred_element_type=q_BTHN.dtype)
        part = softcap(part * config.query_scale, config.attn_softcap)
        scores.append(jnp.where(visible_BTS[:, None, None], part, NEGATIVE))
    probabilities = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    ends = np.cumsum([keys.shape[0] for _, keys, _, _ in parts])[:-1]
    mixed = sum(
        jnp.einsum(f"bkgts,{letters}->btkgn", share.astype(values.dtype), values, preferred_element_type=q_BTHN.dtype)
        for share, (letters, _, values, _) in zip(jnp.split(probabilities, ends, axis=-1), parts, strict=True)
    )
    return mixed.reshape(rows, length, heads, size)


def _write(array, update, cursor):
    start = (cursor,) + (0,) * (array.ndim - 1)
    return jax.lax.dynamic_update_slice(array, update.astype(array.dtype), start)
