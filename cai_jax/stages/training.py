"""The training of one model on rows of arrays, as the stages that do nothing else share it."""

from collections.abc import Callable

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
):
    """Train `params` on an objective for the epochs of a stage's `settings`.

    Rows of `source` are drawn in batches; `report(metrics) -> metrics` names what is logged of a step. Where the config
    asks for the best state, `quality(params, lines) -> float` judges it. With `donate` the arrays of `params` that are
    to train go into the state and are gone from `params`. Returns the trained params, in the form that they have in the
    train state, and the lines of metrics.
    """
    total = settings.epochs * steps_per_epoch(len(source), settings.batch_size)
    params = context.adapted(params, folder.stage)
    trained, frozen = split(params, trainable(params))
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
    return join(state.params, frozen), metrics_log.read()
