"""Weights as decoding wants them, and the key/value cache.

The cache is time-major `[S, K, B, N]`, one pair of arrays a layer, with one scalar write cursor: a write is one
contiguous slab. An entry has a position for every row; -1 is an empty entry or a pad, which nobody sees.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from cai_jax.models import kernels
from cai_jax.models.families import ModelConfig
from cai_jax.models.transformer import attention, block, embed, layer_data, rms_norm, rope_tables, visible


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
    """Weights for the sampler: cast, a dict a layer instead of stacked layers, projections fused."""
    params = kernels.cast(params, dtype)
    stacked = dict(params["layers"])
    for fused, parts in (("qkv", ("q", "k", "v")), ("gate_up", ("gate", "up"))):
        for suffix in ("", "_bias"):
            if parts[0] + suffix in stacked:
                pieces = [stacked.pop(part + suffix) for part in parts]
                stacked[fused + suffix] = jnp.concatenate(pieces, axis=-1)
    layers = tuple({name: leaf[i] for name, leaf in stacked.items()} for i in range(config.n_layers))
    return {**params, "layers": layers}


def extend(config: ModelConfig, weights, cache: Cache, tokens_BT, positions_BT, segments_BT, cursor):
    """Run tokens through the decoder, appending them to the cache at `cursor`.

    Returns the cache and the final-norm hidden states `[B, T, D]`. A token sees every earlier entry of its row
    that is of its own segment or of segment 0.
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
            visible_BTS = visible(
                positions_BT, cache.positions_SB.T, windows_L[i], segments_BT, cache.segments_SB.T
            )
            k_BSKN, v_BSKN = keys[i].transpose(2, 0, 1, 3), values[i].transpose(2, 0, 1, 3)
            return attention(config, q_BTHN, k_BSKN, v_BSKN, visible_BTS)

        x_BTD = block(config, layer_weights, x_BTD, rope_RBTN[config.rope_of_layer[i]], attend)
    cache = cache.replace(keys=tuple(keys), values=tuple(values))
    return cache, rms_norm(config, x_BTD, weights["final_norm"])


def with_prefix(cache: Cache, prefix: Cache) -> Cache:
    """Put the entries of a one-row prefix at the start of every row."""
    rows = cache.positions_SB.shape[1]
    return Cache(
        keys=tuple(_write(k, _to_rows(p, rows, 2), 0) for k, p in zip(cache.keys, prefix.keys, strict=True)),
        values=tuple(_write(v, _to_rows(p, rows, 2), 0) for v, p in zip(cache.values, prefix.values, strict=True)),
        positions_SB=_write(cache.positions_SB, _to_rows(prefix.positions_SB, rows, 1), 0),
        segments_SB=cache.segments_SB,
    )


def _to_rows(x, rows, axis):
    return jnp.repeat(x, rows, axis=axis)


def _write(array, update, cursor):
    start = (cursor,) + (0,) * (array.ndim - 1)
    return jax.lax.dynamic_update_slice(array, update.astype(array.dtype), start)
