"""The programs of the sampler with shapes in the place of arrays: to compile them for chips that are not there.

`Sampler` runs the same functions; tests/sampler/test_abstract.py holds the shapes against what it really passes.
"""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from cai_jax.mesh import ROWS, decoding_shardings, placed
from cai_jax.models.families import ModelConfig, param_shapes
from cai_jax.sampler import decode
from cai_jax.sampler.cache import STRIP, Cache, cache_shardings, empty_cache, entry_dtype
from cai_jax.sampler.engine import CANDIDATES
from cai_jax.sampler.sampling import RowSettings
from cai_jax.sampler.slots import empty_strips
from cai_jax.sampler.weights import decoding_form, preparation


@dataclass(frozen=True)
class SamplerShape:
    """All that decides the programs of a `Sampler` but the mesh. `prefixes`: rooms of the shared prefixes."""

    config: ModelConfig
    rows: int
    length: int
    prefixes: tuple[int, ...]
    dtype: str
    int8_weights: bool = False
    int8_cache: bool = False
    prefill_tokens: int = 128
    chunk: int = 32


@cache
def abstract_weights(shape: SamplerShape, mesh, platform: str) -> dict:
    """The decoding weights, as shapes in their places."""
    form = partial(decoding_form, shape.config, shape.dtype, mesh, platform, shape.int8_weights)
    weights = jax.eval_shape(form, param_shapes(shape.config, "policy"))
    return placed(weights, decoding_shardings(mesh, weights))


@cache
def abstract_cache(shape: SamplerShape, mesh, platform: str) -> Cache:
    """The key/value cache, as shapes in their places."""
    dtype = entry_dtype(shape.dtype, shape.int8_cache, platform)
    make = partial(empty_cache, shape.config, shape.rows, shape.length, shape.prefixes, dtype, platform)
    shapes = jax.eval_shape(make)
    return placed(shapes, cache_shardings(shape.config, mesh, shapes))


def lower_prepare(shape: SamplerShape, mesh, params):
    """The cast and reshard of `params` (shapes in their places) into decoding weights, lowered."""
    return preparation(shape.config, shape.dtype, mesh, shape.int8_weights).lower(params)


def lower_prefill(shape: SamplerShape, mesh):
    """One pass of strips through the layers, lowered."""
    ways = _ways(mesh)
    strips = strips_of_shard(shape.prefill_tokens, mesh)
    length = max(strips * STRIP, decode.ASKED_AT_ONCE)
    asked = decode.Asked(
        np.zeros(ways * length, np.int32), np.zeros((ways * length, CANDIDATES), np.int32), np.zeros(ways, np.int32)
    )
    arguments = _by_row(mesh, (empty_strips(ways * strips), asked))
    return decode.prefill.lower(shape.config, mesh, *_weights_and_cache(shape, mesh), *arguments)


def lower_decode(shape: SamplerShape, mesh):
    """The loop of decoding steps, lowered."""
    patience = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = _by_row(mesh, _slots(shape.rows, shape.length))
    return decode.decode.lower(
        shape.config, mesh, *_weights_and_cache(shape, mesh), *arguments, patience, steps=shape.chunk
    )


def lower_share(shape: SamplerShape, mesh):
    """The copy of a slot's first entries into the longest shared prefix, lowered."""
    return decode.share.lower(mesh, _weights_and_cache(shape, mesh)[1], length=max(shape.prefixes))


def strips_of_shard(prefill_tokens: int, mesh) -> int:
    """Strips that each data shard runs in one prefill call."""
    return max(1, prefill_tokens // (STRIP * _ways(mesh)))


def _ways(mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _weights_and_cache(shape: SamplerShape, mesh):
    platform = mesh.devices.flat[0].platform
    return abstract_weights(shape, mesh, platform), abstract_cache(shape, mesh, platform)


def _slots(rows: int, length: int):
    """What a decoding call is told of its slots, and their history."""
    columns = {
        "temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32,
        "repetition_penalty": np.float32, "max_new_tokens": np.int32,
    }  # fmt: skip
    settings = RowSettings(
        **{name: np.zeros(rows, dtype) for name, dtype in columns.items()},
        stop=np.zeros((rows, 1), np.int32), key=np.zeros((rows, 2), np.uint32),
    )  # fmt: skip
    numbers = [np.zeros(rows, np.int32)] * 5
    return decode.Slots(*numbers, np.zeros(rows, bool), settings), np.zeros((rows, length), np.int32)


def _by_row(mesh, arrays):
    sharding = NamedSharding(mesh, ROWS)
    return placed(arrays, jax.tree.map(lambda _: sharding, arrays))
