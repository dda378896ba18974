"""AI labels (Bai et al. 2022, section 4.1): two responses of the SL-CAI model, compared under one drawn principle.

A label is the normalised probability of the options (A) and (B) as the judge's next token. Small judges favour a
place over a text (Lee et al. 2023, arXiv 2309.00267, section 2.1), so both orders are scored and averaged. A pair that
the judge's context does not hold is skipped by name: every row has a label.
"""

import math

import numpy as np

from cai_jax.chat import encode_chat
from cai_jax.errors import UserError
from cai_jax.models.pretrained import check_model
from cai_jax.prompts import preference_preamble, preference_request, resolve_options
from cai_jax.sampler import Generate, Score
from cai_jax.stages.critique_revision import count_flags, draw_principle, left_out, present
from cai_jax.stages.rows import make_rows, messages_of, sample_dict, unfinished, usable_prompts, watch

STAGE = "preferences"
PROMPTS = ("red_team", "helpful")
TIE = 1e-3  # a probability this near to one half says nothing


def run(context, folder) -> dict:
    """Sample the pairs, label them, write the rows; returns the summary of the stage."""
    judge = context.config.preferences.judge
    _require_room(context, check_model(judge, "policy") if judge else context.base)
    pairs, skipped = _sample_pairs(context, folder)
    rows, unlabelled = _label(context, folder, pairs)
    return _summary(rows, skipped, unlabelled)


def _require_room(context, judge) -> None:
    """Refuse a judge whose worked examples leave no room for a pair, before pairs are sampled."""
    limit = min(context.config.sampler.max_length, judge.config.max_position)
    options = resolve_options(judge.tokenizer)
    preamble = preference_preamble(context.constitution, options)
    principle = min(context.constitution.principles, key=lambda p: len(p.preference_question))
    prompts = [prompt for name in PROMPTS for prompt in context.prompts[name].rows]
    for prompt in prompts:
        request = [*preamble, *preference_request(messages_of(prompt), principle, "", "", options)]
        if len(encode_chat(judge.tokenizer, request, continue_final=True)) < limit:
            return
    raise _no_room(limit, judge)


def _no_room(limit: int, judge) -> UserError:
    return UserError(
        f"preferences: not one pair fits the judge within sampler.max_length={limit}; raise it (the judge holds "
        f"{judge.config.max_position}) or shorten the constitution's few-shots"
    )


def _sample_pairs(context, folder):
    """Rows with two responses each, by the SL-CAI model."""
    settings = context.config.preferences
    policy = context.load_from("sft", settings.policy)
    sampler = context.sampler(policy)
    prompts, skipped = [], []
    for name in PROMPTS:
        usable, unusable = usable_prompts(sampler, context.prompts[name], settings.response.max_new_tokens)
        prompts += [(prompt, n) for prompt in usable for n in range(settings.pairs_per_prompt)]
        skipped += unusable

    def answer_twice(item):
        prompt, n = item
        sides = []
        for side in "ab":
            seed = context.row_seed(STAGE, prompt.id, n, side)
            sides.append((yield Generate(messages_of(prompt), settings.response, seed)))
        return {
            "id": prompt.id if n == 0 else f"{prompt.id}/{n}",
            "prompt_id": prompt.id,
            "category": prompt.category,
            "messages": messages_of(prompt),
            "response_a": sample_dict(sides[0]),
            "response_b": sample_dict(sides[1]),
            "provenance": context.provenance(STAGE, policy),
        }

    left = unfinished(folder, "pairs", len(prompts), settings.rows_per_shard)
    with context.progress.task("preferences: responses", len(prompts), "pairs", done=len(prompts) - left) as task:
        watch(sampler, task)
        return make_rows(folder, "pairs", prompts, settings.rows_per_shard, lambda: sampler, answer_twice), skipped


