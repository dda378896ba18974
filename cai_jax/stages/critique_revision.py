"""SL-CAI data (Bai et al. 2022, section 3): a response, then rounds of critique and revision.

In each round a principle is drawn for each row; the critique and the revision are of the newest revision. Of several
draws of a revision the one is taken that is most like the constitution's worked answers. Every revision is kept. A
prompt whose context holds no round is skipped by name: every row has a revision. Critiques and revisions may come from
the model at the endpoint.
"""

from collections import Counter
from functools import partial

from cai_jax import statistics
from cai_jax.chat import encode_text
from cai_jax.config import ROUND_FLAGS
from cai_jax.config_rules import rates_revisions
from cai_jax.endpoint import question, summary_of
from cai_jax.errors import UserError
from cai_jax.labelers.external import ask
from cai_jax.prompts import (
    critique_preamble,
    critique_request,
    quoted_critique_request,
    quoted_revision_request,
    revision_request,
)
from cai_jax.rules import explain, satisfies
from cai_jax.sampler import Generate, several
from cai_jax.similarity import Index
from cai_jax.stages.revisions import choose, compared, told
from cai_jax.stages.rows import make_rows, mean, messages_of, sample_dict, unfinished, usable_prompts, watch
from cai_jax.text_metrics import KINDS, classify_response

STAGE = "critique_revision"


def run(context, folder) -> dict:
    """Make the rows of the stage; returns its summary."""
    settings = context.config.critique_revision
    sampler = context.sampler(context.base)
    prompts, skipped = usable_prompts(sampler, context.prompts["red_team"], settings.response.max_new_tokens)
    left = unfinished(folder, "rows", len(prompts), settings.rows_per_shard)
    no_room = _no_room(sampler, context.constitution.critique_few_shots)
    if not any(_fits_a_round(context, sampler, prompt) for prompt in prompts):
        raise no_room
    worked = Index((shot.principle, shot.revision) for shot in context.constitution.critique_few_shots)
    with context.progress.task(STAGE, len(prompts), "rows", done=len(prompts) - left) as task:
        watch(sampler, task)
        rows = make_rows(
            folder, "rows", prompts, settings.rows_per_shard, lambda: sampler,
            lambda prompt: _chain(context, sampler, worked, prompt), _starts(context, prompts), finish=present,
        )  # fmt: skip
    if not rows:
        if context.endpoint and (failures := context.endpoint.counts.failures):
            told = ", ".join(f"{name} {times}" for name, times in sorted(failures.items()))
            raise UserError(f"critique_revision: the endpoint gave no text for any row ({told}); mend it and run with "
                            "--fresh")
        raise no_room
    reason = f"no room for a round in sampler.max_length={sampler.max_length}"
    if context.endpoint:
        reason += ", or no answer of the endpoint"
    roomless = left_out([prompt.id for prompt in prompts], rows, reason)
    return _summary(context, rows, skipped, roomless)


def present(rows) -> list[dict]:
    """The rows that were made; a row program returns None for what is skipped."""
    return [row for row in rows if row is not None]


def left_out(ids, rows, reason: str) -> list[dict]:
    """`{"id", "reason"}` of the ids that have no row."""
    there = {row["id"] for row in rows}
    return [{"id": row_id, "reason": reason} for row_id in ids if row_id not in there]


def _preamble(context, principle) -> list[dict]:
    """The worked critiques and revisions before a round under a principle: those of its aim."""
    return critique_preamble(context.constitution, context.config.critique_revision.critiques, [principle])


def _starts(context, prompts) -> list[list[dict]]:
    """The starts that rounds and the choice among draws share, for each aim of a principle that a prompt may get."""
    candidates = [principle for prompt in prompts for principle in _principles(context, prompt.category)]
    of_aim = {principle.aim: principle for principle in candidates}
    asked = [of_aim[aim] for aim, _ in Counter(principle.aim for principle in candidates).most_common()]
    starts = [_preamble(context, principle) for principle in asked]
    if rates_revisions(context.config):
        starts += [list(worked) for principle in asked for worked in compared(context.constitution, principle)]
    return [start for start in starts if start]


def _no_room(sampler, few_shots) -> UserError:
    what = "the constitution's few-shots leave" if few_shots else "a critique and a revision leave"
    return UserError(
        f"critique_revision: {what} no room in sampler.max_length={sampler.max_length}; raise it (the model holds "
        f"{sampler.model.config.max_position}) or shorten the few-shots"
    )


def _no_critique_yet(settings) -> str | None:
    """The shortest critique that a request to revise can hold; None where revisions are asked for without."""
    return "" if settings.critiques else None


def _room(settings) -> int:
    """How many tokens a round writes behind one another."""
    return settings.revision.max_new_tokens + (settings.critique.max_new_tokens if settings.critiques else 0)


