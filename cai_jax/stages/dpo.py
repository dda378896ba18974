"""Direct preference optimization (Rafailov et al. 2023) on the AI labels, from the SL-CAI model: no reward model.

The reference's log-probs are those of the model that the policy starts from; they are computed once, before training,
and kept (`reference-*.jsonl`). With adapters policy and reference are one copy in memory. The kinds of the loss and
their sources stand in objectives/dpo.py. Prompts are held out as the reward model holds them out.
"""

import math

import numpy as np

from cai_jax import statistics
from cai_jax.errors import UserError
from cai_jax.filters import TIE
from cai_jax.models.flops import training_flops
from cai_jax.objectives import dpo
from cai_jax.objectives.model_losses import dpo_objective
from cai_jax.stages.reward_model import split_by_prompt, token_pairs
from cai_jax.stages.scoring import score_pairs
from cai_jax.stages.training import train
from cai_jax.training.batches import Rows, pair_rows

STAGE = "dpo"


def run(context, folder) -> dict:
    """Train on the labels, evaluate on held-out prompts, export `model/`; returns the summary of the stage."""
    settings = context.config.dpo
    model = context.load_from("sft", settings.policy)
    rows = [row for row in context.folder("preferences").read_shards() if row["kept"]]
    usable, counters, skipped = token_pairs(model.tokenizer, rows, settings.max_length)
    trained_on, held_out = (_usable(settings, side) for side in split_by_prompt(usable, settings.held_out))
    used = {pair["id"] for pair in trained_on + held_out}
    skipped += [{"id": pair["id"], "reason": "tie"} for pair in usable if pair["id"] not in used]
    counters["tie"] = len(usable) - len(used)
    if not trained_on:
        raise UserError(
            f"dpo: of {len(rows)} pairs {len(usable)} can be used, {counters['tie']} of them are ties: too few to "
            "train on and hold out; add prompts, raise dpo.max_length, or set dpo.soft_labels=true to take ties in"
        )
    _keep_reference(context, folder, model, trained_on, held_out)
    params, metrics = _train(context, folder, model, trained_on, held_out)
    context.export(folder, model, params, "policy")
    context.progress.log("dpo: scoring the held-out pairs")
    return {
        "kind": settings.kind,
        "train_pairs": len(trained_on),
        "steps": len(metrics),
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
        "counters": counters,
        "skipped": skipped,
        "held_out": held_out_metrics(settings, held_out, _logprobs(context, model, params, held_out)),
    }


def _usable(settings, pairs) -> list[dict]:
    """Pairs with the chosen response first, `probability` that it is the better one. Hard labels need a choice."""
    return [_chosen_first(pair) for pair in pairs if settings.soft_labels or not _is_tie(pair)]


def _is_tie(pair) -> bool:
    return abs(pair["probability"] - 0.5) < TIE


def _chosen_first(pair) -> dict:
    prompt, a, b = pair["tokens"]
    if pair["probability"] >= 0.5:
        return pair | {"chosen": "a"}
    return pair | {"chosen": "b", "tokens": (prompt, b, a), "probability": 1 - pair["probability"]}


