"""What an update of PPO and one of GRPO have in common: their steps, and who watches them."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from cai_jax import monitors
from cai_jax.objectives import ppo
from cai_jax.objectives.logprobs import masked_mean
from cai_jax.stages.rollouts import Rollouts
from cai_jax.training import loop
from cai_jax.training.loop import ENDS

# `monitor(update, policy_sampler, rollouts, report) -> (metrics, stop)`, called after the steps of every update.
# `update` counts from 1; `policy_sampler()` makes a sampler of the policy as it is now; `rollouts` are those that the
# update has learned from, drawn from the policy before it; `report` are the metrics of the update, to which the
# returned ones are added. With `stop` this update is the last one. The same arguments must give the same answer.
Monitor = Callable[[int, Callable, Rollouts, dict], tuple[dict, bool]]


def minibatches(settings, seed: int, update: int):
    """Row numbers of every optimizer step of an update: a fresh permutation for each pass over the rollouts."""
    for epoch in range(settings.epochs):
        order = np.random.default_rng([seed, update, epoch]).permutation(settings.rollouts)
        yield from np.split(order, settings.minibatches)


def take_steps(context, settings, step: Callable, state, batch: dict, update: int):
    """The optimizer steps of an update on its batch; returns the state and the means of their metrics.

    With `settings.max_update_kl` above 0 the step whose minibatch has shown a larger mean of (new - old log-prob)^2 / 2
    is the last one of the update. The number is that of all devices, so all processes stop alike. `steps` says how many
    there were.
    """
    taken = []
    for rows in minibatches(settings, context.config.seed, update):
        state, metrics = step(state, context.put_rows({name: array[rows] for name, array in batch.items()}))
        taken.append(metrics)
        if 0 < settings.max_update_kl < float(metrics["approx_kl"]):
            break
    names = [name for name in taken[0] if name not in ("loss", "weight")]
    means = {name: np.mean([float(metrics[name]) for metrics in taken]) for name in names}
    return state, means | {"steps": len(taken)}


def watched(monitor: Monitor | None, update: int, policy_sampler: Callable, rollouts: Rollouts, report: dict) -> dict:
    """The report with what the monitor adds, and with the mark of the last update where it asks to stop."""
    if monitor is None:
        return report
    metrics, stop = monitor(update, policy_sampler, rollouts, report)
    return report | metrics | ({ENDS: 1} if stop else {})


def kl_report(logprobs_BN, ref_logprobs_BN, mask_BN) -> dict:
    """KL to the reference in nats a response, by two estimators, and the mean length; of rows that have a token."""
    kls = {name: ppo.kl(logprobs_BN, ref_logprobs_BN, estimator) for name, estimator in (("kl", "k1"), ("kl_k3", "k3"))}
    ones_BN = jnp.ones(mask_BN.shape, jnp.float32)
    return {name: mean_of_rows(x_BN, mask_BN) for name, x_BN in {**kls, "length": ones_BN}.items()}


def mean_of_rows(x_BN, mask_BN):
    """Mean over the rows that have a token of the sum over their tokens."""
    return masked_mean(jnp.sum(jnp.where(mask_BN > 0, x_BN, 0), axis=1), mask_BN.any(axis=1))


def quality_of(context) -> Callable | None:
    """What training/loop.py chooses the exported state by, as the config asks; None: it is the last.

    best: what is maximised, score less KL, as the rollouts of the updates had it: those of each update's start.
    """
    by = {"best": loop.mean_of("reward"), "frontier": lambda state, lines: monitors.quality(lines[-1])}
    return by.get(context.config.checkpoints.export)


def summary(settings, metrics: list[dict], prompts, skipped: list[dict]) -> dict:
    """What the summaries of both stages say, from the lines of metrics."""
    planned = settings.epochs * settings.minibatches
    counters = {
        "truncated_rollouts": round(sum(m["truncated_share"] for m in metrics) * settings.rollouts),
        "unscored_rollouts": round(sum(m["unscored_share"] for m in metrics) * settings.rollouts),
        "updates_ended_early": sum(m["steps"] < planned for m in metrics),
    }
    ended = f"the monitor asked to stop after update {len(metrics)} of {settings.updates}"
    return {
        "updates": len(metrics),
        "rollouts": len(metrics) * settings.rollouts,
        "prompts": len(prompts.rows),
        "skipped": skipped,
        "counters": counters,
        "stopped": ended if metrics[-1].get(ENDS) else "",
        "first": metrics[0],
        "last": metrics[-1],
    }
