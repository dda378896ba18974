"""The loop around a train step: resume, advance, log, checkpoint."""

import time
from collections.abc import Callable

import jax

from cai_jax.training.checkpoint import Checkpoints


def run(state, advance: Callable, total: int, checkpoints: Checkpoints, metrics_log, progress, name: str, unit: str):
    """Advance `state` from its last checkpoint to `total` steps (or updates) and return it.

    `advance(state, index) -> (state, metrics, tokens)` does step `index`, counted from 0, and depends on nothing
    but its arguments. A line of metrics is written for every step, under the key `unit`, counted from 1. Lines
    after the last checkpoint are dropped before going on, so a resumed run leaves the same lines.
    """
    state, position = checkpoints.restore(state)
    done = position.get("done", 0)
    with metrics_log.opened(unit, done), progress.task(name, total, f"{unit}s", done=done) as task:
        for index in range(done, total):
            started = time.monotonic()
            with jax.profiler.StepTraceAnnotation(name, step_num=index + 1):
                state, metrics, tokens = advance(state, index)
                metrics = {key: float(x) for key, x in sorted(jax.device_get(metrics).items())}
            speed = metrics_log.append({unit: index + 1} | metrics, tokens, time.monotonic() - started)
            task.advance(1, tokens=tokens, note=", ".join([*_shown(metrics), str(speed)]))
            if checkpoints.due(index + 1, total):
                metrics_log.sync()
                checkpoints.save(index + 1, state, {"done": index + 1})
    checkpoints.close()
    return state


def _shown(metrics):
    return [f"{key} {metrics[key]:.3g}" for key in ("loss", "score", "kl") if key in metrics]
