"""AI labels (Bai et al. 2022, section 4.1): responses of the SL-CAI model, two by two compared under drawn principles.

With more than two responses a prompt each two of them are a pair (Ouyang et al. 2022, arXiv 2203.02155, section 3.5).
Contrasted ones are sampled with the constitution's worked answers as few-shot context, by turns harmless and helpful
ones, so that they differ in what is judged; they are labelled like all others (RLCD-Rescore, Yang et al. 2024, arXiv
2307.12950).

Labelers give log-odds; those of several are averaged. A pair on which none has an opinion is skipped by name: every row
has a label. Filters then say which rows are fit to train on; the others stay, with the name of the filter.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from cai_jax import filters
from cai_jax.constitution import AIMS, Principle
from cai_jax.conversation_sets import draw
from cai_jax.endpoint import EXTERNAL, summary_of
from cai_jax.errors import UserError
from cai_jax.labelers.judge import TOO_LONG, Judge
from cai_jax.labelers.opinion import Pair
from cai_jax.labelers.vote import agreement
from cai_jax.models.pretrained import check_model
from cai_jax.prompts import worked_answers
from cai_jax.sampler import several
from cai_jax.stages import labelling
from cai_jax.stages.critique_revision import count_flags
from cai_jax.stages.rows import make_rows, mean, messages_of, sample_dict, unfinished, usable_prompts, watch
from cai_jax.statistics import grouped_share, wilson_interval
from cai_jax.text_metrics import classify_response

STAGE = "preferences"
AIM_OF = {"red_team": "harmless", "helpful": "helpful"}  # of the prompt sets
PROMPTS = tuple(AIM_OF)


def run(context, folder) -> dict:
    """Sample the pairs, label and filter them, write the rows; returns the summary of the stage."""
    judge = context.config.preferences.judge
    _require_room(context, check_model(judge, "policy") if judge else context.base)
    pairs, skipped = _sample_pairs(context, folder)
    labelers, opinions, rows = _label(context, folder, pairs)
    _write(context, folder, pairs, rows)
    return _summary(context, pairs, labelers, opinions, rows, skipped)


def _require_room(context, judge) -> None:
    """Refuse a judge whose worked examples leave a labeler no room for a pair, before pairs are sampled."""
    config = context.config
    limit = min(config.sampler.max_length, judge.config.max_position)
    longest_first = sorted(context.constitution.principles, key=lambda p: len(p.preference_question), reverse=True)
    of_aim = {principle.aim: principle for principle in longest_first}
    prompts = [messages_of(prompt) for name in PROMPTS for prompt in context.prompts[name].rows]
    for asked in labelling.labelers_of(context, Judge(judge.tokenizer, "", limit, config.preferences.guard)):
        for principle in of_aim.values():
            if not any(labelling.has_room(asked, messages, [principle]) for messages in prompts):
                raise _no_room(asked.name, limit, judge)


def _no_room(name: str, limit: int, judge) -> UserError:
    return UserError(
        f"preferences: not one pair fits the judge within sampler.max_length={limit} for the labeler {name}; raise it "
        f"(the judge holds {judge.config.max_position}) or shorten the constitution's few-shots"
    )


def _sample_pairs(context, folder):
    """Rows with two responses each, by the SL-CAI model; a shard holds the pairs of `rows_per_shard` prompts."""
    settings = context.config.preferences
    policy = context.load_from("sft", settings.policy)
    sampler = context.sampler(policy)
    contexts, prompts, skipped = _contexts(context), [], []
    for name in PROMPTS:
        usable, unusable = usable_prompts(
            sampler, context.prompts[name], settings.response.max_new_tokens, before=[turns for _, turns in contexts]
        )
        drawn = draw([prompt.id for prompt in usable], settings.share, context.config.seed, name, STAGE)
        prompts += [prompt for prompt in usable if prompt.id in drawn]
        skipped += unusable

    def answer(prompt):
        # Judges are partial to the first response, so which context comes first is drawn.
        first = context.row_seed(STAGE, prompt.id, "first")
        seeds = [context.row_seed(STAGE, prompt.id, n) for n in range(settings.responses_per_prompt)]
        responses = {}
        for place, (aim, turns) in enumerate(contexts):
            mine = range((place - first) % len(contexts), len(seeds), len(contexts))
            conversation = [*turns, *messages_of(prompt)]
            samples = yield from several(conversation, settings.response, [seeds[n] for n in mine])
            responses |= {n: sample_dict(x) | ({"aim": aim} if aim else {}) for n, x in zip(mine, samples, strict=True)}
        return prompt, [responses[n] for n in range(len(seeds))]

    def pairs_of(answered):
        return [
            _pair(context, policy, prompt, samples, sides)
            for prompt, samples in answered
            for sides in itertools.combinations(range(len(samples)), 2)
        ]

    left = unfinished(folder, "pairs", len(prompts), settings.rows_per_shard)
    with context.progress.task("preferences: responses", len(prompts), "prompts", done=len(prompts) - left) as task:
        watch(sampler, task)
        pairs = make_rows(
            folder, "pairs", prompts, settings.rows_per_shard, lambda: sampler, answer,
            [turns for _, turns in contexts if turns], pairs_of
        )
    return pairs, skipped


def _contexts(context) -> list[tuple[str, list[dict]]]:
    """The turns before the prompts that responses are sampled to, with their aim: none, or worked answers of each."""
    if not context.config.preferences.contrasted:
        return [("", [])]
    constitution = context.constitution
    return [(aim, worked_answers(constitution, constitution.matching("", aim))) for aim in AIMS]


def _matching(context, category: str, unsafe: bool) -> Sequence[Principle]:
    """What the principles of a pair are drawn from: all, or those that match the prompt and its set."""
    if context.config.preferences.matched:
        return context.constitution.matching(category, "harmless" if unsafe else "helpful")
    return context.constitution.principles


def _pair(context, policy, prompt, samples, sides) -> dict:
    """The row of two of a prompt's responses, by their places in the order of sampling."""
    first, second = (samples[side] for side in sides)
    return {
        "id": prompt.id if len(samples) == 2 else f"{prompt.id}/{sides[0]}-{sides[1]}",
        "prompt_id": prompt.id,
        "category": prompt.category,
        "messages": messages_of(prompt),
        "response_a": first,
        "response_b": second,
        "provenance": context.provenance(STAGE, policy),
    }


