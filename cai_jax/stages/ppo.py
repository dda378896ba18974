"""RL-CAI: PPO on the reward model with a KL penalty to the frozen SL-CAI model.

Policy, value model, reference and reward model stand on one mesh. Each update samples rollouts from the current
policy, scores them, and takes a few clipped steps; the sampler, with its weights and its cache, is gone by then. With
adapters the policy is the reference and adapters, and the value model is the reward model, adapters and a head of its
own: each pair is one model in memory. The formulas and their sources are in objectives/ppo.py.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax import distributed
from cai_jax.chat import encode_chat
from cai_jax.errors import UserError
from cai_jax.mesh import on_host
from cai_jax.models.flops import forward_flops, training_flops
from cai_jax.models.heads import last_real, values
from cai_jax.models.lora import trainable
from cai_jax.models.pretrained import Model
from cai_jax.objectives import ppo
from cai_jax.objectives.logprobs import masked_mean
from cai_jax.objectives.model_losses import completion_logprobs, completion_values, ppo_objective
from cai_jax.provenance import read_json, write_json
from cai_jax.stages.rows import messages_of, usable_prompts
from cai_jax.training import loop
from cai_jax.training.step import join, split, start_training

STAGE = "ppo"


@dataclass(frozen=True, eq=False)
class Frozen:
    """What PPO reads and never changes."""

    reference: Model
    reward: Model
    prompts: list
    prompt_length: int  # tokens that every prompt is left-padded to


def run(context, folder) -> dict:
    """Train the policy, export `model/`; returns the summary of the stage."""
    settings = context.config.ppo
    frozen, skipped, bias = _prepare(context, folder)
    params, metrics = _train(context, folder, frozen, bias)
    context.export(folder, frozen.reference, params["policy"], "policy")
    return {
        "updates": len(metrics),
        "rollouts": len(metrics) * settings.rollouts,
        "prompts": len(frozen.prompts),
        "reward_bias": bias,
        "skipped": skipped,
        "counters": {"truncated_rollouts": round(sum(m["truncated_share"] for m in metrics) * settings.rollouts)},
        "first": metrics[0],
        "last": metrics[-1],
    }


def _prepare(context, folder):
    """What stays frozen, the prompts that were left out, and the bias; its sampler ends with it."""
    settings = context.config.ppo
    reference = context.load_from("sft", settings.policy, dtype=settings.frozen_dtype)
    reward = context.load_from("reward_model", settings.reward_model, "reward", dtype=settings.frozen_dtype)
    sampler = context.sampler(reference)
    prompts, skipped = [], []
    for name in ("red_team", "helpful"):
        usable, unusable = usable_prompts(
            sampler, context.prompts[name], settings.response.max_new_tokens, settings.max_prompt_tokens
        )
        prompts, skipped = prompts + usable, skipped + unusable
    longest = max(len(encode_chat(reference.tokenizer, messages_of(prompt))) for prompt in prompts)
    frozen = Frozen(reference, reward, prompts, -(-longest // 32) * 32)
    return frozen, skipped, _reward_bias(context, folder, sampler, frozen)


def _starting_params(context, frozen: Frozen) -> dict:
    """Policy and value model: the reference and the reward model themselves, with adapters or to be trained whole.

    Where these are frozen in a dtype of their own, the two that train are loaded in the run's.
    """
    settings, policy, value = context.config.ppo, frozen.reference, frozen.reward
    if settings.frozen_dtype:
        policy = context.load_from("sft", settings.policy)
        value = context.load_from("reward_model", settings.reward_model, "reward")
    return {
        "policy": context.adapted(policy.params, "ppo policy"), "value": context.adapted(value.params, "ppo value"),
    }  # fmt: skip


def _start(context, frozen: Frozen, bias: float):
    """The train state, the params beside it that stay as they are, and the step."""
    settings = context.config.ppo
    total = settings.updates * settings.epochs * settings.minibatches
    loss = objective(context.config, frozen.reference.config, frozen.reward.config, bias)
    params = _starting_params(context, frozen)
    trained, kept = split(params, trainable(params))
    state, step = start_training(
        loss, trained, settings.optimizer, total, context.mesh, settings.microbatches, kept
    )
    return state, kept, step


def _train(context, folder, frozen: Frozen, bias: float):
    settings = context.config.ppo
    state, kept, step = _start(context, frozen, bias)

    def advance(state, update):
        params = join(state.params, kept)
        policy = replace(frozen.reference, params=params["policy"], hash="")
        rollouts = sample_rollouts(context, context.sampler(policy), frozen, f"update-{update}")
        batch, report = score_rollouts(context, frozen, params["value"], rollouts, bias)
        steps = []
        for rows in minibatches(settings, context.config.seed, update):
            state, metrics = step(state, context.put_rows({name: array[rows] for name, array in batch.items()}))
            steps.append(metrics)
        trained = {key: np.mean([float(m[key]) for m in steps]) for key in steps[0] if key not in ("loss", "weight")}
        return state, report | trained, int((rollouts["positions"] >= 0).sum())

    metrics_log = context.metrics_log(folder, flops_per_token(context.config, frozen))
    checkpoints = context.checkpoints(folder, settings.checkpoint_every)
    # What PPO maximises, score less KL, as the rollouts of the updates had it: those of each update's start.
    quality = context.quality(loop.mean_of("reward"))
    state = loop.run(
        state, advance, settings.updates, checkpoints, metrics_log, context.progress, STAGE, "update", quality
    )
    return join(state.params, kept), metrics_log.read()


def flops_per_token(config, frozen: Frozen) -> float:
    """FLOPs of an update for each token of its rollouts, prompt and completion, at their greatest length.

    The policy writes; reference, value and reward model score; policy and value model are trained.
    """
    policy, value = frozen.reference.config, frozen.reward.config
    settings, adapted = config.ppo, config.lora.rank > 0
    length = frozen.prompt_length + settings.response.max_new_tokens
    sampled = forward_flops(policy, 1, length)
    scored = forward_flops(policy, 1, length) + 2 * forward_flops(value, 1, length, unembedded=0)
    trained = training_flops(policy, 1, length, frozen=adapted)
    trained += training_flops(value, 1, length, unembedded=0, frozen=adapted)
    return sampled + scored + settings.epochs * trained


def objective(config, policy, value, bias: float):
    """What the train step minimises, for a run's `Config` and the ModelConfigs of policy and value model."""
    settings, shape = config.ppo, config.model
    return ppo_objective(
        policy, value, shape.compute_dtype, shape.remat, temperature=settings.response.temperature, clip=settings.clip,
        value_clip=settings.value_clip, value_coef=settings.value_coef, value_offset=bias, attention=shape.attention,
    )  # fmt: skip


