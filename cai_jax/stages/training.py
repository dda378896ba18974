"""The training of one model on rows of arrays, as the stages that do nothing else share it."""

from collections.abc import Callable

import numpy as np

from cai_jax.models.lora import trainable
from cai_jax.provenance import MetricsFile
from cai_jax.training import loop
from cai_jax.training.batches import batch_rows, steps_per_epoch, take_rows
from cai_jax.training.checkpoint import Checkpoints
from cai_jax.training.step import join, split, start_training


def train(context, folder, settings, objective: Callable, params, arrays: dict[str, np.ndarray], report: Callable):
    """Train `params` on an objective for the epochs of a stage's `settings`.

    Rows of `arrays` are drawn in batches; `report(metrics) -> metrics` names what is logged of a step. Returns the
    trained params, in the form that they have in the train state, and the lines of metrics.
    """
    count = len(arrays["tokens"])
    total = settings.epochs * steps_per_epoch(count, settings.batch_size)
    params = context.adapted(params, folder.stage)
    trained, frozen = split(params, trainable(params))
    state, step = start_training(
        objective, trained, settings.optimizer, total, context.mesh, settings.microbatches, frozen
    )

    def advance(state, index):
        batch = take_rows(arrays, batch_rows(count, settings.batch_size, context.config.seed, index))
        state, metrics = step(state, context.put_rows(batch))
        return state, report(metrics), int((batch["positions"] >= 0).sum())

    metrics_file = MetricsFile(folder.path / "metrics.jsonl")
    checkpoints = Checkpoints(folder.path / "checkpoints", settings.checkpoint_every)
    state = loop.run(state, advance, total, checkpoints, metrics_file, context.progress, folder.stage, "step")
    return join(state.params, frozen), metrics_file.read()