def _label(context, folder, pairs):
    """The labelled rows, and `{"id", "reason"}` of the pairs that are too long to judge."""
    settings = context.config.preferences
    judge = context.load(settings.judge) if settings.judge else context.base
    sampler = context.sampler(judge)
    options = resolve_options(judge.tokenizer)
    preamble = preference_preamble(context.constitution, options)
    left = unfinished(folder, "rows", len(pairs), settings.rows_per_shard)
    with context.progress.task("preferences: labels", len(pairs), "pairs", done=len(pairs) - left) as task:
        watch(sampler, task)
        rows = make_rows(
            folder, "rows", pairs, settings.rows_per_shard, lambda: sampler,
            lambda pair: _judge(context, sampler, options, preamble, pair, judge), preamble, finish=present,
        )  # fmt: skip
    if not rows:
        raise _no_room(sampler.max_length, judge)
    return rows, left_out([pair["id"] for pair in pairs], rows, "too long to judge")


def _judge(context, sampler, options, preamble, pair, judge):
    """The row of one pair with its label; None for a pair that does not fit the judge's context in both orders."""
    principle = draw_principle(context, STAGE, pair["id"])
    a, b = pair["response_a"]["text"], pair["response_b"]["text"]
    requests = [preference_request(pair["messages"], principle, *texts, options) for texts in ((a, b), (b, a))]
    if not all(sampler.fits(request, 1, preamble) for request in requests):
        return None
    orders = []
    for request in requests:
        found = yield Score([*preamble, *request], [[token] for token in options.ids])
        orders.append([float(logprob) for (logprob,) in found])
    return _row(pair, principle, orders, judge)


def _row(pair, principle, orders, judge) -> dict:
    label = label_from_logprobs(*orders)
    flags = {
        "response_truncated": pair["response_a"]["truncated"] or pair["response_b"]["truncated"],
        "response_empty": not pair["response_a"]["text"].strip() or not pair["response_b"]["text"].strip(),
        "identical_responses": pair["response_a"]["text"] == pair["response_b"]["text"],
        "inconsistent": not label["consistent"],
        "tie": label["tie"],
    }
    return {
        **pair,
        "principle": principle.id,
        "principle_hash": principle.hash,
        **label,
        "judge_hash": judge.hash,
        "flags": flags,
    }


def label_from_logprobs(logprobs_ab, logprobs_ba) -> dict:
    """A label from the log-probs of the options [A, B] in both orders; `ab` shows response_a as (A).

    Each order is normalised over the two options; `probability_a` is the mean of both orders.
    """
    in_ab = _sigmoid(logprobs_ab[0] - logprobs_ab[1])
    in_ba = _sigmoid(logprobs_ba[1] - logprobs_ba[0])
    probability = (in_ab + in_ba) / 2
    return {
        "logprobs_ab": [float(x) for x in logprobs_ab],
        "logprobs_ba": [float(x) for x in logprobs_ba],
        "probability_a": probability,
        "probability_a_ab": in_ab,
        "probability_a_ba": in_ba,
        "consistent": (in_ab > 0.5) == (in_ba > 0.5),
        "tie": abs(probability - 0.5) < TIE,
    }


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _summary(rows, skipped, unlabelled) -> dict:
    first_place = [p > 0.5 for row in rows for p in (row["probability_a_ab"], 1 - row["probability_a_ba"])]
    confidence = [row["probability_a"] for row in rows]
    counts, edges = np.histogram(confidence, bins=10, range=(0, 1))
    return {
        "pairs": len(rows) + len(unlabelled),
        "labelled": len(rows),
        "skipped": skipped + unlabelled,
        "counters": count_flags(rows) | {"too_long_to_judge": len(unlabelled)},
        "consistent_share": float(np.mean([row["consistent"] for row in rows])),
        "first_position_share": float(np.mean(first_place)),
        "confidence_histogram": {"edges": [round(float(x), 2) for x in edges], "counts": counts.tolist()},
    }