def draw_prompts(context, prompts, count: int, draw: str):
    """`count` prompts without repeats as far as they reach, and for each the place of the draw."""
    rng = np.random.default_rng(context.row_seed(STAGE, "prompts", draw))
    order = np.concatenate([rng.permutation(len(prompts)) for _ in range(-(-count // len(prompts)))])[:count]
    return [(prompts[i], place) for place, i in enumerate(order)]


def sample_rollouts(context, sampler, frozen: Frozen, draw: str) -> dict[str, np.ndarray]:
    """Rollouts as arrays: prompts left-padded to P, completions from P on; log-probs as the sampler saw them.

    `tokens`, `positions` `[B, P + N]`; `mask`, `old_logprobs` `[B, N]`; `truncated` `[B]`. The stop token is part of
    the completion.
    """
    settings = context.config.ppo
    drawn = draw_prompts(context, frozen.prompts, settings.rollouts, draw)
    conversations = [messages_of(prompt) for prompt, _ in drawn]
    seeds = [context.row_seed(STAGE, prompt.id, draw, place) for prompt, place in drawn]
    samples = sampler.generate(conversations, settings.response, row_seeds=seeds)
    rows, prompt_length, room = len(samples), frozen.prompt_length, settings.response.max_new_tokens
    arrays = {
        "tokens": np.zeros((rows, prompt_length + room), np.int32),
        "positions": np.full((rows, prompt_length + room), -1, np.int32),
        "mask": np.zeros((rows, room), np.int32),
        "old_logprobs": np.zeros((rows, room), np.float32),
        "truncated": np.asarray([sample.truncated for sample in samples]),
    }
    for row, (conversation, sample) in enumerate(zip(conversations, samples, strict=True)):
        prompt = encode_chat(sampler.model.tokenizer, conversation)
        start, end = prompt_length - len(prompt), prompt_length + len(sample.tokens)
        arrays["tokens"][row, start:end] = prompt + sample.tokens
        arrays["positions"][row, start:end] = np.arange(end - start)
        arrays["mask"][row, : len(sample.tokens)] = 1
        arrays["old_logprobs"][row, : len(sample.tokens)] = sample.logprobs
    return arrays


def score_rollouts(context, frozen: Frozen, value_params, rollouts, bias: float):
    """The training batch of an update, and the metrics of its rollouts.

    The value model starts as the reward model, so `bias` is taken off its values as it is off the scores.
    """
    settings, shape = context.config.ppo, context.config.model
    parts = []
    rows = settings.rollouts // settings.minibatches // settings.microbatches
    for start in range(0, settings.rollouts, rows):
        part = {name: rollouts[name][start : start + rows] for name in ("tokens", "positions", "mask")}
        scored = _score(
            frozen.reference.config, frozen.reward.config, context.mesh, frozen.reference.params, value_params,
            frozen.reward.params, context.put_rows(part), settings.response.temperature, shape.compute_dtype,
            shape.attention,
        )  # fmt: skip
        parts.append([on_host(x) for x in scored])
    ref_logprobs, raw_values, raw_scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    old_values = raw_values - np.float32(bias)
    scores = raw_scores - bias - settings.missing_eos_penalty * rollouts["truncated"].astype(np.float32)
    batch, report = jax.device_get(
        _advantages(
            rollouts["old_logprobs"], ref_logprobs, old_values, scores, rollouts["mask"],
            settings.kl_estimator, settings.kl_coef, settings.gamma, settings.lam, settings.whiten_advantages,
        )
    )  # fmt: skip
    report |= {"score": np.mean(raw_scores - bias), "truncated_share": np.mean(rollouts["truncated"])}
    same = {name: rollouts[name] for name in ("tokens", "positions", "mask", "old_logprobs")}
    return same | batch | {"old_values": old_values}, report


@partial(jax.jit, static_argnames=("config", "reward_config", "mesh", "dtype", "attention"))
def _score(config, reward_config, mesh, reference, value, reward, part, temperature, dtype, attention):
    """Reference log-probs and values of the completion tokens `[B, N]`, raw reward scores `[B]`."""
    arrays = part["tokens"], part["positions"], part["mask"]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for those who ask which mesh is in use
        ref_logprobs_BN, _ = completion_logprobs(config, reference, *arrays, temperature, dtype, attention=attention)
        values_BN = completion_values(reward_config, value, *arrays, dtype, attention=attention)
        scores_BT = values(reward_config, reward, part["tokens"], part["positions"], attention=attention, dtype=dtype)
        return ref_logprobs_BN, values_BN, last_real(scores_BT, part["positions"])


def lower_score(config, policy, scorer, mesh, reference, value, reward, part):
    """The scoring program of a run's `Config`, lowered from shapes in the place of params and rollouts."""
    temperature, shape = config.ppo.response.temperature, config.model
    return _score.lower(
        policy, scorer, mesh, reference, value, reward, part, temperature, shape.compute_dtype, shape.attention
    )


@partial(jax.jit, static_argnames=("estimator", "whiten"))
def _advantages(logprobs_BN, ref_logprobs_BN, values_BN, scores_B, mask_BN, estimator, kl_coef, gamma, lam, whiten):
    kl_BN = ppo.kl(logprobs_BN, ref_logprobs_BN, estimator)
    rewards_BN = ppo.rewards(scores_B, kl_BN, mask_BN, kl_coef)
    advantages_BN, returns_BN = ppo.advantages(rewards_BN, values_BN, mask_BN, gamma, lam)
    if whiten:
        advantages_BN = ppo.whiten(advantages_BN, mask_BN)
    lengths_B = mask_BN.sum(axis=1)

    def per_row(x_BN):
        return jnp.mean(jnp.sum(jnp.where(mask_BN > 0, x_BN, 0), axis=1))

    report = {
        "reward": per_row(rewards_BN),
        "kl": per_row(ppo.kl(logprobs_BN, ref_logprobs_BN, "k1")),
        "kl_k3": per_row(ppo.kl(logprobs_BN, ref_logprobs_BN, "k3")),
        "length": jnp.mean(lengths_B.astype(jnp.float32)),
        "value_mean": masked_mean(values_BN, mask_BN),
    }
    return {"advantages": advantages_BN, "returns": returns_BN}, report


def minibatches(settings, seed: int, update: int):
    """Row numbers of every optimizer step of an update: a fresh permutation for each pass over the rollouts."""
    for epoch in range(settings.epochs):
        order = np.random.default_rng([seed, update, epoch]).permutation(settings.rollouts)
        yield from np.split(order, settings.minibatches)


def _reward_bias(context, folder, sampler, frozen: Frozen) -> float:
    """Mean reward of the reference model's own samples, taken off every score so that the scale starts at zero."""
    path = folder.path / "reference.json"
    if not distributed.by_first(path.exists):
        rollouts = sample_rollouts(context, sampler, frozen, "reference")
        _, report = score_rollouts(context, frozen, frozen.reward.params, rollouts, 0.0)
        write_json(path, {"score_mean": float(report["score"]), "samples": len(rollouts["tokens"])})
    recorded = distributed.by_first(lambda: read_json(path))
    mean = recorded.get("score_mean") if isinstance(recorded, dict) else None
    if not isinstance(mean, int | float) or isinstance(mean, bool):
        raise UserError(f"{path}: holds no number under score_mean; --fresh --stages=ppo does the stage again")
    return mean
