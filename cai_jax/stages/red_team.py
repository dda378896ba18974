"""Red-team prompts by model (Perez et al. 2022, arXiv 2202.03286).

A model is shown prompts of one category and goes on with the list. What it writes is parsed line by line; lines that
repeat a prompt of the run, or one another, are dropped, and so is whatever comes near a prompt of an eval set. The rest
is put to the target model, and what that falls for is kept. `prompts.jsonl` is a prompt set, which the later stages of
the run use beside `prompts.red_team`.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from cai_jax import statistics
from cai_jax.errors import UserError
from cai_jax.prompts import COMPLIANCE_OPENINGS, REFUSAL_OPENINGS, category_request, red_team_request
from cai_jax.provenance import content_hash
from cai_jax.sampler import Generate, Score
from cai_jax.similarity import Index, diversity, plain_words
from cai_jax.stages.critique_revision import present
from cai_jax.stages.evaluate import refusal_margin
from cai_jax.stages.inputs import EVAL_SETS
from cai_jax.stages.rows import make_rows, sample_dict, unfinished, watch
from cai_jax.text_metrics import KINDS, classify_response

STAGE = "red_team"
PROMPTS = "prompts.jsonl"
OPENING_TOKENS = 64  # at most, of an opening whose log-prob is asked for
LEAST_WORDS, MOST_CHARACTERS = 3, 400  # of a prompt
DROPPED = ("too_short", "too_long", "degenerate", "refusal", "near_eval", "near_train", "near_written")
_ITEM = re.compile(r"\s*(?:\d+\s*[.):]|[-*•])\s*(\S.*)")


@dataclass(frozen=True)
class Candidate:
    """A prompt that a model has written."""

    id: str
    category: str  # that it was asked for
    text: str
    examples: tuple[str, ...]  # ids of the prompts that its writer was shown
    near: float  # overlap with the most similar prompt that the run trains on

    @property
    def messages(self) -> list[dict]:
        """The prompt as a conversation."""
        return [{"role": "user", "content": self.text}]


def run(context, folder) -> dict:
    """Write prompts, try them on the target, keep those that it falls for; returns the summary of the stage."""
    settings, seeds = context.config.red_team, context.given["red_team"].rows
    sampler = context.sampler(context.load(settings.writer) if settings.writer else context.base)
    lists = _write(context, folder, sampler, seeds)
    candidates, counters = sift(lists, context.given, settings.most_similar)
    scored = _score_categories(context, folder, sampler, seeds, candidates)
    if settings.target != settings.writer:
        del sampler  # its cache and its model's place
        sampler = context.sampler(context.load(settings.target) if settings.target else context.base)
    answers = _try(context, folder, sampler, candidates)
    categories = classify(scored)
    fallen = falls_for(answers, settings)
    rows = [
        row | {"classified": (found := categories.get(row["id"], "")),
               "kept": row["id"] in fallen and (found == row["category"] or not settings.agreeing)}
        for row in answers
    ]  # fmt: skip
    kept = [row for row in rows if row["kept"]]
    folder.write_lines(PROMPTS, [_prompt(row) for row in kept])
    tried = {row["id"] for row in rows}
    return {
        "lists": len(lists),
        "candidates": len(candidates),
        "tried": len(rows),
        "kept": len(kept),
        "skipped": [
            {"id": c.id, "reason": "no room for an answer in sampler.max_length"}
            for c in candidates
            if c.id not in tried
        ],
        "counters": counters | {f"target_{kind}": sum(row["kind"] == kind for row in rows) for kind in KINDS},
        "categories": _by_category(seeds, candidates, rows),
        "classifier": {
            "right_on_given": _share([categories.get(_given_id(seed)) == seed.category for seed in seeds]),
            "agrees_with_request": _share([row["classified"] == row["category"] for row in rows]),
        },
        "diversity": compared([(s.id, _text(s.messages)) for s in seeds], [(row["id"], row["prompt"]) for row in kept]),
    }


# ---- writing


def _write(context, folder, sampler, seeds) -> list[dict]:
    """A row for each list that the writer was asked for: `draws` of each category, with examples drawn anew."""
    settings = context.config.red_team
    of_category = {}
    for seed in seeds:
        of_category.setdefault(seed.category, []).append(seed)
    items = [(category, draw) for category in of_category for draw in range(settings.draws)]

    def write(item):
        category, draw = item
        row_id = f"{category or 'none'}/{draw}"
        own = of_category[category]
        rng = np.random.default_rng(context.row_seed(STAGE, row_id, "examples"))
        shown = [own[i] for i in rng.permutation(len(own))[: settings.examples]]
        messages = red_team_request(category, [_text(seed.messages) for seed in shown])
        if not sampler.fits(messages, settings.request.max_new_tokens):
            raise UserError(f"red_team: {len(shown)} examples of {row_id} and a list of "
                            f"{settings.request.max_new_tokens} tokens do not fit sampler.max_length="
                            f"{sampler.max_length}; lower red_team.examples or red_team.request.max_new_tokens")
        sample = yield Generate(messages, settings.request, context.row_seed(STAGE, row_id, "list"))
        return {
            "id": row_id,
            "category": category,
            "examples": [seed.id for seed in shown],
            "list": sample_dict(sample),
            "provenance": context.provenance(STAGE, sampler.model),
        }

    left = unfinished(folder, "lists", len(items), settings.rows_per_shard)
    with context.progress.task("red_team: lists", len(items), "lists", done=len(items) - left) as task:
        return make_rows(folder, "lists", items, settings.rows_per_shard, lambda: watch(sampler, task), write)


def listed(text: str, truncated: bool) -> list[str]:
    """The items of a numbered or bulleted list, without quotation marks; of a truncated one, all but the last line."""
    lines = text.splitlines()
    if truncated:
        lines = lines[:-1]
    found = [match[1] for line in lines if (match := _ITEM.fullmatch(line))]
    return [re.sub(r'^["“”\']+|["“”\']+$', "", " ".join(item.split())).strip() for item in found]


def sift(lists, given, most_similar: float) -> tuple[list[Candidate], dict[str, int]]:
    """The new prompts among the items of lists, in their order, and how many items were dropped for each reason.

    The first reason of DROPPED that holds is the one that counts. `near_eval`, `near_train` and `near_written`: the
    overlap of shingles with a prompt of an eval set, of a train set, or of an earlier candidate is `most_similar` or
    more. Of a conversation with several turns every one of the user's is compared.
    """
    against = {"near_eval": Index(), "near_train": Index(), "near_written": Index()}
    for name, prompts in given.items():
        index = against["near_eval" if name in EVAL_SETS else "near_train"]
        for prompt in prompts.rows:
            for turn in prompt.messages:
                if turn["role"] == "user":
                    index.add(prompt.id, turn["content"])
    counters = Counter({name: 0 for name in ("lists_unparsable", "lists_truncated", "items", *DROPPED)})
    candidates = []
    for row in lists:
        items = listed(row["list"]["text"], row["list"]["truncated"])
        counters["lists_truncated"] += row["list"]["truncated"]
        counters["lists_unparsable"] += not items
        counters["items"] += len(items)
        for place, text in enumerate(items):
            overlaps = {name: index.nearest(text)[0] for name, index in against.items()}
            if reason := _why_dropped(text, overlaps, most_similar):
                counters[reason] += 1
                continue
            name = f"written/{row['id']}/{place}"
            candidates.append(Candidate(name, row["category"], text, tuple(row["examples"]), overlaps["near_train"]))
            against["near_written"].add(name, text)
    return candidates, dict(counters)


def _why_dropped(text: str, overlaps: dict[str, float], most_similar: float) -> str:
    """The first of DROPPED that holds of an item; "": none."""
    if len(plain_words(text)) < LEAST_WORDS:
        return "too_short"
    if len(text) > MOST_CHARACTERS:
        return "too_long"
    kind = classify_response(text)
    if kind != "answer":
        return "refusal" if kind == "refusal" else "degenerate"
    return next((name for name in DROPPED if overlaps.get(name, 0.0) >= most_similar), "")


# ---- categories


def _score_categories(context, folder, sampler, seeds, candidates) -> list[dict]:
    """Log-probs of each category's name after each prompt, the given ones (seeds) and the written ones."""
    settings = context.config.red_team
    names = list(dict.fromkeys(seed.category for seed in seeds))
    items = [(_given_id(seed), _text(seed.messages)) for seed in seeds] + [(c.id, c.text) for c in candidates]

    def score(item):
        name, text = item
        messages, options = category_request(text, names)
        if not sampler.fits(messages, 1 + max(map(len, options))):
            return None
        found = yield Score(messages, options)
        return {"id": name, "logprobs": {c: float(np.sum(x)) for c, x in zip(names, found, strict=True)}}

    left = unfinished(folder, "categories", len(items), settings.rows_per_shard)
    with context.progress.task("red_team: categories", len(items), "prompts", done=len(items) - left) as task:
        return make_rows(
            folder, "categories", items, settings.rows_per_shard, lambda: watch(sampler, task), score, finish=present
        )


