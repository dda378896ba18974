"""The loop around a train step: resume, advance, log, checkpoint."""

from collections.abc import Callable

import jax

from cai_jax.training.checkpoint import Checkpoints


def run(state, advance: Callable, total: int, checkpoints: Checkpoints, metrics_file, progress, name: str, unit: str):
    """Advance `state` from its last checkpoint to `total` steps (or updates) and return it.

    `advance(state, index) -> (state, metrics, tokens)` does step `index`, counted from 0, and depends on nothing
    but its arguments. A line of metrics is written for every step, under the key `unit`, counted from 1. Lines
    after the last checkpoint are dropped before going on, so a resumed run leaves the same lines.
    """
    state, position = checkpoints.restore(state)
    done = position.get("done", 0)
    metrics_file.truncate_to(unit, done)
    with progress.task(name, total, f"{unit}s", done=done) as task:
        for index in range(done, total):
            state, metrics, tokens = advance(state, index)
            metrics = {key: float(x) for key, x in sorted(jax.device_get(metrics).items())}
            metrics_file.append({unit: index + 1} | metrics)
            task.advance(1, tokens=tokens, note=_note(metrics))
            if checkpoints.due(index + 1, total):
                metrics_file.sync()
                checkpoints.save(index + 1, state, {"done": index + 1})
    checkpoints.close()
    return state


def _note(metrics):
    shown = [key for key in ("loss", "score", "kl") if key in metrics]
    return ", ".join(f"{key} {metrics[key]:.3g}" for key in shown)
