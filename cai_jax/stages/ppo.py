"""RL-CAI: PPO on the score of a reward model, a judge or a rule, with a KL penalty to the frozen SL-CAI model.

Policy, value model, reference and what scores stand on one mesh. Each update samples rollouts from the current
policy, scores them, and takes a few clipped steps; the sampler, with its weights and its cache, is gone by then. With
adapters the policy is the reference and adapters, and the value model is the reward model, adapters and a head of its
own: each pair is one model in memory. The formulas and their sources are in objectives/ppo.py.
"""

from dataclasses import dataclass, replace
from functools import partial

import flax.struct
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cai_jax import distributed
from cai_jax.errors import UserError
from cai_jax.models.families import ModelConfig
from cai_jax.models.flops import forward_flops, training_flops
from cai_jax.models.heads import with_one_head
from cai_jax.models.pretrained import Model, fresh_head
from cai_jax.objectives import ppo
from cai_jax.objectives.model_losses import ppo_objective
from cai_jax.provenance import read_json, write_json
from cai_jax.stages import rewards, updates
from cai_jax.stages.monitor import monitor_of
from cai_jax.stages.monitor import summary as monitor_summary
from cai_jax.stages.rollouts import Prompts, Rollouts, sample_rollouts, usable
from cai_jax.stages.training import parts
from cai_jax.training import loop
from cai_jax.training.step import TrainState, join, start_training

STAGE = "ppo"
REFERENCE = "reference.json"  # what the reference's own rollouts scored


@dataclass(frozen=True, eq=False)
class Frozen:
    """What PPO reads and never changes. `value_config` is the shape of the value model; None: the policy has a head."""

    reference: Model
    source: rewards.Source
    prompts: Prompts
    value_config: ModelConfig | None

    def value_of(self, params: dict) -> tuple[ModelConfig, dict]:
        """Shape and params of what gives the values, among the params that train."""
        if self.value_config is None:
            return self.reference.config, params["policy"]
        return self.value_config, params["value"]


@flax.struct.dataclass
class State:
    """All that an update changes, so all that a checkpoint holds."""

    train: TrainState
    kl_coef: jax.Array  # float32 scalar
    scores: ppo.Moments


def run(context, folder, monitor: updates.Monitor | None = None) -> dict:
    """Train the policy, export `model/`; returns the summary of the stage."""
    frozen, skipped, bias = _prepare(context, folder)
    monitor = monitor or monitor_of(context, folder, frozen.reference, frozen.source, frozen.prompts)
    params, metrics = _train(context, folder, frozen, bias, monitor)
    context.export(folder, frozen.reference, without_head(params["policy"]), "policy")
    summary = updates.summary(context.config.ppo, metrics, frozen.prompts, skipped)
    return summary | {"reward_bias": bias} | monitor_summary(context, folder, metrics)


def without_head(policy: dict) -> dict:
    """The params of a policy without a value head that it may carry."""
    return {name: leaf for name, leaf in policy.items() if name != "score"}


def _prepare(context, folder):
    """What stays frozen, the prompts that were left out, and the bias."""
    settings = context.config.ppo
    reference = context.load_from("sft", settings.policy, dtype=settings.frozen_dtype)
    source = rewards.load_source(context, STAGE)
    value_config = None
    if settings.value_trunk == "separate":
        value_config = (source.model if source.kind == "model" else reference).config
    prompts, skipped, rollouts = _reference_rollouts(context, folder, reference)
    bias = _reward_bias(context, folder, reference, source, rollouts)
    return Frozen(reference, source, prompts, value_config), skipped, bias


def _starting_params(context, frozen: Frozen) -> dict:
    """Policy and value model: the reference and the reward model themselves, with adapters or to be trained whole.

    Where these are frozen in a dtype of their own, the two that train are loaded in the run's. Without a reward model
    the value model is the policy's start with a fresh head.
    """
    settings, source = context.config.ppo, frozen.source
    policy = (context.load_from("sft", settings.policy) if settings.frozen_dtype else frozen.reference).params
    head = fresh_head(frozen.reference.config, context.config.seed).astype(context.config.model.dtype)
    head = {"score": jax.device_put(head, _replicated(context.mesh))}
    if frozen.value_config is None:
        return {"policy": context.adapted(policy | head, "ppo policy")}
    if source.kind != "model":
        value = {name: leaf for name, leaf in policy.items() if name != "lm_head"} | head
    elif settings.frozen_dtype:
        value = with_one_head(context.load_from("reward_model", settings.reward_model, "reward").params)
    else:
        value = with_one_head(source.model.params)
    return {"policy": context.adapted(policy, "ppo policy"), "value": context.adapted(value, "ppo value")}


