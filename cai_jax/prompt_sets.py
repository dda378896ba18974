"""Prompts of a run: our own sets, a user's file, a folder saved by `datasets`, or a hub dataset.

A set that cannot be read at all is a `UserError`; a row that cannot be used is named in `skipped` and the
rest goes on. Nothing here knows a model: whether a prompt fits into a context is the stages' business.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_jax import config
from cai_jax.errors import UserError
from cai_jax.prompt_files import nearest, read_records
from cai_jax.provenance import content_hash

ROLES = ("system", "user", "assistant")
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
_OPTIONAL_COLUMNS = {"id": "id", "category": "category", "answer": "answer"}  # data may lack them


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer: `messages` are {role, content} and end with a user turn.

    `answer` is a good one that came with it, "" where none did.
    """

    id: str
    category: str
    messages: tuple[dict[str, str], ...]
    answer: str = ""


@dataclasses.dataclass(frozen=True)
class PromptRows:
    """The usable prompts of a set in file order.

    `skipped` names the others ({"id", "reason"}); `hash` is the sha256 of what `rows` say, in order.
    """

    rows: tuple[Prompt, ...]
    skipped: tuple[dict[str, str], ...]
    hash: str


def load_prompts(prompt_set: config.PromptSet, name: str) -> PromptRows:
    """Read the set that stands under `prompts.<name>` in a config.

    The prompt column holds a text, a list of {role, content}, or a transcript "\\n\\nHuman: ...\\n\\nAssistant:
    ..." as in HH-RLHF (Bai et al. 2022, arXiv 2204.05862). Earlier turns are kept, a last assistant turn is
    dropped, turns of one role in a row become one. A row without an id is called `<name>-<row number>`,
    counted over the whole file, whatever the split.

    Raises UserError (one line: what, where, how to mend) for a set that is missing, malformed, has no such
    column or split, or no usable row.
    """
    where = f"prompts.{name} ({prompt_set.path})"
    if prompt_set.limit < 0:
        raise UserError(f"{where}: limit is {prompt_set.limit}; give 0 for all rows, or a positive number")
    found = _load_one(prompt_set, name, where)
    for source in prompt_set.more:
        path, split = path_and_split(source)
        where = f"prompts.{name}.more ({source})"
        more = _load_one(dataclasses.replace(prompt_set, path=path, split=split), name, where)
        ids = {prompt.id for prompt in found.rows}
        if any(prompt.id in ids for prompt in more.rows):
            more = _with_prefix(more, f"{source}/")
        found = joined(found, more)
    return _prompt_rows(_spread(found.rows, prompt_set.limit), found.skipped) if prompt_set.limit else found


def path_and_split(source: str) -> tuple[str, str]:
    """The two parts of PATH or PATH:SPLIT, the split "" where there is none; a shipped set has a colon of its own."""
    path, _, split = source.rpartition(":")
    if path in ("", "shipped") or Path(source).expanduser().exists():
        return source, ""
    return path, split


def _load_one(prompt_set: config.PromptSet, name: str, where: str) -> PromptRows:
    """The usable rows of one path."""
    records, split = read_records(prompt_set, where)
    if not records:
        raise UserError(f"{where} is empty; give a set with at least one row")
    _check_columns(records, prompt_set, where)
    numbered = list(enumerate(records, start=1))
    if split:
        numbered = rows_of_split(numbered, split, where)
    prompts, skipped = _usable(numbered, prompt_set, name)
    if not prompts:
        raise UserError(
            f"{where}: none of {len(numbered)} rows can be used (first: {skipped[0]['id']}: "
            f"{skipped[0]['reason']}); check the column {prompt_set.prompt!r}"
        )
    return _prompt_rows(prompts, skipped)


def with_unique_ids(sets: Mapping[str, PromptRows]) -> dict[str, PromptRows]:
    """The sets as they are; or, where an id stands in two of them, all with "<name of the set>/" before their ids.

    For sets whose rows one stage handles together: ids are the keys of rows.
    """
    counts = Counter(prompt.id for prompts in sets.values() for prompt in prompts.rows)
    if all(count == 1 for count in counts.values()):
        return dict(sets)
    return {name: _with_prefix(prompts, f"{name}/") for name, prompts in sets.items()}


