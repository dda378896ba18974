"""One train step for every objective.

An objective is a pure function `(params, batch) -> (sum of losses, weight, sums of metrics)`. Sums and weights, not
means, are accumulated over microbatches in float32, so that the split of a batch does not change the result.

Where not all params train (adapters on a frozen model), `split` takes them apart: the state holds what trains, with
moments for that alone; the rest is handed to each step, is not donated and gets no gradient; `join` puts them together.
"""

import math
import re
from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import optax

from cai_jax import config as configs
from cai_jax.mesh import ROW_AXES, leaf_name, shardings


@flax.struct.dataclass
class TrainState:
    """Everything that an update changes."""

    params: dict  # what trains
    opt_state: optax.OptState
    step: jax.Array


def split(params, trains):
    """What trains and what is frozen: two trees like `params`, each with None where the other has the leaf.

    `trains` is a tree of bools like `params`.
    """
    trained = jax.tree.map(lambda leaf, yes: leaf if yes else None, params, trains)
    frozen = jax.tree.map(lambda leaf, yes: None if yes else leaf, params, trains)
    return trained, frozen


def join(trained, frozen):
    """The params that `split` has taken apart; with `frozen` None all of them train."""
    if frozen is None:
        return trained
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None)


def make_schedule(config: configs.Optimizer, total_steps: int) -> optax.Schedule:
    """Linear warmup from 0, then cosine or linear decay to 0, or constant."""
    warmup = round(config.warmup_fraction * total_steps)
    decay_steps = max(1, total_steps - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(config.learning_rate, decay_steps),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, decay_steps),
        "constant": optax.constant_schedule(config.learning_rate),
    }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), after], [warmup])


def make_optimizer(config: configs.Optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; weight decay on matrices only."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=_is_matrix
        ),
    )


def _is_matrix(params):
    """Leaves that decay: of rank two or more, not counting the axis of stacked layers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim - bool(re.search(r"(^|/)layers/", leaf_name(path))) >= 2, params
    )


def init_state(params, optimizer: optax.GradientTransformation, mesh, donate: bool = False) -> TrainState:
    """A fresh state whose moments are sharded like the parameters. Donated `params` are its own; else it has a copy."""

    def start(params):
        return TrainState(params, optimizer.init(params), jnp.int32(0))

    places = shardings(mesh, jax.eval_shape(start, params))
    return jax.jit(start, out_shardings=places, donate_argnums=0 if donate else ())(params)


def start_training(
    objective: Callable,
    params,
    config: configs.Optimizer,
    total_steps: int,
    mesh,
    microbatches: int,
    frozen=None,
    donate: bool = False,
):
    """A fresh train state for `params` and the step that trains it on an objective for `total_steps` steps.

    `frozen` are the params of the objective that do not train; see `split`. For `donate` see `init_state`.
    """
    schedule = make_schedule(config, total_steps)
    optimizer = make_optimizer(config, schedule)
    state = init_state(params, optimizer, mesh, donate)
    step = make_train_step(objective, optimizer, schedule, mesh, state, microbatches)
    return state, partial(step, frozen=frozen)


def make_train_step(
    objective: Callable,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh,
    state: TrainState,
    microbatches: int = 1,
):
    """The jitted step `(state, batch, frozen=None) -> (state, metrics)`; the state is donated.

    The rows of a batch are split into `microbatches` equal parts. Metrics are float32 scalars: `loss`, `weight`,
    `grad_norm` (before clipping), `learning_rate`, and the weighted means of what the objective reports. Gradients are
    summed and divided in float32, and cast to the dtype of their parameter for the optimizer.
    """

    @partial(jax.value_and_grad, has_aux=True)
    def differentiate(trained, frozen, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for those who ask which mesh is in use
            return _as_aux(objective(join(trained, frozen), batch))

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings(mesh, state), None))
    def step(state: TrainState, batch, frozen=None):
        def accumulate(total, microbatch):
            return jax.tree.map(jnp.add, total, sums_of(microbatch)), None

        def sums_of(microbatch):
            (loss, aux), grads = differentiate(state.params, frozen, microbatch)
            return jax.tree.map(_at_least_float32, (grads, loss, *aux))

        if microbatches == 1:
            grads, loss, weight, sums = sums_of(batch)
        else:
            parts = jax.tree.map(lambda x: _split_rows(x, microbatches, mesh), batch)
            first = jax.tree.map(lambda x: x[0], parts)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums_of, first))
            (grads, loss, weight, sums), _ = jax.lax.scan(accumulate, zeros, parts)
        safe_weight = jnp.maximum(weight, 1)
        grads = jax.tree.map(lambda g: g / safe_weight, grads)
        stored = jax.tree.map(lambda g, param: g.astype(param.dtype), grads, state.params)
        updates, opt_state = optimizer.update(stored, state.opt_state, state.params)
        metrics = {name: total / safe_weight for name, total in {**sums, "loss": loss}.items()}
        metrics |= {"weight": weight, "grad_norm": optax.tree.norm(grads), "learning_rate": schedule(state.step)}
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), metrics

    return step


def _split_rows(x, parts: int, mesh):
    """Rows in `parts` equal parts, `[parts, rows / parts, ...]`, each device's part made of its own rows."""
    shards = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    if x.shape[0] % (shards * parts):
        shards = 1
    by_shard = x.reshape(shards, parts, -1, *x.shape[1:])
    return by_shard.swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])


def _at_least_float32(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _as_aux(result):
    loss, weight, sums = result
    return loss, (jnp.asarray(weight, jnp.float32), sums)
