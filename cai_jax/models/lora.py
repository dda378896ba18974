"""Adapters of low rank (Hu et al. 2021, arXiv 2106.09685): how they start, which leaves train, what they come to.

Letters: L layers, I inputs, O outputs, R rank.
"""

import math

import jax
import jax.numpy as jnp

from cai_jax import config as configs
from cai_jax.config import PROJECTIONS
from cai_jax.mesh import leaf_name, shardings
from cai_jax.models.kernels import Int8, Lora, plain


def add(params: dict, config: configs.Lora, seed: int, mesh) -> dict:
    """The params of a model with an adapter on each target, ready to train; with rank 0 the params as they are.

    Nothing is copied but a score head, which is to train too. Adapters and head are float32, whatever the model is
    stored in. `a` is uniform within 1/sqrt(I), as peft starts it, and the same on every mesh; `b` is zero, so the
    model computes what it did.
    """
    if not config.rank:
        return params
    bases = {name: params["layers"][name] for name in config.targets}

    def start():
        key = jax.random.key(seed)
        keys = {name: jax.random.fold_in(key, PROJECTIONS.index(name)) for name in bases}
        return {"layers": {name: _start(base, keys[name], config) for name, base in bases.items()}}

    placed = shardings(mesh, jax.eval_shape(start))
    adapters = jax.jit(start, out_shardings=placed)()["layers"]
    kernels = {name: adapter.replace(base=bases[name]) for name, adapter in adapters.items()}
    head = {"score": params["score"].astype(jnp.float32)} if "score" in params else {}
    return {**params, **head, "layers": params["layers"] | kernels}


def _start(base, key, config: configs.Lora) -> Lora:
    """A fresh adapter for a base kernel `[L, I, O]`, without it."""
    layers, inputs, outputs = (base.kernel if isinstance(base, Int8) else base).shape
    bound = 1 / math.sqrt(inputs)
    a_LIR = jax.random.uniform(key, (layers, inputs, config.rank), jnp.float32, -bound, bound)
    return Lora(None, a_LIR, jnp.zeros((layers, config.rank, outputs)), config.alpha / config.rank)


def trainable(params: dict) -> dict:
    """For every leaf of a model, or of several by name, whether it trains.

    All do, but of a model with adapters only these and the score head.
    """
    if "layers" not in params:
        return {name: trainable(model) for name, model in params.items()}
    adapted = bool(adapters(params))
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not adapted or leaf_name(path).endswith(("/a_IR", "/b_RO", "score")), params
    )


def adapters(params: dict) -> dict[str, Lora]:
    """The kernels with an adapter, by the name of their projection."""
    return {name: leaf for name, leaf in params["layers"].items() if isinstance(leaf, Lora)}


def merge(params: dict) -> dict:
    """The same model as plain params: each adapter added to its base, in the dtype and the place of that."""
    return {**params, "layers": params["layers"] | {name: _merged(leaf) for name, leaf in adapters(params).items()}}


def _merged(kernel: Lora):
    place = jax.tree.leaves(kernel.base)[0].sharding
    return jax.jit(plain, out_shardings=place)(kernel)
