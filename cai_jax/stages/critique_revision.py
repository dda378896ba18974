"""SL-CAI data (Bai et al. 2022, section 3): a response, then rounds of critique and revision.

In each round one principle is drawn for each row; the critique and the revision are of the newest revision. Every
revision is kept.
"""

from cai_jax.config import Sampling
from cai_jax.prompts import critique_preamble, critique_request, revision_request
from cai_jax.stages.rows import counted, make_rows, mean, messages_of, sample_dict, unfinished, usable_prompts

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
    calls = 1 + 2 * settings.rounds
    total = calls * len(prompts)
    with context.progress.task(STAGE, total, "samples", done=total - calls * left) as task:
        sampler.on_batch = lambda rows, tokens: task.advance(rows, tokens)
        rows = make_rows(
            folder, "rows", prompts, settings.rows_per_shard, lambda shard: _chains(context, sampler, shard)
        )
    return _summary(context, rows, skipped)


def _chains(context, sampler, prompts) -> list[dict]:
    """The whole chain of a shard of prompts, round by round for all of them together."""
    settings = context.config.critique_revision
    seeds = [context.row_seed(STAGE, prompt.id, "response") for prompt in prompts]
    responses = sampler.generate([messages_of(prompt) for prompt in prompts], settings.response, row_seeds=seeds)
    rows = [_first(context, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    for round_number in range(1, settings.rounds + 1):
        _one_round(context, sampler, rows, round_number)
    return rows


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


def _one_round(context, sampler, rows, round_number) -> None:
    """Add a critique and a revision of the newest text to every row that the context still holds."""
    settings, preamble = context.config.critique_revision, critique_preamble(context.constitution)
    room = settings.critique.max_new_tokens + settings.revision.max_new_tokens
    going = []  # (row, principle, newest text)
    for row in rows:
        if "context_full" in row["flags"]:
            continue
        principle = draw_principle(context, STAGE, row["id"], round_number)
        newest = row["rounds"][-1]["revision"]["text"] if row["rounds"] else row["response"]["text"]
        if sampler.fits(revision_request(row["messages"], newest, principle, ""), room, preamble):
            going.append((row, principle, newest))
        else:
            row["flags"].append("context_full")

    def ask(what: str, sampling: Sampling, conversations):
        seeds = [context.row_seed(STAGE, row["id"], round_number, what) for row, _, _ in going]
        return sampler.generate(conversations, sampling, row_seeds=seeds, prefix=preamble)

    critiques = ask(
        "critique",
        settings.critique,
        [critique_request(row["messages"], newest, principle) for row, principle, newest in going],
    )
    revisions = ask(
        "revision",
        settings.revision,
        [
            revision_request(row["messages"], newest, principle, critique.text)
            for (row, principle, newest), critique in zip(going, critiques, strict=True)
        ],
    )
    for (row, principle, newest), critique, revision in zip(going, critiques, revisions, strict=True):
        row["rounds"].append(
            {
                "round": round_number,
                "principle": principle.id,
                "principle_hash": principle.hash,
                "critique": sample_dict(critique),
                "revision": sample_dict(revision),
                "flags": _round_flags(newest, critique, revision),
            }
        )


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
