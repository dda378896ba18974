"""Weights as decoding wants them."""

from functools import cache, partial

import jax
import jax.numpy as jnp

from cai_jax.mesh import decoding_shardings, platform_of
from cai_jax.models import kernels
from cai_jax.models.families import ModelConfig, param_shapes

PROJECTIONS = ("qkv", "q", "k", "v", "o", "gate_up", "gate", "up", "down")


def prepare(config: ModelConfig, params, dtype, mesh=None, int8=False):
    """Weights for the sampler, made by one jitted cast and reshard from the stacked ones, adapters merged.

    A dict a layer, projections fused and, on a CPU, transposed; whole on every device but for the tensor axis, along
    which they stay split (and then unfused, for a fused projection has no common split). With `int8` the projections
    of the layers are stored as int8 with a scale an output.
    """
    return preparation(config, dtype, mesh, int8)(params)


@cache
def preparation(config, dtype, mesh, int8):
    """The jitted cast and reshard, compiled once for all versions of a policy."""
    form = partial(decoding_form, config, dtype, mesh, platform_of(mesh), int8)
    if mesh is None:
        return jax.jit(form)
    return jax.jit(form, out_shardings=decoding_shardings(mesh, jax.eval_shape(form, param_shapes(config, "policy"))))


def decoding_form(config: ModelConfig, dtype, mesh, platform: str, int8, params):
    """What `prepare` makes of params, without a jit and a place."""
    fuse = mesh is None or mesh.shape["tensor"] == 1
    merged = {name: kernels.plain(leaf) for name, leaf in params["layers"].items()}
    params = kernels.cast({**params, "layers": merged}, dtype)
    stacked = dict(params["layers"])
    if fuse:
        for fused, parts in (("qkv", ("q", "k", "v")), ("gate_up", ("gate", "up"))):
            for suffix in ("", "_bias"):
                if parts[0] + suffix in stacked:
                    pieces = [stacked.pop(part + suffix) for part in parts]
                    stacked[fused + suffix] = jnp.concatenate(pieces, axis=-1)
    projections = [name for name in PROJECTIONS if name in stacked]
    if platform == "cpu":
        for name in projections:
            stacked[name] = kernels.Transposed(jnp.swapaxes(stacked[name], 1, 2))
        if not config.tie_embeddings:
            params = params | {"lm_head": kernels.Transposed(params["lm_head"].T)}
    if int8:
        stacked |= {name: kernels.quantize(stacked[name]) for name in projections}
    layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(config.n_layers))
    return {**params, "layers": layers}
