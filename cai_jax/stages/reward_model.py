"""The reward model: Bradley-Terry with the AI's probability as target (Bai et al. 2022, section 4.1).

With several heads each starts elsewhere and counts each pair as often as a sample of its own holds it (bootstrap), so
that the heads part where the labels say little (Lakshminarayanan et al. 2017, arXiv 1612.01474; Coste et al. 2023,
arXiv 2310.02743).
"""

import numpy as np

from cai_jax.chat import completion_ids, encode_chat, encode_text, turn_end_id
from cai_jax.errors import UserError
from cai_jax.filters import TIE
from cai_jax.models.flops import training_flops
from cai_jax.objectives import pairwise
from cai_jax.objectives.model_losses import reward_objective
from cai_jax.provenance import content_hash
from cai_jax.report import verdicts
from cai_jax.stages.held_out import held_out_metrics
from cai_jax.stages.scoring import score_heads
from cai_jax.stages.training import train
from cai_jax.text_metrics import classify_response
from cai_jax.training.batches import Rows, pair_rows

STAGE = "reward_model"


def run(context, folder) -> dict:
    """Train on the labels, evaluate on held-out prompts, export `model/`; returns the summary of the stage."""
    settings = context.config.reward_model
    head = {"new_head": True, "seed": context.config.seed, "heads": settings.heads}
    model = context.load_from("sft", settings.start, "reward", **head)
    rows = [row for row in context.folder("preferences").read_shards() if row["kept"]]
    pairs, counters, skipped = token_pairs(model.tokenizer, rows, settings.max_length)
    train, held_out = split_by_prompt(pairs, settings.held_out)
    if not train:
        raise UserError(
            f"reward_model: {len(pairs)} of {len(rows)} kept pairs can be used, too few to train on and hold out some; "
            "add prompts, loosen preferences.filters, or raise reward_model.max_length"
        )
    params, metrics = _train(context, folder, model, train, held_out)
    context.export(folder, model, params, "reward")
    context.progress.log("reward_model: scoring the held-out pairs")
    scores = _scores(context, model, params, held_out)
    for pair, pair_scores in zip(held_out, scores, strict=True):
        pair["scores"] = pair_scores
    measured = held_out_metrics(held_out, context.config.seed)
    verdict = verdicts.reward_model(measured) or "Every held-out pair is a tie: nothing is known of the reward model."
    context.progress.log(f"reward_model: {verdict}")
    return {
        "train_pairs": len(train),
        "steps": len(metrics),
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
        "heads": settings.heads,
        "score_mean": float(np.mean(scores)),
        "score_std": float(np.std(scores.mean(axis=-1))),
        "counters": counters,
        "skipped": skipped,
        "held_out": measured,
        "verdict": verdict,
    }


def token_pairs(tokenizer, rows, max_length):
    """Labelled pairs as token ids, and what was left out by name."""
    counters = {"identical_responses": 0, "too_long": 0}
    end = turn_end_id(tokenizer)
    pairs, skipped = [], []
    for row in rows:
        prompt = encode_chat(tokenizer, row["messages"], add_generation_prompt=True)
        responses = []
        for side in ("response_a", "response_b"):
            text, truncated = row[side]["text"], row[side]["truncated"]
            responses.append(encode_text(tokenizer, text) if truncated else completion_ids(tokenizer, text, end))
        reason = None
        if row["flags"]["identical_responses"]:
            reason = "identical_responses"
        elif len(prompt) + sum(map(len, responses)) > max_length:
            reason = "too_long"
        if reason:
            counters[reason] += 1
            skipped.append({"id": row["id"], "reason": reason.replace("_", " ")})
        else:
            texts = row["response_a"]["text"], row["response_b"]["text"]
            pairs.append({
                **{key: row[key] for key in ("id", "prompt_id", "category")},
                "principles": row.get("principles") or [row["principle"]],
                "tokens": (prompt, *responses),
                "probability": row["probability_a"],
                "refusals": tuple(classify_response(text) == "refusal" for text in texts),
            })
    return pairs, counters, skipped


def split_by_prompt(pairs, share: float):
    """Train and held-out pairs; all pairs of a prompt fall on one side, the held-out ones in the order of a hash."""
    prompts = sorted({pair["prompt_id"] for pair in pairs}, key=lambda prompt_id: content_hash([STAGE, prompt_id]))
    held = set(prompts[: max(1, round(share * len(prompts)))])
    return [p for p in pairs if p["prompt_id"] not in held], [p for p in pairs if p["prompt_id"] in held]


def _scores(context, model, params, pairs) -> np.ndarray:
    """The scores of both responses of every pair by every head, `[pairs, 2, K]`."""
    texts = [pair["tokens"][0] + response for pair in pairs for response in pair["tokens"][1:]]
    return score_heads(context, model.config, params, texts).reshape(len(pairs), 2, -1)


def _loss_of(scores, pairs, margin: float) -> float:
    """The mean Bradley-Terry loss of pairs, of the mean of the heads."""
    probabilities = np.asarray([pair["probability"] for pair in pairs], np.float32)
    first, second = scores.mean(axis=-1).T
    return float(pairwise.bradley_terry(first, second, probabilities, pairwise.label_margin(probabilities, margin)))


def bootstrap_weights(context, pairs, heads: int) -> np.ndarray:
    """How often the sample of each head holds each pair, `[pairs, heads]` float32.

    Poisson numbers of mean 1, which is a bootstrap that needs no count of the pairs (Oza and Russell 2001, Online
    Bagging and Boosting). A number follows from the run's seed, the pair's id and the head alone.
    """
    draws = [
        [np.random.default_rng(context.row_seed(STAGE, pair["id"], "head", k)).poisson(1.0) for k in range(heads)]
        for pair in pairs
    ]
    return np.asarray(draws, np.float32)


def objective(config, model):
    """What the train step minimises, for a run's `Config` and a ModelConfig."""
    shape, settings = config.model, config.reward_model
    return reward_objective(
        model, shape.compute_dtype, shape.remat, settings.center, TIE, shape.attention, settings.margin
    )


def _train(context, folder, model, pairs, held_out):
    settings = context.config.reward_model
    longest = max(sum(map(len, pair["tokens"])) for pair in pairs)
    length = min(settings.max_length, -(-longest // 32) * 32)
    several = settings.heads > 1
    source = Rows({
        **pair_rows([pair["tokens"] for pair in pairs], length),
        "probability": np.asarray([pair["probability"] for pair in pairs], np.float32),
        "real": np.ones(len(pairs), np.int32),
        **({"head_weights": bootstrap_weights(context, pairs, settings.heads)} if several else {}),
    })
    loss = objective(context.config, model.config)

    def quality(params, lines):
        return -_loss_of(_scores(context, model, params, held_out), held_out, settings.margin)

    adapted = context.config.lora.rank > 0
    flops = training_flops(model.config, 1, source.mean_length, unembedded=0, frozen=adapted)
    return train(
        context, folder, settings, loss, model.params, source, _report, flops, quality, donate=True
    )


def _report(metrics) -> dict:
    metrics = {("pairs" if name == "weight" else name): value for name, value in metrics.items()}
    return metrics | {"accuracy": metrics["accuracy"] / metrics["decided_share"]}  # nan, so null, where all are ties