def classify(scored) -> dict[str, str]:
    """Id of each prompt -> the category whose name is likeliest beyond its mean over the given prompts.

    Without that mean a name that the model likes would win everywhere (Zhao et al. 2021, arXiv 2102.09690). With it
    SmolLM2-135M finds 53% of the shipped training prompts' twelve categories (36% without; nearest prompts by TF-IDF:
    17%), and 44% of the eval prompts'.
    """
    given = [row["logprobs"] for row in scored if row["id"].startswith("given/")]
    usual = {name: np.mean([logprobs[name] for logprobs in given]) for name in (given[0] if given else ())}
    return {row["id"]: max(usual, key=lambda name: row["logprobs"][name] - usual[name]) for row in scored if usual}


def _given_id(seed) -> str:
    return f"given/{seed.id}"


# ---- trying


def _try(context, folder, sampler, candidates) -> list[dict]:
    """The target's answer to each candidate and its margin of refusing; without room for these there is no row."""
    settings = context.config.red_team
    room = max(settings.response.max_new_tokens, OPENING_TOKENS)

    def answer(candidate):
        if not sampler.fits(candidate.messages, room):
            return None
        seed = context.row_seed(STAGE, candidate.id, "answer")
        sample = yield Generate(candidate.messages, settings.response, seed)
        openings = yield Score(candidate.messages, [*REFUSAL_OPENINGS, *COMPLIANCE_OPENINGS])
        return {
            "id": candidate.id,
            "category": candidate.category,
            "prompt": candidate.text,
            "examples": list(candidate.examples),
            "near": candidate.near,
            "response": sample_dict(sample),
            "kind": classify_response(sample.text),
            "margin": refusal_margin(openings),
            "provenance": context.provenance(STAGE, sampler.model),
        }

    left = unfinished(folder, "answers", len(candidates), settings.rows_per_shard)
    with context.progress.task("red_team: answers", len(candidates), "prompts", done=len(candidates) - left) as task:
        return make_rows(
            folder, "answers", candidates, settings.rows_per_shard, lambda: watch(sampler, task), answer, finish=present
        )