def _with_prefix(prompts: PromptRows, prefix: str) -> PromptRows:
    rows = [dataclasses.replace(prompt, id=prefix + prompt.id) for prompt in prompts.rows]
    return _prompt_rows(rows, [row | {"id": prefix + row["id"]} for row in prompts.skipped])


def _prompt_rows(prompts: list[Prompt], skipped: Sequence[dict[str, str]]) -> PromptRows:
    return PromptRows(tuple(prompts), tuple(skipped), content_hash([_said(prompt) for prompt in prompts]))


def _said(prompt: Prompt) -> dict:
    """What a prompt says; an answer that did not come with it is no part of that."""
    said = dataclasses.asdict(prompt)
    return said if prompt.answer else {name: value for name, value in said.items() if name != "answer"}


def joined(prompts: PromptRows, more: PromptRows) -> PromptRows:
    """One set of two: the rows of the first, then those of the second that it does not hold."""
    known = {conversation_key(prompt.messages): prompt.id for prompt in prompts.rows}
    new = [prompt for prompt in more.rows if conversation_key(prompt.messages) not in known]
    again = [
        {"id": prompt.id, "reason": f"duplicate prompt, same as {known[key]}"}
        for prompt in more.rows
        if (key := conversation_key(prompt.messages)) in known
    ]
    return _prompt_rows([*prompts.rows, *new], [*prompts.skipped, *more.skipped, *again])


def check_disjoint(train: Mapping[str, PromptRows], evaluation: Mapping[str, PromptRows]) -> None:
    """Refuse a prompt that stands in a train set and in an eval set; case and white space do not count.

    Args:
      train, evaluation: name of a set -> its rows.

    Raises UserError that names the ids on both sides.
    """
    trained = {
        conversation_key(prompt.messages): f"{name} {prompt.id}"
        for name, prompts in train.items()
        for prompt in prompts.rows
    }
    shared = [
        f"{trained[key]} = {name} {prompt.id}"
        for name, prompts in evaluation.items()
        for prompt in prompts.rows
        if (key := conversation_key(prompt.messages)) in trained
    ]
    if shared:
        more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
        raise UserError(
            f"prompts to train on stand in an eval set too: {'; '.join(shared[:5])}{more}; "
            "take them out of one side, or choose other splits"
        )


# --- columns and splits ------------------------------------------------------------------------------------


def _check_columns(records: list[dict], prompt_set: config.PromptSet, where: str) -> None:
    columns = list(dict.fromkeys(column for record in records for column in record))
    for field in ("prompt", "id", "category", "answer"):
        wanted = getattr(prompt_set, field)
        if wanted not in columns and _OPTIONAL_COLUMNS.get(field) != wanted:
            raise UserError(f"{where}: no column {wanted!r} for {field}{nearest(wanted, columns)}")


def rows_of_split(numbered: list[tuple[int, dict]], split: str, where: str) -> list[tuple[int, dict]]:
    """The numbered records whose column "split" says so; UserError where none does."""
    found = list(dict.fromkeys(str(record["split"]) for _, record in numbered if "split" in record))
    if not found:
        raise UserError(f"{where}: split {split!r} is asked for but there is no column 'split'; set split to ''")
    if split not in found:
        raise UserError(f"{where}: no row has split {split!r}{nearest(split, found)}")
    return [(number, record) for number, record in numbered if str(record.get("split")) == split]


# --- rows --------------------------------------------------------------------------------------------------


def _usable(
    numbered: list[tuple[int, dict]], prompt_set: config.PromptSet, name: str
) -> tuple[list[Prompt], list[dict[str, str]]]:
    prompts, skipped = [], []
    row_of_id: dict[str, int] = {}
    id_of_conversation: dict[tuple, str] = {}
    for number, record in numbered:
        fallback_id = f"{name}-{number:05d}"
        row_id, category = fallback_id, ""
        try:
            row_id = label_of(record.get(prompt_set.id), "id") or fallback_id
            category = label_of(record.get(prompt_set.category), "category")
            answer = record.get(prompt_set.answer)
            answer = answer.strip() if isinstance(answer, str) else ""  # other data has other things in such a column
            check_unicode(answer, "answer")
            messages = messages_of_prompt(record.get(prompt_set.prompt))
            key = conversation_key(messages)
            if row_id in row_of_id:
                raise Unusable(f"row {number} has the id of row {row_of_id[row_id]}: duplicate id")
            if key in id_of_conversation:
                raise Unusable(f"duplicate prompt, same as {id_of_conversation[key]}")
        except Unusable as reason:
            skipped.append({"id": row_id, "reason": str(reason)})
            continue
        row_of_id[row_id] = number
        id_of_conversation[key] = row_id
        prompts.append(Prompt(row_id, category, messages, answer))
    return prompts, skipped