def _fits_a_round(context, sampler, prompt) -> bool:
    """Whether a request that a round can make for the prompt fits: after an empty response."""
    settings = context.config.critique_revision
    return any(
        sampler.fits(
            revision_request(messages_of(prompt), "", principle, _no_critique_yet(settings)), _room(settings),
            _preamble(context, principle),
        )
        for principle in _principles(context, prompt.category)
    )  # fmt: skip


def _chain(context, sampler, worked: Index, prompt):
    """The row of one prompt: a response, then rounds of critique and revision as far as the context holds them.

    None where it holds not even one, or where the endpoint has failed in the first.
    """
    settings = context.config.critique_revision
    seed = context.row_seed(STAGE, prompt.id, "response")
    response = yield Generate(messages_of(prompt), settings.response, seed)
    row = _first(context, prompt, response)
    newest = response.text
    for number in range(1, settings.rounds + 1):
        entry = yield from _round(context, sampler, worked, row, newest, number)
        if entry is None:
            break
        row["rounds"].append(entry)
        newest = entry["revision"]["text"]
    return row if row["rounds"] else None


def _round(context, sampler, worked: Index, row, newest: str, number: int):
    """A critique of the newest text, where there are critiques, and its revision.

    None where the context has no room for them or the endpoint gives none; then the row says so.
    """
    settings, messages = context.config.critique_revision, row["messages"]
    principle = _principle(context, row, number)
    preamble = _preamble(context, principle)
    shortest = revision_request(messages, newest, principle, _no_critique_yet(settings))
    if not sampler.fits(shortest, _room(settings), preamble):
        row["flags"]["context_full"] = True
        return None
    critique = yield from _critique(context, preamble, row, newest, principle, number)
    if critique is None and settings.critiques:
        return None
    remark = critique["text"] if critique else None
    revisions = yield from _revisions(context, sampler, preamble, row, newest, principle, remark, number)
    if not revisions:
        return None
    drawn = [told(context, worked, newest, remark, revision) for revision in revisions]
    place, ratios = yield from choose(context, sampler, messages, principle, drawn)
    flags = {
        "critique_truncated": bool(critique) and critique["truncated"],
        "critique_empty": bool(critique) and not remark.strip(),
    }
    return {
        "round": number,
        "principle": principle.id,
        "principle_hash": principle.hash,
        "critique": critique,
        **drawn[place],
        "flags": {name: (flags | drawn[place]["flags"])[name] for name in ROUND_FLAGS},
        "chosen": place,
        "draws": [  # a ratio of 0 where there is none: a column has one type in every shard
            {"kind": each["kind"], "rated": i in ratios, "ratio": ratios.get(i, 0.0)} for i, each in enumerate(drawn)
        ],
    }


def _critique(context, preamble, row, newest: str, principle, number: int):
    """The critique of a round; None where revisions are asked for without, or the endpoint gives none."""
    settings, messages = context.config.critique_revision, row["messages"]
    seed = context.row_seed(STAGE, row["id"], number, "critique")
    if not settings.critiques:
        return None
    if settings.critic:
        asked = quoted_critique_request(messages, newest, principle)
        return (yield from _outside(context, row, asked, settings.critique, seed))
    request = [*preamble, *critique_request(messages, newest, principle)]
    return sample_dict((yield Generate(request, settings.critique, seed)))


def _revisions(context, sampler, preamble, row, newest: str, principle, critique: str | None, number: int):
    """The draws of a revision; none where the endpoint gives none, or its critique leaves no room."""
    settings, messages = context.config.critique_revision, row["messages"]
    seed = partial(context.row_seed, STAGE, row["id"], number, "revision")
    if settings.reviser:
        asked = quoted_revision_request(messages, newest, principle, critique)
        revision = yield from _outside(context, row, asked, settings.revision, seed())
        return [revision] if revision else []
    request = [*preamble, *revision_request(messages, newest, principle, critique)]
    if settings.critic and not sampler.fits(request, settings.revision.max_new_tokens):
        row["flags"]["context_full"] = True  # the endpoint counts its limit in other tokens
        return []
    seeds = [seed(), *(seed(i) for i in range(1, settings.draws))]
    return [sample_dict(sample) for sample in (yield from several(request, settings.revision, seeds))]


def _outside(context, row, request, sampling, seed):
    """A text of the model at the endpoint as it stands in rows, its length in tokens of the base model.

    None where there is none; then the row says why.
    """
    reply = yield from ask(context.endpoint, question(context.endpoint.settings, request, sampling, seed))
    if reply.failure:
        row["flags"]["endpoint_failed"], row["endpoint_failure"] = True, reply.failure
        return None
    tokens = len(encode_text(context.base.tokenizer, reply.text))
    about = {"text": reply.text, "tokens": tokens, "truncated": reply.truncated}
    return about | {"model": reply.model, "read": reply.read or 0, "written": reply.written or 0}