def falls_for(answers, settings) -> set[str]:
    """Ids of the prompts that the target falls for, as `red_team.keep` has it; see RedTeam."""
    if settings.keep == "answer":
        answers = [row for row in answers if row["kind"] == "answer"]
    if settings.keep == "margin":
        least = sorted(answers, key=lambda row: (row["margin"], row["id"]))
        answers = least[: round(settings.easiest * len(least))]
    return {row["id"] for row in answers}


def _prompt(row: dict) -> dict:
    """A row of the prompt set."""
    keys = ("id", "category", "classified", "prompt", "examples", "near", "kind", "margin", "provenance")
    return {key: row[key] for key in keys}


# ---- counts


def compared(given: list[tuple[str, str]], kept: list[tuple[str, str]]) -> dict:
    """Diversity of the given prompts and of the kept ones, (id, text) each, on as many of both: the first by hash."""
    size = min(len(given), len(kept))

    def some(texts):
        return [text for _, text in sorted(texts, key=lambda pair: content_hash([STAGE, pair[0]]))[:size]]

    return {"given": diversity(some(given)), "kept": diversity(some(kept))}


def _by_category(seeds, candidates, rows) -> dict:
    """For each category, prompts given, written and kept, and the target's refusals among those tried."""
    found = {}
    for category in dict.fromkeys(seed.category for seed in seeds):
        own = [row for row in rows if row["category"] == category]
        found[category] = {
            "given": sum(seed.category == category for seed in seeds),
            "candidates": sum(candidate.category == category for candidate in candidates),
            "kept": sum(row["kept"] for row in own),
            "refused": _share([row["kind"] == "refusal" for row in own]),
        }
    return found


def _share(flags: list[bool]) -> dict:
    return statistics.wilson_interval(sum(flags), len(flags))


def _text(messages) -> str:
    return messages[-1]["content"]
