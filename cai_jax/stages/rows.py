"""Small pieces that the stages share: shards of rows, samples as JSON, seeds."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from cai_jax.errors import UserError
from cai_jax.sampler import Sample, Sampler


def make_rows(
    folder,
    prefix: str,
    items: Sequence,
    per_shard: int,
    sampler: Callable[[], Sampler],
    program: Callable,
    starts: Sequence[Sequence] = (),
    finish: Callable[[list], list[dict]] = lambda rows: rows,
) -> list[dict]:
    """The rows of all items, made by `program(item)`, a row program, for every shard that is not on disk yet.

    A finished shard is never made again, so a killed stage goes on with the ones that are missing. `sampler` is
    called only if there is work; `starts` are the conversation starts that many requests share; `finish` may add
    to the rows of a shard once they are all there.
    """
    count = max(1, -(-len(items) // per_shard))
    missing = sorted(set(range(count)) - folder.finished_shards(prefix))
    places = [place for index in missing for place in range(len(items))[index * per_shard : (index + 1) * per_shard]]
    shards = {index: {} for index in missing}
    left = Counter(place // per_shard for place in places)
    for index in missing:
        if not left[index]:
            folder.write_shard(index, count, [], prefix)
    if places:
        programs = (program(items[place]) for place in places)
        for done, row in sampler().stream(programs, *starts[:1], more=starts[1:]):
            index = places[done] // per_shard
            shards[index][done] = row
            if len(shards[index]) == left[index]:
                rows = [row for _, row in sorted(shards.pop(index).items())]
                folder.write_shard(index, count, finish(rows), prefix)
    return folder.read_shards(prefix)


def unfinished(folder, prefix: str, count: int, per_shard: int) -> int:
    """How many of `count` items have no shard yet."""
    finished = folder.finished_shards(prefix)
    return sum(index // per_shard not in finished for index in range(count))


def watch(sampler: Sampler, task) -> Sampler:
    """Let a task show what the sampler does: rows, tokens a second, how full the slots are."""
    before, start = replace(sampler.counts), time.monotonic()
    shown = replace(before)

    def show(counts):
        seconds = max(time.monotonic() - start, 1e-9)
        prefilled, reused = ((getattr(counts, n) - getattr(before, n)) / seconds for n in ("prefilled", "reused"))
        note = f"{prefilled:.0f}/s prefilled, {reused:.0f}/s reused"
        if steps := counts.steps - before.steps:
            note += f", slots {(counts.generated - before.generated) / steps:.0%} full"
        task.advance(counts.done - shown.done, counts.generated - shown.generated, note)
        shown.done, shown.generated = counts.done, counts.generated

    sampler.on_progress = show
    return sampler


def sample_dict(sample: Sample) -> dict:
    """A sample as it stands in rows."""
    return {"text": sample.text, "tokens": len(sample.tokens), "truncated": sample.truncated}


def messages_of(prompt) -> list[dict]:
    """The messages of a prompt as plain dicts."""
    return [{"role": message["role"], "content": message["content"]} for message in prompt.messages]


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def usable_prompts(sampler, prompt_rows, new_tokens: int, max_prompt_tokens: int | None = None, before=((),)):
    """The prompts that leave room for a completion of `new_tokens`, and `{"id", "reason"}` of all others.

    `max_prompt_tokens` may ask for shorter prompts; each conversation of `before` is to fit in front of them. Raises
    UserError where no prompt is left.
    """
    room = new_tokens if max_prompt_tokens is None else max(new_tokens, sampler.max_length - max_prompt_tokens)
    limit = sampler.max_length - room
    behind = " with the worked answers before it" if any(before) else ""
    usable, skipped = [], list(prompt_rows.skipped)
    for prompt in prompt_rows.rows:
        if all(sampler.fits([*start, *messages_of(prompt)], room) for start in before):
            usable.append(prompt)
        else:
            skipped.append({"id": prompt.id, "reason": f"prompt longer than {limit} tokens{behind}"})
    if not usable:
        raise UserError(
            f"prompts: not one of {len(skipped)} fits {limit} tokens{behind} (the first: {skipped[0]['id']}); raise "
            "sampler.max_length" + (", or set preferences.contrasted=false" if behind else " or ppo.max_prompt_tokens")
            + ", or shorten the prompts"
        )
    return usable, skipped