def _label(context, folder, pairs):
    """The labelers, their opinions on all pairs, `{name: [opinion]}`, and a row a pair, None where it has no label."""
    settings = context.config.preferences
    judge = context.load(settings.judge) if settings.judge else context.base
    limit = min(context.config.sampler.max_length, judge.config.max_position)
    asked_of = Judge(judge.tokenizer, judge.hash, limit, settings.guard)
    labelers = labelling.labelers_of(context, asked_of)
    asked = [Pair(row["id"], row["messages"], row["response_a"]["text"], row["response_b"]["text"]) for row in pairs]
    unsafe = {prompt.id for prompt in context.prompts["red_team"].rows}
    among = [_matching(context, row["category"], row["prompt_id"] in unsafe) for row in pairs]
    principles = [
        labelling.principles_of(context, labelers, STAGE, pair.id, within)
        for pair, within in zip(asked, among, strict=True)
    ]
    driver = labelling.driver_of(context, judge)
    opinions = {each.name: labelling.opinions(context, folder, each, asked, principles, driver) for each in labelers}
    for name, found in opinions.items():
        if all(opinion.failure == TOO_LONG for opinion in found):
            raise _no_room(name, limit, judge)
    temperatures = [labelling.temperature_of(context, each.name) for each in labelers]
    rows = []
    for pair, under, *given in zip(pairs, principles, *opinions.values(), strict=True):
        columns = labelling.label(labelers, given, temperatures, settings.orders == "both")
        rows.append(columns and _row(pair, under, columns, judge))
    _filter(settings, rows)
    return labelers, opinions, rows


def _row(pair, principles, columns, judge) -> dict:
    flags = {
        "response_truncated": pair["response_a"]["truncated"] or pair["response_b"]["truncated"],
        "response_empty": not pair["response_a"]["text"].strip() or not pair["response_b"]["text"].strip(),
        "identical_responses": pair["response_a"]["text"] == pair["response_b"]["text"],
        "inconsistent": not columns.get("consistent", True),
        "tie": columns["tie"],
    }
    names = labelling.principle_columns(principles)
    return {**pair, **names, **columns, "judge_hash": judge.hash, "flags": flags}


def _filter(settings, rows) -> None:
    """Write into every row whether it is kept for training, and what drops it."""
    labelled = [row for row in rows if row]
    if not labelled:
        raise UserError(f"preferences: no labeler of {', '.join(settings.labelers)} has an opinion on any pair; "
                        "see the opinions in the stage's folder for why")
    for row, reason in zip(labelled, filters.dropped_by(labelled, settings.filters), strict=True):
        row |= {"kept": not reason, "dropped_by": reason}