def _keep_reference(context, folder, model, trained_on, held_out) -> None:
    """Give every pair the reference's log-probs, `reference` (2,), from the shards on disk; make those that miss."""
    pairs, per_shard = trained_on + held_out, context.config.dpo.rows_per_shard
    count = -(-len(pairs) // per_shard)
    missing = sorted(set(range(count)) - folder.finished_shards("reference"))
    left = sum(len(pairs[index * per_shard : (index + 1) * per_shard]) for index in missing)
    with context.progress.task("dpo: reference", len(pairs), "pairs", done=len(pairs) - left) as task:
        for index in missing:
            places = range(len(pairs))[index * per_shard : (index + 1) * per_shard]
            logprobs = _logprobs(context, model, model.params, [pairs[place] for place in places])
            rows = [
                {
                    **{key: pairs[place][key] for key in ("id", "prompt_id", "chosen", "probability")},
                    "held_out": place >= len(trained_on),
                    "tokens": [len(response) for response in pairs[place]["tokens"][1:]],
                    "logprobs": [float(x) for x in of_pair],
                    "provenance": context.provenance(STAGE, model),
                }
                for place, of_pair in zip(places, logprobs, strict=True)
            ]  # fmt: skip
            folder.write_shard(index, count, rows, "reference")
            task.advance(len(rows))
    for pair, row in zip(pairs, folder.read_shards("reference"), strict=True):
        pair["reference"] = np.asarray(row["logprobs"], np.float32)


def _logprobs(context, model, params, pairs) -> np.ndarray:
    """Summed log-probs of the chosen and the rejected response of every pair, `[pairs, 2]`."""
    return score_pairs(context, model.config, params, [pair["tokens"] for pair in pairs])


def _as_learnt(settings, pairs, logprobs) -> np.ndarray:
    """Summed log-probs `[pairs, 2]` as the loss takes them: means per token for ipo."""
    lengths = np.asarray([[len(response) for response in pair["tokens"][1:]] for pair in pairs], np.float32)
    return logprobs / np.maximum(lengths, 1) if settings.kind == "ipo" else logprobs


def _smoothing(settings, pairs):
    """The share of labels that are wrong: one number, or with soft labels one of each pair."""
    if not settings.soft_labels:
        return settings.smoothing
    return np.asarray([1 - pair["probability"] for pair in pairs], np.float32)


def objective(config, model):
    """What the train step minimises, for a run's `Config` and a ModelConfig."""
    shape, settings = config.model, config.dpo
    return dpo_objective(
        model, shape.compute_dtype, shape.remat, beta=settings.beta, kind=settings.kind, smoothing=settings.smoothing,
        nll_coef=settings.nll_coef, attention=shape.attention,
    )  # fmt: skip


def _train(context, folder, model, pairs, held_out):
    settings = context.config.dpo
    longest = max(sum(map(len, pair["tokens"])) for pair in pairs)
    length = min(settings.max_length, -(-longest // 32) * 32)
    texts = pair_rows([pair["tokens"] for pair in pairs], length)
    source = Rows({
        **{name: texts[name] for name in ("tokens", "positions", "segments")},
        "ref_logprobs": _as_learnt(settings, pairs, np.stack([pair["reference"] for pair in pairs])),
        "real": np.ones(len(pairs), np.int32),
        **({"smoothing": _smoothing(settings, pairs)} if settings.soft_labels else {}),
    })

    def quality(params, lines):
        if not held_out:
            return -math.inf
        return -float(np.mean(_losses(settings, held_out, _logprobs(context, model, params, held_out))))

    loss = objective(context.config, model.config)
    flops = training_flops(model.config, 1, source.mean_length, frozen=context.config.lora.rank > 0)
    return train(context, folder, settings, loss, model.params, source, _report, flops, quality)


def _report(metrics) -> dict:
    return {("pairs" if name == "weight" else name): value for name, value in metrics.items()}


def _losses(settings, pairs, logprobs) -> np.ndarray:
    """The loss of every pair, from the policy's summed log-probs `[pairs, 2]`."""
    arrays = [_as_learnt(settings, pairs, x) for x in (logprobs, _reference(pairs))]
    columns = [column for array in arrays for column in array.T]
    terms = np.asarray(dpo.terms(*columns, settings.beta, settings.kind, _smoothing(settings, pairs)))
    return terms + settings.nll_coef * _nll(pairs, logprobs)


def _nll(pairs, logprobs) -> np.ndarray:
    """The negative log-prob of a token of each chosen response."""
    return -logprobs[:, 0] / np.maximum([len(pair["tokens"][1]) for pair in pairs], 1)


def _reference(pairs) -> np.ndarray:
    return np.reshape([pair["reference"] for pair in pairs], (-1, 2)).astype(np.float32)


def held_out_metrics(settings, pairs, logprobs) -> dict:
    """What the policy makes of pairs that it was not trained on, from its summed log-probs `[pairs, 2]`.

    Rewards are beta times the log-ratio to the reference, and a pair counts as right where that of the chosen response
    is higher; ties have no choice and are left out of the accuracies. Two rules that know nothing, "shorter wins" and
    "longer wins", stand beside it. `kl` is the mean log-prob of a response under the reference minus that under the
    policy: where the reference wrote the responses, as plain draws, an unbiased estimate of the KL divergence of the
    policy from it, KL(reference || policy), in nats a response.
    """
    reference = _reference(pairs)
    rewards = settings.beta * (_as_learnt(settings, pairs, logprobs) - _as_learnt(settings, pairs, reference))
    margins = rewards[:, 0] - rewards[:, 1]
    decided = np.asarray([not _is_tie(pair) for pair in pairs], bool)
    longer = np.asarray([len(pair["tokens"][1]) - len(pair["tokens"][2]) for pair in pairs])
    return {
        "n": len(pairs),
        "ties": int((~decided).sum()),
        "loss": statistics.mean_interval(_losses(settings, pairs, logprobs)),
        "accuracy": _share(margins > 0, decided, pairs),
        "margin": statistics.mean_interval(margins),
        "chosen_reward": statistics.mean_interval(rewards[:, 0]),
        "rejected_reward": statistics.mean_interval(rewards[:, 1]),
        "nll": statistics.mean_interval(_nll(pairs, logprobs)),
        "nll_change": statistics.mean_interval(_nll(pairs, logprobs) - _nll(pairs, reference)),
        "kl": statistics.mean_interval((reference - logprobs).mean(axis=1)),
        "longer_wins_accuracy": _share(longer > 0, decided & (longer != 0), pairs),
        "shorter_wins_accuracy": _share(longer < 0, decided & (longer != 0), pairs),
    }


def _share(right, counted, pairs) -> dict:
    """The share of the counted pairs that are right; those of a prompt are not independent."""
    prompts = [pair["prompt_id"] for pair, counts in zip(pairs, counted, strict=True) if counts]
    return statistics.grouped_share(right[counted], prompts)
