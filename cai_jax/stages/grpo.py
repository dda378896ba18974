"""GRPO (Shao et al. 2024, arXiv 2402.03300): several responses to each prompt compete; there is no value model.

Rollouts, scores and steps are those of PPO (rollouts.py, rewards.py, updates.py); the loss is in objectives/grpo.py.
A group shares its prompt's keys and values in the sampler. The mean of the group takes the place of both the value
model and the reward's bias.
"""

from dataclasses import dataclass, replace

import jax
import numpy as np

from cai_jax.models.flops import forward_flops, training_flops
from cai_jax.models.pretrained import Model
from cai_jax.objectives import grpo
from cai_jax.objectives.model_losses import grpo_objective
from cai_jax.stages import rewards, updates
from cai_jax.stages.monitor import monitor_of
from cai_jax.stages.monitor import summary as monitor_summary
from cai_jax.stages.rollouts import Prompts, Rollouts, sample_rollouts, usable
from cai_jax.stages.training import parts
from cai_jax.training import loop
from cai_jax.training.step import join, start_training

STAGE = "grpo"


@dataclass(frozen=True, eq=False)
class Frozen:
    """What GRPO reads and never changes."""

    reference: Model
    source: rewards.Source
    prompts: Prompts


def run(context, folder, monitor: updates.Monitor | None = None) -> dict:
    """Train the policy, export `model/`; returns the summary of the stage."""
    settings = context.config.grpo
    reference = context.load_from("sft", settings.policy, dtype=settings.frozen_dtype)
    prompts, skipped = usable(context, STAGE, context.sampler(reference))
    frozen = Frozen(reference, rewards.load_source(context, STAGE), prompts)
    monitor = monitor or monitor_of(context, folder, reference, frozen.source, prompts)
    params, metrics = _train(context, folder, frozen, monitor)
    context.export(folder, reference, params["policy"], "policy")
    return updates.summary(settings, metrics, prompts, skipped) | monitor_summary(context, folder, metrics)


def _start(context, frozen: Frozen):
    """The train state, the params beside it that stay as they are, and the step."""
    settings = context.config.grpo
    policy = context.load_from("sft", settings.policy) if settings.frozen_dtype else frozen.reference
    params = {"policy": context.adapted(policy.params, "grpo policy")}
    trained, kept = parts(params)
    total = settings.updates * settings.epochs * settings.minibatches
    loss = objective(context.config, frozen.reference.config)
    state, step = start_training(
        loss, trained, settings.optimizer, total, context.mesh, settings.microbatches, kept
    )
    return state, kept, step


def _train(context, folder, frozen: Frozen, monitor):
    settings = context.config.grpo
    state, kept, step = _start(context, frozen)

    def sampler_of(params):
        return context.sampler(replace(frozen.reference, params=params["policy"], hash=""))

    def advance(state, update):
        sampler = sampler_of(join(state.params, kept))
        rollouts = sample_rollouts(context, STAGE, sampler, frozen.prompts, f"update-{update}", settings.group)
        del sampler
        batch, report = score_rollouts(context, frozen, rollouts)
        state, trained = updates.take_steps(context, settings, step, state, batch, update)
        report = updates.watched(
            monitor, update + 1, lambda: sampler_of(join(state.params, kept)), rollouts, report | trained
        )
        return state, report, rollouts.token_count()

    metrics_log = context.metrics_log(folder, flops_per_token(context.config, frozen))
    checkpoints = context.checkpoints(folder, settings.checkpoint_every)
    quality = updates.quality_of(context)
    state = loop.run(
        state, advance, settings.updates, checkpoints, metrics_log, context.progress, STAGE, "update", quality
    )
    return join(state.params, kept), metrics_log.read()


def objective(config, policy):
    """What the train step minimises, for a run's `Config` and the ModelConfig of the policy."""
    settings, shape = config.grpo, config.model
    return grpo_objective(
        policy, shape.compute_dtype, shape.remat, temperature=settings.response.temperature, clip=settings.clip,
        kl_coef=settings.kl_coef, length_norm=settings.length_norm, attention=shape.attention,
    )  # fmt: skip


def score_rollouts(context, frozen: Frozen, rollouts: Rollouts):
    """The training batch of an update, and the metrics of its rollouts.

    `reward` is what GRPO maximises: the score less kl_coef times k3, summed over a response.
    """
    settings, arrays = context.config.grpo, rollouts.arrays
    measured = rewards.measure(context, STAGE, frozen.reference, frozen.source, rollouts)
    ref_logprobs, _, uncertainty, raw_scores = measured
    mask, raw_scores = rewards.scored_only(rollouts, raw_scores)
    has_score = mask.any(axis=1)
    scores = raw_scores - settings.missing_eos_penalty * arrays["truncated"].astype(np.float32)
    advantages = np.asarray(grpo.advantages(scores, has_score, settings.group, settings.scale_advantages))
    report = jax.device_get(_kl_report(arrays["old_logprobs"], ref_logprobs, mask))
    in_groups = zip(scores.reshape(-1, settings.group), has_score.reshape(-1, settings.group), strict=True)
    report |= {
        "score": np.mean(raw_scores[has_score]),
        "reward": np.mean(scores[has_score]) - settings.kl_coef * report["kl_k3"],
        "group_deviation": np.mean([np.std(group[real]) for group, real in in_groups if real.any()]),
        "truncated_share": np.mean(arrays["truncated"]), "unscored_share": np.mean(~has_score),
        "uncertainty": np.mean(uncertainty),
    }  # fmt: skip
    same = {name: arrays[name] for name in ("tokens", "positions", "old_logprobs")}
    return same | {"mask": mask, "ref_logprobs": ref_logprobs, "advantages": advantages}, report


_kl_report = jax.jit(updates.kl_report)


def flops_per_token(config, frozen: Frozen) -> float:
    """FLOPs of an update for each token of its rollouts, prompt and completion, at their greatest length.

    The policy writes; reference and reward model score; the policy is trained. What a judge does is not in it.
    """
    policy, source, settings = frozen.reference.config, frozen.source, config.grpo
    length = frozen.prompts.length + settings.response.max_new_tokens
    sampled = scored = forward_flops(policy, 1, length)
    if source.kind == "model":
        scored += forward_flops(source.model.config, 1, length, unembedded=0)
    trained = training_flops(policy, 1, length, frozen=config.lora.rank > 0)
    return sampled + scored + settings.epochs * trained