def _write(context, folder, pairs, rows) -> None:
    """The rows as shards; those of a shard are the labelled ones of its pairs."""
    per_shard = context.config.preferences.rows_per_shard
    count = max(1, -(-len(pairs) // per_shard))
    for index in set(range(count)) - folder.finished_shards():
        there = rows[index * per_shard : (index + 1) * per_shard]
        folder.write_shard(index, count, [row for row in there if row])


def _summary(context, pairs, labelers, opinions, rows, skipped) -> dict:
    settings = context.config.preferences
    labelled = [row for row in rows if row]
    reasons = [row["dropped_by"] for row in labelled]
    found = {
        each.name: _of_labeler(each, opinions[each.name], labelling.temperature_of(context, each.name))
        for each in labelers
    }
    counters = count_flags(labelled) | {"unlabelled": len(rows) - len(labelled)}
    for name, of in found.items():
        counters |= {f"{name}/{what}": times for what, times in (of["failures"] | of["flags"]).items()}
    counters |= {f"dropped/{entry['filter']}": entry["dropped"] for entry in filters.counts(reasons, settings.filters)}
    side_by_side = any(of["consistent_share"] is not None for of in found.values())
    ordered = [row for row in labelled if side_by_side]
    orders = [(row["probability_a_ab"], row["probability_a_ba"]) for row in ordered]
    bins, edges = np.histogram([row["probability_a"] for row in labelled], bins=10, range=(0, 1))
    summary = {
        "pairs": len(pairs),
        "labelled": len(labelled),
        "kept": reasons.count(""),
        "kept_share": reasons.count("") / len(labelled),
        "skipped": skipped + _unlabelled(pairs, rows, opinions),
        "counters": counters,
        "labelers": found,
        "declining": _choices(context, labelled, _declines),
        "agreement": agreement({name: [opinion.logit for opinion in of] for name, of in opinions.items()}),
        "filters": filters.counts(reasons, settings.filters),
        "consistent_share": mean(row["consistent"] for row in ordered),
        "first_position_share": mean(first for ab, ba in orders for first in (ab > 0.5, ba < 0.5)),
        "confidence_histogram": {"edges": [round(float(x), 2) for x in edges], "counts": bins.tolist()},
    }
    if settings.contrasted:
        summary["contrasted"] = _choices(context, labelled, _of_own_aim)
    if EXTERNAL in opinions:
        usage = [opinion.detail["usage"] for opinion in opinions[EXTERNAL]]
        failures = [opinion.failure for opinion in opinions[EXTERNAL]]
        summary["endpoint"] = summary_of(context.config.endpoint, *zip(*usage, strict=True), failures)
    return summary


def _of_labeler(labeler, found, temperature) -> dict:
    """What one labeler said of all pairs; a share is None where it does not show responses side by side."""
    said = [opinion for opinion in found if opinion.logit is not None]
    orders = [opinion.detail["orders"] for opinion in said if len(opinion.detail.get("orders", ())) == 2]
    return {
        "hash": labeler.hash,
        "temperature": temperature,
        "opinions": len(said),
        "failures": dict(sorted(Counter(opinion.failure for opinion in found if opinion.failure).items())),
        "flags": dict(sorted(Counter(
            name for opinion in said for name, raised in opinion.detail.get("flags", {}).items() if raised).items())),
        "consistent_share": mean((ab > 0) == (ba > 0) for ab, ba in orders),
        "first_position_share": mean(first for ab, ba in orders for first in (ab > 0, ba < 0)),
    }


def _choices(context, labelled, marks: Callable[[dict, str], bool]) -> dict:
    """By prompt set: of the pairs of which one response is marked and one is not, how many labels are for the former.

    `marks(response, name)` says so of a response to a prompt of the set.
    """
    found = {}
    for name in PROMPTS:
        ids = {prompt.id for prompt in context.prompts[name].rows}
        choices, prompts = [], []
        for row in (row for row in labelled if row["prompt_id"] in ids):
            marked = [marks(row[side], name) for side in ("response_a", "response_b")]
            if marked[0] != marked[1] and not row["tie"]:
                choices.append(marked[0] == (row["probability_a"] > 0.5))
                prompts.append(row["prompt_id"])
        found[name] = grouped_share(choices, prompts) if choices else wilson_interval(0, 0)
    return found


def _declines(response: dict, name: str) -> bool:
    # Labels should be for it where prompts are unsafe and not where they are safe; else they teach too little refusal
    # or too much.
    return classify_response(response["text"]) == "refusal"


def _of_own_aim(response: dict, name: str) -> bool:
    # RLCD takes this to be the better one without asking.
    return response.get("aim") == AIM_OF[name]


def _unlabelled(pairs, rows, opinions) -> list[dict]:
    """`{"id", "reason"}` of the pairs on which no labeler has an opinion."""
    left = [place for place, row in enumerate(rows) if row is None]
    failures = [sorted({found[place].failure for found in opinions.values()}) for place in left]
    return [
        {"id": pairs[place]["id"], "reason": "no opinion: " + ", ".join(found)}
        for place, found in zip(left, failures, strict=True)
    ]
