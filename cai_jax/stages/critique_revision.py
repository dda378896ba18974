"""SL-CAI data (Bai et al. 2022, section 3): a response, then rounds of critique and revision.

In each round one principle is drawn for each row; the critique and the revision are of the newest revision. Every
revision is kept.
"""

from cai_jax.prompts import critique_preamble, critique_request, revision_request
from cai_jax.sampler import Generate
from cai_jax.stages.rows import counted, make_rows, mean, messages_of, sample_dict, unfinished, usable_prompts, watch

STAGE = "critique_revision"
FLAGS = (
    "response_truncated", "response_empty", "critique_truncated", "critique_empty",
    "revision_truncated", "revision_empty", "revision_unchanged", "revision_copies_critique", "context_full",
)  # fmt: skip


def run(context, folder) -> dict:
    """Make the rows of the stage; returns its summary."""
    settings = context.config.critique_revision
    sampler = context.sampler(context.base)
    prompts, skipped = usable_prompts(sampler, context.prompts["red_team"], settings.response.max_new_tokens)
    left = unfinished(folder, "rows", len(prompts), settings.rows_per_shard)
    preamble = critique_preamble(context.constitution)
    with context.progress.task(STAGE, len(prompts), "rows", done=len(prompts) - left) as task:
        watch(sampler, task)
        rows = make_rows(
            folder, "rows", prompts, settings.rows_per_shard, lambda: sampler,
            lambda prompt: _chain(context, sampler, preamble, prompt), preamble,
        )  # fmt: skip
    return _summary(context, rows, skipped)


def _chain(context, sampler, preamble, prompt):
    """The row of one prompt: a response, then rounds of critique and revision as far as the context holds them."""
    settings, messages = context.config.critique_revision, messages_of(prompt)

    def ask(conversation, sampling, *what):
        return Generate(conversation, sampling, context.row_seed(STAGE, prompt.id, *what))

    response = yield ask(messages, settings.response, "response")
    row = _first(context, prompt, response)
    newest, room = response.text, settings.critique.max_new_tokens + settings.revision.max_new_tokens
    for number in range(1, settings.rounds + 1):
        principle = draw_principle(context, STAGE, prompt.id, number)
        if not sampler.fits(revision_request(messages, newest, principle, ""), room, preamble):
            row["flags"].append("context_full")
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
    return row


def _first(context, prompt, response) -> dict:
    flags = ["response_truncated"] * response.truncated + ["response_empty"] * (not response.text.strip())
    return {
        "id": prompt.id,
        "category": prompt.category,
        "messages": messages_of(prompt),
        "response": sample_dict(response),
        "rounds": [],
        "flags": flags,
        "provenance": context.provenance(STAGE),
    }


def draw_principle(context, stage: str, row_id: str, *rest):
    """One principle of the constitution, drawn uniformly with the key of the row."""
    principles = context.constitution.principles
    return principles[context.row_seed(stage, row_id, *rest, "principle") % len(principles)]


def _round_flags(newest, critique, revision) -> list[str]:
    raised = {
        "critique_truncated": critique.truncated,
        "critique_empty": not critique.text.strip(),
        "revision_truncated": revision.truncated,
        "revision_empty": not revision.text.strip(),
        "revision_unchanged": revision.text.strip() == newest.strip(),
        "revision_copies_critique": bool(critique.text.strip()) and revision.text.strip() == critique.text.strip(),
    }
    return [name for name, is_raised in raised.items() if is_raised]


def _summary(context, rows, skipped) -> dict:
    rounds = [entry for row in rows for entry in row["rounds"]]
    principles = {principle.id: 0 for principle in context.constitution.principles}
    for entry in rounds:
        principles[entry["principle"]] += 1
    by_round = range(1, context.config.critique_revision.rounds + 1)
    return {
        "rows": len(rows),
        "rounds": len(rounds),
        "skipped": skipped,
        "counters": counted(FLAGS, [row["flags"] for row in rows] + [entry["flags"] for entry in rounds]),
        "mean_tokens": {
            "response": mean(row["response"]["tokens"] for row in rows),
            "critique": mean(entry["critique"]["tokens"] for entry in rounds),
            "revision": [mean(e["revision"]["tokens"] for e in rounds if e["round"] == n) for n in by_round],
        },
        "principles": principles,
    }