def _replicated(mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def value_offset(settings, bias: float) -> float:
    """What is taken off the value model's output: the bias, where it starts as the reward model that has it."""
    return bias if settings.reward == "model" and settings.value_trunk == "separate" else 0.0


def _start(context, frozen: Frozen, bias: float):
    """The state, the params beside it that stay as they are, and the step of the train state."""
    settings = context.config.ppo
    total = settings.updates * settings.epochs * settings.minibatches
    loss = objective(context.config, frozen.reference.config, frozen.value_config, bias)
    params = _starting_params(context, frozen)
    trained, kept = parts(params)
    train, step = start_training(
        loss, trained, settings.optimizer, total, context.mesh, settings.microbatches, kept
    )
    return _state(context, train, settings.kl_coef, ppo.no_scores()), kept, step


def _state(context, train: TrainState, kl_coef: float, scores: ppo.Moments) -> State:
    """The numbers beside the train state are arrays on its mesh, as orbax wants them."""
    place = partial(jax.device_put, device=_replicated(context.mesh))
    return State(train, place(np.float32(kl_coef)), jax.tree.map(place, scores))


def _train(context, folder, frozen: Frozen, bias: float, monitor):
    settings = context.config.ppo
    state, kept, step = _start(context, frozen, bias)

    def sampler_of(params):
        return context.sampler(replace(frozen.reference, params=without_head(params["policy"]), hash=""))

    def advance(state: State, update: int):
        params = join(state.train.params, kept)
        rollouts = sample_rollouts(context, STAGE, sampler_of(params), frozen.prompts, f"update-{update}")
        kl_coef = float(state.kl_coef)
        batch, report, scores = score_rollouts(context, frozen, params, rollouts, bias, kl_coef, state.scores)
        del params
        train, trained = updates.take_steps(context, settings, step, state.train, batch, update)
        report |= trained
        state = _state(context, train, _next_kl_coef(settings, kl_coef, float(report["kl"])), scores)
        report = updates.watched(
            monitor, update + 1, lambda: sampler_of(join(train.params, kept)), rollouts, report
        )
        return state, report, rollouts.token_count()

    metrics_log = context.metrics_log(folder, flops_per_token(context.config, frozen))
    checkpoints = context.checkpoints(folder, settings.checkpoint_every)
    quality = updates.quality_of(context)
    state = loop.run(
        state, advance, settings.updates, checkpoints, metrics_log, context.progress, STAGE, "update", quality
    )
    return join(state.train.params, kept), metrics_log.read()


def _next_kl_coef(settings, kl_coef: float, kl: float) -> float:
    if not settings.kl_target:
        return kl_coef
    return ppo.next_kl_coef(kl_coef, kl, settings.kl_target, settings.kl_horizon, settings.rollouts)


def flops_per_token(config, frozen: Frozen) -> float:
    """FLOPs of an update for each token of its rollouts, prompt and completion, at their greatest length.

    The policy writes; reference, value and reward model score; policy and value model are trained. What a judge does
    is not in it.
    """
    policy, value, reward = frozen.reference.config, frozen.value_config, frozen.source.model
    settings, adapted = config.ppo, config.lora.rank > 0
    length = frozen.prompts.length + settings.response.max_new_tokens
    sampled = forward_flops(policy, 1, length)
    scored = forward_flops(policy, 1, length) + forward_flops(value or policy, 1, length, unembedded=0)
    if frozen.source.kind == "model":
        scored += forward_flops(reward.config, 1, length, unembedded=0)
    trained = training_flops(policy, 1, length, frozen=adapted)
    if value is not None:
        trained += training_flops(value, 1, length, unembedded=0, frozen=adapted)
    return sampled + scored + settings.epochs * trained


def objective(config, policy, value, bias: float):
    """What the train step minimises, for a run's `Config` and the ModelConfigs of policy and value model."""
    settings, shape = config.ppo, config.model
    return ppo_objective(
        policy, value, shape.compute_dtype, shape.remat, temperature=settings.response.temperature, clip=settings.clip,
        value_clip=settings.value_clip, value_coef=settings.value_coef, value_offset=value_offset(settings, bias),
        attention=shape.attention,
    )  # fmt: skip


def score_rollouts(
    context, frozen: Frozen, params, rollouts: Rollouts, bias: float, kl_coef: float, moments: ppo.Moments
):
    """The training batch of an update, the metrics of its rollouts, and the moments of all scores so far.

    `params` are those that train. With `normalise_scores` advantages are made of scores and values less the mean of the
    scores, over their deviation; the value model goes on in the units of the scores, so returns are put back to these.
    """
    settings, arrays = context.config.ppo, rollouts.arrays
    ref_logprobs, raw_values, uncertainty, raw_scores = rewards.measure(
        context, STAGE, frozen.reference, frozen.source, rollouts, frozen.value_of(params)
    )
    mask, raw_scores = rewards.scored_only(rollouts, raw_scores)
    has_score = mask.any(axis=1)
    unbiased, old_values = raw_scores - np.float32(bias), raw_values - np.float32(value_offset(settings, bias))
    mean, scale = 0.0, 1.0
    if settings.normalise_scores:
        moments = ppo.with_scores(moments, unbiased[has_score])
        mean, scale = float(moments.mean), moments.scale()
    scores = (unbiased - np.float32(mean)) / np.float32(scale)
    if settings.score_clip:
        scores = np.clip(scores, -settings.score_clip, settings.score_clip)
    scores = scores - settings.missing_eos_penalty * arrays["truncated"].astype(np.float32)
    batch, report = jax.device_get(
        _advantages(
            arrays["old_logprobs"], ref_logprobs, (old_values - np.float32(mean)) / np.float32(scale), scores, mask,
            settings.kl_estimator, kl_coef, settings.kl_per, settings.gamma, settings.lam, settings.whiten_advantages,
        )
    )  # fmt: skip
    returns = batch["returns"] * np.float32(scale) + np.float32(mean) * (mask > 0)
    report |= {
        "score": np.mean(unbiased[has_score]), "value_mean": np.mean(old_values[mask > 0]),
        "uncertainty": np.mean(uncertainty), "truncated_share": np.mean(arrays["truncated"]),
        "unscored_share": np.mean(~has_score), "kl_coef": kl_coef, "score_scale": scale,
    }  # fmt: skip
    batch = {**batch, "returns": returns, "old_values": old_values, "mask": mask}
    same = {name: arrays[name] for name in ("tokens", "positions", "old_logprobs")}
    return same | batch, report, moments


@partial(jax.jit, static_argnames=("estimator", "kl_per", "whiten"))
def _advantages(
    logprobs_BN, ref_logprobs_BN, values_BN, scores_B, mask_BN, estimator, kl_coef, kl_per, gamma, lam, whiten
):
    kl_BN = ppo.kl(logprobs_BN, ref_logprobs_BN, estimator)
    rewards_BN = ppo.rewards(scores_B, kl_BN, mask_BN, kl_coef, kl_per)
    advantages_BN, returns_BN = ppo.advantages(rewards_BN, values_BN, mask_BN, gamma, lam)
    if whiten:
        advantages_BN = ppo.whiten(advantages_BN, mask_BN)
    return {"advantages": advantages_BN, "returns": returns_BN}, {
        "reward": updates.mean_of_rows(rewards_BN, mask_BN),
        **updates.kl_report(logprobs_BN, ref_logprobs_BN, mask_BN),
    }


def _reference_rollouts(context, folder, reference: Model):
    """Prompts, those left out, and rollouts of the reference (None where they are recorded); the sampler ends here."""
    sampler = context.sampler(reference)
    prompts, skipped = usable(context, STAGE, sampler)
    recorded = distributed.by_first((folder.path / REFERENCE).exists)
    return prompts, skipped, None if recorded else sample_rollouts(context, STAGE, sampler, prompts, "reference")


def _reward_bias(context, folder, reference: Model, source: rewards.Source, rollouts: Rollouts | None) -> float:
    """Mean score of the reference model's own rollouts, taken off every score so that the scale starts at zero."""
    path = folder.path / REFERENCE
    if rollouts is not None:
        *_, scores = rewards.measure(context, STAGE, reference, source, rollouts)
        scores = scores[np.isfinite(scores)]
        write_json(path, {"score_mean": float(np.mean(scores)), "samples": len(scores)})
    recorded = distributed.by_first(lambda: read_json(path))
    mean = recorded.get("score_mean") if isinstance(recorded, dict) else None
    if not isinstance(mean, int | float) or isinstance(mean, bool):
        raise UserError(f"{path}: holds no number under score_mean; --fresh --stages=ppo does the stage again")
    return mean
