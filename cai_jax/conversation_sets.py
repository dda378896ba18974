"""What SFT is trained on, set by set: the run's own revisions and helpful answers, and conversations from elsewhere.

A mixer is a tuple of "SET=FRACTION", as `dataset_mixer` in the alignment-handbook: of each set that share is taken,
drawn by the seed without replacement, and all that is taken is trained on once an epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cai_jax import config
from cai_jax.errors import UserError
from cai_jax.prompt_files import read_records
from cai_jax.prompt_sets import (
    PromptRows,
    Unusable,
    check_unicode,
    conversation_key,
    label_of,
    merged,
    path_and_split,
    rows_of_split,
    turn_of,
)
from cai_jax.provenance import content_hash, row_seed

OWN = ("revisions", "helpful")  # sets that a run makes itself


@dataclass(frozen=True)
class Conversation:
    """Messages {role, content} that end with an assistant turn."""

    id: str
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Conversations:
    """The usable conversations of a set in file order.

    `skipped` names the others ({"id", "reason"}); `hash` is the sha256 of what `rows` say, in order.
    """

    rows: tuple[Conversation, ...]
    skipped: tuple[dict[str, str], ...]
    hash: str


def parse_mixer(mixer: Sequence[str]) -> dict[str, float]:
    """Fraction by set; an empty mixer is all of the run's own sets. Raises UserError naming the part at fault."""
    fractions: dict[str, float] = {}
    for part in mixer or [f"{name}=1" for name in OWN]:
        source, equals, text = part.rpartition("=")
        source = source.strip()
        try:
            fraction = float(text)
        except ValueError:
            fraction = 0.0
        if not (equals and source and 0 < fraction <= 1):
            raise UserError(f"sft.mixer: {part!r} must be SET=FRACTION with a fraction above 0 and at most 1; SET is "
                            "revisions, helpful, or a file, folder or hub id of conversations, SET:SPLIT for a split")
        if source in fractions:
            raise UserError(f"sft.mixer: {source!r} is named twice; name it once")
        fractions[source] = fraction
    return fractions


def draw(ids: Sequence[str], fraction: float, seed: int, source: str, use: str = "sft.mixer") -> set[str]:
    """The ids that are taken of a set, `taken` of them; more of the same ones as the fraction grows.

    `use` keeps the draws of one stage apart from those of another.
    """
    order = sorted(ids, key=lambda row_id: row_seed(seed, use, source, row_id))
    return set(order[: taken(fraction, len(order))])


def taken(fraction: float, count: int) -> int:
    """How many of a set of `count` a fraction is: one at least."""
    return max(1, round(fraction * count))


def load_conversations(source: str, evaluation: Mapping[str, PromptRows]) -> Conversations:
    """Read a set of conversations, each a list of {role, content} in the column "messages".

    A source is what a prompt set's path is, with ":SPLIT" behind it to take one split. What comes after the last
    assistant turn of a conversation is dropped. A conversation in which an eval prompt is answered is left out by
    name. Raises UserError (one line: what, where, how to mend) for a set that is missing, malformed or not usable.
    """
    where = f"sft.mixer ({source})"
    path, split = path_and_split(source)
    records, split = read_records(config.PromptSet(path, split=split), where)
    if not any("messages" in record for record in records):
        columns = ", ".join(dict.fromkeys(column for record in records for column in record)) or "none"
        raise UserError(f"{where}: no column 'messages' with lists of {{role, content}}; its columns are: {columns}")
    numbered = list(enumerate(records, start=1))
    if split:
        numbered = rows_of_split(numbered, split, where)
    held_back = {
        conversation_key(prompt.messages): f"{name} {prompt.id}"
        for name, prompts in evaluation.items()
        for prompt in prompts.rows
    }
    rows, skipped = _usable(numbered, Path(path).name, held_back)
    if not rows:
        raise UserError(f"{where}: none of {len(numbered)} rows can be used (first: {skipped[0]['id']}: "
                        f"{skipped[0]['reason']}); check the column 'messages'")
    return Conversations(tuple(rows), tuple(skipped), content_hash([[row.id, row.messages] for row in rows]))


def _usable(numbered, name: str, held_back) -> tuple[list[Conversation], list[dict[str, str]]]:
    rows, skipped, ids, seen = [], [], set(), {}
    for number, record in numbered:
        row_id = fallback = f"{name}-{number:05d}"
        try:
            row_id = label_of(record.get("id"), "id") or fallback
            messages = _messages(record.get("messages"))
            key = conversation_key(messages)
            if row_id in ids:
                raise Unusable("duplicate id")
            if key in seen:
                raise Unusable(f"duplicate conversation, same as {seen[key]}")
            for end, turn in enumerate(messages):
                if turn["role"] == "assistant" and (prompt := held_back.get(key[:end])):
                    raise Unusable(f"answers the eval prompt {prompt}")
        except Unusable as reason:
            skipped.append({"id": row_id, "reason": str(reason)})
            continue
        ids.add(row_id)
        seen[key] = row_id
        rows.append(Conversation(row_id, messages))
    return rows, skipped


def _messages(value) -> tuple[dict[str, str], ...]:
    """Turns up to and including the last one of the assistant."""
    if not isinstance(value, list):
        raise Unusable(f"messages is a {type(value).__name__}, not a list of {{role, content}}")
    turns = [turn_of(entry, number) for number, entry in enumerate(value, start=1)]
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    spoken = [role for role, _ in turns if role != "system"]
    if not spoken:
        raise Unusable("no assistant turn")
    if spoken[0] != "user":
        raise Unusable("the assistant speaks before the user")
    for number, (_, content) in enumerate(turns, start=1):
        if not content.strip():
            raise Unusable(f"turn {number} is empty")
        check_unicode(content, f"turn {number}")
    return merged(turns)