class Unusable(Exception):
    """Why one row is left out."""


def label_of(value: Any, field: str) -> str:
    """The text of an id or a category; "" where there is none."""
    if value is None or value != value:  # Parquet written by pandas has NaN for a missing number
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with a gap comes as floats
    if not isinstance(value, (str, int, float)):
        raise Unusable(f"{field} is a {type(value).__name__}, not a text or a number")
    check_unicode(str(value), field)
    return str(value).strip()


def messages_of_prompt(value: Any) -> tuple[dict[str, str], ...]:
    """Turns up to and including the last one of the user."""
    if isinstance(value, str):
        turns = _transcript_turns(value) if value.startswith("\n\nHuman:") else [("user", value)]
    elif isinstance(value, list):
        turns = [turn_of(entry, number) for number, entry in enumerate(value, start=1)]
    elif value is None:
        raise Unusable("no prompt")
    else:
        raise Unusable(f"prompt is a {type(value).__name__}, not a text or a list of messages")
    while turns and turns[-1][0] == "assistant":
        turns.pop()
    if not any(role == "user" for role, _ in turns):
        raise Unusable("no user turn")
    if turns[-1][0] != "user":
        raise Unusable(f"ends with a {turns[-1][0]} turn, not with one of the user")
    for number, (_, content) in enumerate(turns, start=1):
        if not content.strip():
            raise Unusable("empty prompt" if len(turns) == 1 else f"turn {number} is empty")
        check_unicode(content, f"turn {number}")
    return merged(turns)


def turn_of(entry: Any, number: int) -> tuple[str, str]:
    """Role and content of an entry {role, content}; `Unusable` where it is none."""
    if not isinstance(entry, dict):
        raise Unusable(f"turn {number} is a {type(entry).__name__}, not {{role, content}}")
    role, content = entry.get("role"), entry.get("content")
    if role not in ROLES:
        raise Unusable(f"turn {number} has the role {str(role)[:40]!r}, not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise Unusable(f"the content of turn {number} is a {type(content).__name__}, not a text")
    return role, content


def _transcript_turns(text: str) -> list[tuple[str, str]]:
    _, *parts = _TRANSCRIPT_TURN.split(text)
    roles = ("user" if speaker == "Human" else "assistant" for speaker in parts[::2])
    return [(role, content.strip()) for role, content in zip(roles, parts[1::2], strict=True)]


def merged(turns: list[tuple[str, str]]) -> tuple[dict[str, str], ...]:
    """Neighbours of one role joined: several chat templates take strictly alternating turns only."""
    messages: list[dict[str, str]] = []
    for role, content in turns:
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content
        else:
            messages.append({"role": role, "content": content})
    return tuple(messages)


def check_unicode(text: str, what: str) -> None:
    """`Unusable` for a text that UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a cut "\\ud83d" in JSON gives
        raise Unusable(f"{what} is not valid Unicode") from None


def conversation_key(messages: Sequence[dict[str, str]]) -> tuple:
    """Equal for conversations that differ in case and white space only."""
    return tuple((turn["role"], " ".join(turn["content"].casefold().split())) for turn in messages)


def _spread(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """One of each category in turn until there are `limit`; given back in file order."""
    turn_of_category: dict[str, int] = {}
    rank = []
    for index, prompt in enumerate(prompts):
        turn = turn_of_category.get(prompt.category, 0)
        turn_of_category[prompt.category] = turn + 1
        rank.append((turn, index))
    return [prompts[index] for index in sorted(index for _, index in sorted(rank)[:limit])]
