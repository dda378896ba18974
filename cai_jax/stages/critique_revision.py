"""SL-CAI data (Bai et al. 2022, section 3): a response, then rounds of critique and revision.

In each round one principle is drawn for each row; the critique and the revision are of the newest revision. Every
revision is kept. A prompt whose context holds no round is skipped by name: every row has a revision.
"""

from cai_jax import statistics
from cai_jax.errors import UserError
from cai_jax.prompts import critique_preamble, critique_request, revision_request
from cai_jax.rules import explain, satisfies
from cai_jax.sampler import Generate
from cai_jax.stages.rows import make_rows, mean, messages_of, sample_dict, unfinished, usable_prompts, watch

STAGE = "critique_revision"


def run(context, folder) -> dict:
    """Make the rows of the stage; returns its summary."""
    settings = context.config.critique_revision
    sampler = context.sampler(context.base)
    prompts, skipped = usable_prompts(sampler, context.prompts["red_team"], settings.response.max_new_tokens)
    left = unfinished(folder, "rows", len(prompts), settings.rows_per_shard)
    preamble = critique_preamble(context.constitution)
    no_room = _no_room(sampler, preamble)
    if not any(_fits_a_round(context, sampler, preamble, prompt) for prompt in prompts):
        raise no_room
    with context.progress.task(STAGE, len(prompts), "rows", done=len(prompts) - left) as task:
        watch(sampler, task)
        rows = make_rows(
            folder, "rows", prompts, settings.rows_per_shard, lambda: sampler,
            lambda prompt: _chain(context, sampler, preamble, prompt), preamble, finish=present,
        )  # fmt: skip
    if not rows:
        raise no_room
    reason = f"no room for a round in sampler.max_length={sampler.max_length}"
    roomless = left_out([prompt.id for prompt in prompts], rows, reason)
    return _summary(context, rows, skipped, roomless)


def present(rows) -> list[dict]:
    """The rows that were made; a row program returns None for what is skipped."""
    return [row for row in rows if row is not None]


def left_out(ids, rows, reason: str) -> list[dict]:
    """`{"id", "reason"}` of the ids that have no row."""
    there = {row["id"] for row in rows}
    return [{"id": row_id, "reason": reason} for row_id in ids if row_id not in there]


def _no_room(sampler, preamble) -> UserError:
    what = "the constitution's few-shots leave" if preamble else "a critique and a revision leave"
    return UserError(
        f"critique_revision: {what} no room in sampler.max_length={sampler.max_length}; raise it (the model holds "
        f"{sampler.model.config.max_position}) or shorten the few-shots"
    )


def _fits_a_round(context, sampler, preamble, prompt) -> bool:
    """Whether the shortest request that a round can make for the prompt fits: after an empty response."""
    settings = context.config.critique_revision
    room = settings.critique.max_new_tokens + settings.revision.max_new_tokens
    shortest = min(context.constitution.principles, key=lambda p: len(p.critique_request + p.revision_request))
    return sampler.fits(revision_request(messages_of(prompt), "", shortest, ""), room, preamble)


def _chain(context, sampler, preamble, prompt):
    """The row of one prompt: a response, then rounds of critique and revision as far as the context holds them.

    None where it holds not even one.
    """
    settings, messages = context.config.critique_revision, messages_of(prompt)

    def ask(conversation, sampling, *what):
        return Generate(conversation, sampling, context.row_seed(STAGE, prompt.id, *what))

    response = yield ask(messages, settings.response, "response")
    row = _first(context, prompt, response)
    newest, room = response.text, settings.critique.max_new_tokens + settings.revision.max_new_tokens
    for number in range(1, settings.rounds + 1):
        principle = draw_principle(context, STAGE, prompt.id, number)
        if not sampler.fits(revision_request(messages, newest, principle, ""), room, preamble):
            row["flags"]["context_full"] = True
            break
        request = [*preamble, *critique_request(messages, newest, principle)]
        critique = yield ask(request, settings.critique, number, "critique")
        request = [*preamble, *revision_request(messages, newest, principle, critique.text)]
        revision = yield ask(request, settings.revision, number, "revision")
        row["rounds"].append({
            "round": number,
            "principle": principle.id,
            "principle_hash": principle.hash,
            "critique": sample_dict(critique),
            "revision": sample_dict(revision),
            "flags": _round_flags(newest, critique, revision),
        })  # fmt: skip
        newest = revision.text
    return row if row["rounds"] else None


def _first(context, prompt, response) -> dict:
    return {
        "id": prompt.id,
        "category": prompt.category,
        "messages": messages_of(prompt),
        "response": sample_dict(response),
        "rounds": [],
        "flags": {
            "response_truncated": response.truncated,
            "response_empty": not response.text.strip(),
            "context_full": False,
        },
        "provenance": context.provenance(STAGE),
    }


def draw_principle(context, stage: str, row_id: str, *rest):
    """One principle of the constitution, drawn uniformly with the key of the row."""
    principles = context.constitution.principles
    return principles[context.row_seed(stage, row_id, *rest, "principle") % len(principles)]


def _round_flags(newest, critique, revision) -> dict[str, bool]:
    return {
        "critique_truncated": critique.truncated,
        "critique_empty": not critique.text.strip(),
        "revision_truncated": revision.truncated,
        "revision_empty": not revision.text.strip(),
        "revision_unchanged": revision.text.strip() == newest.strip(),
        "revision_copies_critique": bool(critique.text.strip()) and revision.text.strip() == critique.text.strip(),
    }


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
    return {
        "rows": len(rows),
        "rounds": len(rounds),
        "skipped": skipped + roomless,
        "counters": counters,
        "mean_tokens": {
            "response": mean(row["response"]["tokens"] for row in rows),
            "critique": mean(entry["critique"]["tokens"] for entry in rounds),
            "revision": [mean(e["revision"]["tokens"] for e in rounds if e["round"] == n) for n in by_round],
        },
        "principles": principles,
        "checks": checks(context.constitution.principles, rows),
    }
