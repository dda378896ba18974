"""The training of one model on rows of arrays, as the stages that do nothing else share it."""

from collections.abc import Callable

import jax

from cai_jax.models.lora import trainable
from cai_jax.training import loop
from cai_jax.training.batches import Packing, Rows, batch_rows, steps_per_epoch
from cai_jax.training.step import join, split, start_training


def train(
    context,
    folder,
    settings,
    objective: Callable,
    params,
    source: Rows | Packing,
    report: Callable,
    flops_per_token: float,
    quality: Callable,
    donate: bool = False,
    reference=None,
):
    """Train `params` on an objective for the epochs of a stage's `settings`.

    Rows of `source` are drawn in batches; `report(metrics) -> metrics` names what is logged of a step. Where the config
    asks for the best state, `quality(params, lines) -> float` judges it. With `donate` the arrays of `params` that are
    to train go into the state and are gone from `params`. Where there are params of a `reference`, which do not train,
    the objective is given both, as `policy` and `reference`. Returns the trained params, in the form that they have in
    the train state, and the lines of metrics.
    """
    total = settings.epochs * steps_per_epoch(len(source), settings.batch_size)
    params = context.adapted(params, folder.stage)
    trained, frozen = parts(params, reference)
    state, step = start_training(
        objective, trained, settings.optimizer, total, context.mesh, settings.microbatches, frozen, donate
    )

    def advance(state, index):
        rows = batch_rows(len(source), settings.batch_size, context.config.seed, index)
        state, metrics = step(state, context.place_rows(rows, source.take))
        return state, report(metrics), source.tokens(rows)

    def judge(state, lines):
        return quality(join(state.params, frozen), lines)

    metrics_log = context.metrics_log(folder, flops_per_token)
    checkpoints = context.checkpoints(folder, settings.checkpoint_every)
    state = loop.run(
        state, advance, total, checkpoints, metrics_log, context.progress, folder.stage, "step", context.quality(judge)
    )
    params = join(state.params, frozen)
    return params if reference is None else params["policy"], metrics_log.read()


def parts(params, reference=None):
    """What of `params` trains and what is frozen, as `step.split` gives it; a `reference` model beside them is frozen.

    With one, `step.join` of the two gives `{"policy": params, "reference": reference}`.
    """
    if reference is None:
        return split(params, trainable(params))
    trains = {"policy": trainable(params), "reference": jax.tree.map(lambda _: False, reference)}
    return split({"policy": params, "reference": reference}, trains)
