"""The loop around a train step: resume, advance, log, checkpoint."""

import math
import time
from collections.abc import Callable

import jax

from cai_jax import distributed, interrupts
from cai_jax.training.checkpoint import Checkpoints

ENDS = "ends_training"  # a metric: above 0, the step that reports it is the last one


def run(
    state,
    advance: Callable,
    total: int,
    checkpoints: Checkpoints,
    metrics_log,
    progress,
    name: str,
    unit: str,
    quality: Callable | None = None,
):
    """Advance `state` from its last checkpoint to `total` steps (or updates) and return the state to export.

    `advance(state, index) -> (state, metrics, tokens)` does step `index`, counted from 0, and depends on nothing
    but its arguments. A line of metrics is written for every step, under the key `unit`, counted from 1. Lines
    after the last checkpoint are dropped before going on, so a resumed run leaves the same lines. A step whose metrics
    have ENDS is the last, whatever the total.

    Without `quality` the last state is returned. `quality(state, lines) -> float` judges a state, higher is better, by
    itself or by the lines of metrics of the steps since the checkpoint before it was due; the best of the states at
    checkpoints and at the end is returned, of equal ones the last.

    SIGINT or SIGTERM in any process ends the step under way, saves the state and raises `interrupts.Stopped` in all.
    """
    state, position = checkpoints.restore(state)
    done = position.get("done", 0)
    with (
        metrics_log.opened(unit, done),
        progress.task(name, total, f"{unit}s", done=done) as task,
        interrupts.noted() as asked,
    ):
        lines = metrics_log.read()
        for index in range(done, total):
            if lines and lines[-1].get(ENDS):
                break
            started = time.monotonic()
            with jax.profiler.StepTraceAnnotation(name, step_num=index + 1):
                state, metrics, tokens = advance(state, index)
                metrics = {key: float(x) for key, x in sorted(jax.device_get(metrics).items())}
            lines.append({unit: index + 1} | metrics)
            speed = metrics_log.append(lines[-1], tokens, time.monotonic() - started)
            task.advance(1, tokens=tokens, note=", ".join([*_shown(metrics), str(speed)]))
            stop, due = distributed.highest(asked()), checkpoints.due(index + 1, total)
            if stop or due:
                metrics_log.sync()
                judged = quality(state, lines[-checkpoints.every :]) if quality and due else None
                checkpoints.save(index + 1, state, {"done": index + 1}, judged)
            if stop:
                checkpoints.close()
                raise interrupts.Stopped(stop, saved=f"{unit} {index + 1} of {total} of {name}")
    if quality and (best := checkpoints.best()):
        step, highest = best
        if not quality(state, lines[-checkpoints.every :]) >= highest:
            state, _ = checkpoints.restore(state, step)
            progress.log(f"{name}: the best state is that of {unit} {step}")
    checkpoints.close()
    return state


def mean_of(key: str, sign: int = 1) -> Callable:
    """A quality for `run`: the mean of a metric over the lines, times `sign`; minus infinity where one is missing."""

    def quality(state, lines) -> float:
        values = [line.get(key) for line in lines]
        numbers = [value for value in values if value is not None and math.isfinite(value)]
        return sign * sum(numbers) / len(numbers) if len(numbers) == len(values) else -math.inf

    return quality


def _shown(metrics):
    return [f"{key} {metrics[key]:.3g}" for key in ("loss", "score", "kl") if key in metrics]
