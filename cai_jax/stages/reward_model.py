"""The reward model: Bradley-Terry with the AI's probability as target (Bai et al. 2022, section 4.1)."""

import numpy as np

from cai_jax import statistics
from cai_jax.chat import completion_ids, encode_chat, encode_text, turn_end_id
from cai_jax.errors import UserError
from cai_jax.models.flops import training_flops
from cai_jax.objectives import pairwise
from cai_jax.objectives.model_losses import reward_objective
from cai_jax.provenance import content_hash
from cai_jax.stages.preferences import TIE
from cai_jax.stages.scoring import score_texts
from cai_jax.stages.training import train
from cai_jax.training.batches import Rows, pair_rows

STAGE = "reward_model"


def run(context, folder) -> dict:
    """Train on the labels, evaluate on held-out prompts, export `model/`; returns the summary of the stage."""
    settings = context.config.reward_model
    model = context.load_from("sft", settings.start, "reward", new_head=True, seed=context.config.seed)
    rows = context.folder("preferences").read_shards()
    pairs, counters, skipped = _pairs(model.tokenizer, rows, settings.max_length)
    train, held_out = split_by_prompt(pairs, settings.held_out)
    if not train:
        raise UserError(
            f"reward_model: {len(pairs)} of {len(rows)} pairs can be used, too few to train on and hold out some; "
            "add prompts, or raise reward_model.max_length"
        )
    params, metrics = _train(context, folder, model, train, held_out)
    context.export(folder, model, params, "reward")
    context.progress.log("reward_model: scoring the held-out pairs")
    scores = _scores(context, model, params, held_out)
    for pair, pair_scores in zip(held_out, scores, strict=True):
        pair["scores"] = pair_scores
    return {
        "train_pairs": len(train),
        "steps": len(metrics),
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
        "score_mean": float(np.mean(scores)),
        "score_std": float(np.std(scores)),
        "counters": counters,
        "skipped": skipped,
        "held_out": held_out_metrics(held_out),
    }


def _pairs(tokenizer, rows, max_length):
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
            pairs.append(
                {"prompt_id": row["prompt_id"], "tokens": (prompt, *responses), "probability": row["probability_a"]}
            )
    return pairs, counters, skipped


def split_by_prompt(pairs, share: float):
    """Train and held-out pairs; all pairs of a prompt fall on one side, the held-out ones in the order of a hash."""
    prompts = sorted({pair["prompt_id"] for pair in pairs}, key=lambda prompt_id: content_hash([STAGE, prompt_id]))
    held = set(prompts[: max(1, round(share * len(prompts)))])
    return [p for p in pairs if p["prompt_id"] not in held], [p for p in pairs if p["prompt_id"] in held]


def _scores(context, model, params, pairs) -> np.ndarray:
    """The rewards of both responses of every pair, `[pairs, 2]`."""
    texts = [pair["tokens"][0] + response for pair in pairs for response in pair["tokens"][1:]]
    return np.reshape(score_texts(context, model.config, params, texts), (-1, 2))


def _loss_of(scores, pairs) -> float:
    """The mean Bradley-Terry loss of pairs."""
    probabilities = np.asarray([pair["probability"] for pair in pairs], np.float32)
    return float(pairwise.bradley_terry(scores[:, 0], scores[:, 1], probabilities))


def objective(config, model):
    """What the train step minimises, for a run's `Config` and a ModelConfig."""
    shape, center = config.model, config.reward_model.center
    return reward_objective(model, shape.compute_dtype, shape.remat, center, TIE, shape.attention)


def _train(context, folder, model, pairs, held_out):
    settings = context.config.reward_model
    longest = max(sum(map(len, pair["tokens"])) for pair in pairs)
    length = min(settings.max_length, -(-longest // 32) * 32)
    source = Rows({
        **pair_rows([pair["tokens"] for pair in pairs], length),
        "probability": np.asarray([pair["probability"] for pair in pairs], np.float32),
        "real": np.ones(len(pairs), np.int32),
    })
    loss = objective(context.config, model.config)

    def quality(params, lines):
        return -_loss_of(_scores(context, model, params, held_out), held_out)

    adapted = context.config.lora.rank > 0
    flops = training_flops(model.config, 1, source.mean_length, unembedded=0, frozen=adapted)
    return train(
        context, folder, settings, loss, model.params, source, _report, flops, quality, donate=True
    )


def _report(metrics) -> dict:
    metrics = {("pairs" if name == "weight" else name): value for name, value in metrics.items()}
    return metrics | {"accuracy": metrics["accuracy"] / metrics["decided_share"]}  # nan, so null, where all are ties


def held_out_metrics(pairs) -> dict:
    """Accuracy, calibration and correlation with length on pairs that were not trained on.

    A pair counts as right when the response with the higher score is the one with probability above 1/2. Two
    rules that know nothing, "shorter wins" and "longer wins", stand beside it. A label within TIE of 1/2 decides
    nothing: such pairs are counted as `ties` and left out of these three.
    """
    predicted = np.asarray([1 / (1 + np.exp(pair["scores"][1] - pair["scores"][0])) for pair in pairs])
    observed = np.asarray([pair["probability"] for pair in pairs])
    longer = np.asarray([len(pair["tokens"][1]) - len(pair["tokens"][2]) for pair in pairs])
    first_better, decided = observed > 0.5, np.abs(observed - 0.5) >= TIE
    error, bins = statistics.calibration(predicted, observed)
    lengths = [len(response) for pair in pairs for response in pair["tokens"][1:]]
    scores = [score for pair in pairs for score in pair["scores"]]
    return {
        "n": len(pairs),
        "ties": int((~decided).sum()),
        "accuracy": _agreement(predicted > 0.5, first_better, decided),
        "calibration_error": error,
        "calibration_bins": bins,
        "length_correlation": statistics.correlation(lengths, scores),
        "longer_wins_accuracy": _agreement(longer > 0, first_better, decided & (longer != 0)),
        "shorter_wins_accuracy": _agreement(longer < 0, first_better, decided & (longer != 0)),
    }


def _agreement(chosen, first_better, counted) -> dict:
    """How often a choice of the first response is the label's, over the pairs that count."""
    return statistics.wilson_interval(int((chosen == first_better)[counted].sum()), int(counted.sum()))