def _first(context, prompt, response) -> dict:
    row = {
        "id": prompt.id,
        "category": prompt.category,
        "messages": messages_of(prompt),
        "response": sample_dict(response),
        "kind": classify_response(response.text),
        "rounds": [],
        "flags": {
            "response_truncated": response.truncated,
            "response_empty": not response.text.strip(),
            "context_full": False,
        },
        "provenance": context.provenance(STAGE),
    }
    if context.endpoint:
        row["flags"]["endpoint_failed"], row["endpoint_failure"] = False, ""
        settings, outside = context.config.critique_revision, context.config.endpoint
        for who in ("critic", "reviser"):
            row["provenance"][who] = f"{outside.model} at {outside.base_url}" if getattr(settings, who) else "base"
    return row


def _principle(context, row, number: int):
    """The principle of a round."""
    return draw_principle(context, STAGE, row["id"], number, among=_principles(context, row["category"]))


def _principles(context, category: str):
    """What the principles of a row are drawn from: all, or those that match the prompt."""
    if context.config.critique_revision.principles == "matched":
        return context.constitution.matching(category, "harmless")
    return context.constitution.principles


def draw_principle(context, stage: str, row_id: str, *rest, among=()):
    """One principle, drawn uniformly with the key of the row: of `among`, or without these of the constitution."""
    principles = among or context.constitution.principles
    return principles[context.row_seed(stage, row_id, *rest, "principle") % len(principles)]


def count_flags(holders) -> dict[str, int]:
    """How often each flag is raised in rows or rounds; zeros too."""
    return {name: sum(holder["flags"][name] for holder in holders) for name in holders[0]["flags"]}


def checks(principles, rows) -> dict:
    """For each principle with an exact rule, how many texts kept it before and after a revision under it."""
    steps = [step for row in rows for step in _steps(row)]
    return {principle.id: _kept(principle, steps) for principle in principles if principle.check}


def _kept(principle, steps) -> dict:
    columns = list(zip(*(texts for drawn, *texts in steps if drawn == principle.id), strict=True)) or [(), ()]
    before, after = (
        statistics.wilson_interval(sum(satisfies(principle.check, text) for text in texts), len(texts))
        for texts in columns
    )
    return {"rule": explain(principle.check), "n": len(columns[0]), "before": before, "after": after}


def _steps(row):
    """(principle, text before, text after) of every round."""
    newest = row["response"]["text"]
    for entry in row["rounds"]:
        yield entry["principle"], newest, entry["revision"]["text"]
        newest = entry["revision"]["text"]


def _summary(context, rows, skipped, roomless) -> dict:
    rounds = [entry for row in rows for entry in row["rounds"]]
    principles = {principle.id: 0 for principle in context.constitution.principles}
    for entry in rounds:
        principles[entry["principle"]] += 1
    counters = count_flags(rows) | count_flags(rounds)
    counters["context_full"] += len(roomless)
    by_round = range(1, context.config.critique_revision.rounds + 1)
    return _endpoint_summary(context, rows, rounds) | {
        "rows": len(rows),
        "rounds": len(rounds),
        "skipped": skipped + roomless,
        "counters": counters,
        "mean_tokens": {
            "response": mean(row["response"]["tokens"] for row in rows),
            "critique": mean(entry["critique"]["tokens"] for entry in rounds if entry["critique"]),
            "revision": [mean(e["revision"]["tokens"] for e in rounds if e["round"] == n) for n in by_round],
        },
        "principles": principles,
        "kinds": {
            "response": _kinds(rows),
            "revision": [_kinds([entry for entry in rounds if entry["round"] == number]) for number in by_round],
            "drawn": [
                _kinds([each for entry in rounds if entry["round"] == number for each in entry["draws"]])
                for number in by_round
            ],
        },
        "checks": checks(context.constitution.principles, rows),
    }


def _kinds(holders) -> dict[str, int]:
    """How many texts of rows or rounds are of each kind; zeros too."""
    return {kind: sum(holder["kind"] == kind for holder in holders) for kind in KINDS}


def _endpoint_summary(context, rows, rounds) -> dict:
    """What the texts in the rows took at the endpoint, and how many rows it cut short, by failure."""
    if not context.endpoint:
        return {}
    texts = [entry[what] for entry in rounds for what in ("critique", "revision") if "model" in (entry[what] or ())]
    return {"endpoint": summary_of(
        context.config.endpoint, [text["read"] for text in texts], [text["written"] for text in texts],
        [row["endpoint_failure"] for row in rows],
    )}  # fmt: skip
