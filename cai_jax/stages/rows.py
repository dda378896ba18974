"""Small pieces that the stages share: shards of rows, samples as JSON, seeds."""

from collections import Counter
from collections.abc import Callable, Sequence

from cai_jax.errors import UserError
from cai_jax.sampler import Sample


def make_rows(
    folder, prefix: str, items: Sequence, per_shard: int, work: Callable[[Sequence], list[dict]]
) -> list[dict]:
    """The rows of all items: `work(items of a shard) -> rows` for every shard that is not on disk yet.

    A finished shard is never made again, so a killed stage goes on with the next one.
    """
    count = max(1, -(-len(items) // per_shard))
    finished = folder.finished_shards(prefix)
    for index in sorted(set(range(count)) - finished):
        folder.write_shard(index, count, work(items[index * per_shard : (index + 1) * per_shard]), prefix)
    return folder.read_shards(prefix)


def unfinished(folder, prefix: str, count: int, per_shard: int) -> int:
    """How many of `count` items have no shard yet."""
    finished = folder.finished_shards(prefix)
    return sum(index // per_shard not in finished for index in range(count))


def sample_dict(sample: Sample) -> dict:
    """A sample as it stands in rows."""
    return {"text": sample.text, "tokens": len(sample.tokens), "truncated": sample.truncated}


def messages_of(prompt) -> list[dict]:
    """The messages of a prompt as plain dicts."""
    return [{"role": message["role"], "content": message["content"]} for message in prompt.messages]


def counted(names: Sequence[str], flags: Sequence[Sequence[str]]) -> dict[str, int]:
    """How often each named flag was raised; zeros too."""
    counts = Counter(flag for row in flags for flag in row)
    return {name: counts[name] for name in names}


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def usable_prompts(sampler, prompt_rows, new_tokens: int, max_prompt_tokens: int | None = None):
    """The prompts that leave room for a completion, and `{"id", "reason"}` of all others.

    Raises UserError where no prompt is left.
    """
    room = new_tokens if max_prompt_tokens is None else sampler.max_length - max_prompt_tokens
    limit = sampler.max_length - room
    usable, skipped = [], list(prompt_rows.skipped)
    for prompt in prompt_rows.rows:
        if sampler.fits(messages_of(prompt), room):
            usable.append(prompt)
        else:
            skipped.append({"id": prompt.id, "reason": f"prompt longer than {limit} tokens"})
    if not usable:
        raise UserError(
            f"prompts: not one of {len(skipped)} fits {limit} tokens (the first: {skipped[0]['id']}); "
            "raise sampler.max_length or ppo.max_prompt_tokens, or shorten the prompts"
        )
    return usable, skipped
