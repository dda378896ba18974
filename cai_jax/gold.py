"""Gold pairs: two responses to a prompt of which a person has said which is better under a principle.

A line of the file: {"id", "category", "principle", "prompt", "response_a", "response_b", "better": "a" or "b"}.
`prompt` is a text or a list of {role, content}; `category` may be left out.
"""

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cai_jax.constitution import Constitution
from cai_jax.errors import UserError
from cai_jax.prompt_files import nearest
from cai_jax.prompt_sets import PromptRows, Unusable, check_unicode, conversation_key, messages_of_prompt
from cai_jax.provenance import content_hash

_SHIPPED = importlib.resources.files("cai_jax") / "data" / "gold"
_REQUIRED = ("id", "principle", "prompt", "response_a", "response_b", "better")
_FIELDS = (*_REQUIRED, "category")


@dataclass(frozen=True)
class GoldPair:
    """One pair; `better` is "a" or "b", `principle` the id of the one that decides."""

    id: str
    category: str
    principle: str
    messages: tuple[dict[str, str], ...]
    response_a: str
    response_b: str
    better: str

    @property
    def sides(self) -> tuple[str, str]:
        """The better response and the other one."""
        pair = (self.response_a, self.response_b)
        return pair if self.better == "a" else pair[::-1]


@dataclass(frozen=True)
class Gold:
    """A gold set; `hash` is the sha256 of what its pairs say, in order."""

    source: str
    pairs: tuple[GoldPair, ...]
    hash: str


def load_gold(source: str, constitution: Constitution) -> Gold:
    """Read a gold set: a .jsonl file, or for "" the shipped one of the constitution's name.

    Of the shipped one those pairs are taken whose principle the constitution has, as a run may go by some alone. Raises
    UserError with file and line for whatever is not a gold pair, or in another file not under one of its principles.
    """
    path = Path(source).expanduser() if source else _shipped(constitution.name)
    if path.suffix != ".jsonl" or not path.is_file():
        raise UserError(f"judge.gold ({source}): must be a .jsonl file that is there; check the path")
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    known = [principle.id for principle in constitution.principles]
    pairs, line_of = [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pair = _pair(line)
            if source and pair.principle not in known:
                raise Unusable(f"the constitution has no principle {pair.principle!r}{nearest(pair.principle, known)}")
            if pair.id in line_of:
                raise Unusable(f"the id {pair.id!r} stands in line {line_of[pair.id]} too")
        except Unusable as reason:
            raise UserError(f"{path}:{number}: {reason}") from None
        line_of[pair.id] = number
        if pair.principle in known:
            pairs.append(pair)
    if not pairs:
        raise UserError(f"{path}: has no pair for the principles of {constitution.path}; set judge.gold to a file that "
                        "has at least one")
    digest = content_hash([[getattr(pair, name) for name in GoldPair.__dataclass_fields__] for pair in pairs])
    return Gold(source or f"shipped:{constitution.name}", tuple(pairs), digest)


def check_apart(gold: Gold, sets: Mapping[str, PromptRows]) -> None:
    """Refuse a gold prompt that stands in a prompt set of the run; case and white space do not count."""
    used = {conversation_key(row.messages): f"{name} {row.id}" for name, rows in sets.items() for row in rows.rows}
    shared = [
        f"{pair.id} = {used[key]}" for pair in gold.pairs if (key := conversation_key(pair.messages)) in used
    ]
    if shared:
        more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
        raise UserError(f"judge.gold ({gold.source}): gold prompts stand in the run's prompt sets too: "
                        f"{'; '.join(shared[:5])}{more}; take them out of one side")


def _shipped(name: str) -> Path:
    names = sorted(entry.name.removesuffix(".jsonl") for entry in _SHIPPED.iterdir())
    if name not in names:
        raise UserError(f"judge.gold: no gold set ships for the constitution {name!r}{nearest(name, names)}; "
                        "set judge.gold to a .jsonl file of your own")
    return Path(str(_SHIPPED / f"{name}.jsonl"))


def _pair(line: str) -> GoldPair:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise Unusable(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise Unusable("must be a JSON object")
    for name in record:
        if name not in _FIELDS:
            raise Unusable(f"unknown field {name!r}{nearest(name, list(_FIELDS))}")
    for name in _REQUIRED:
        if name not in record:
            raise Unusable(f"no field {name!r}")
    for name in record.keys() - {"prompt"}:
        if not isinstance(record[name], str):
            raise Unusable(f"{name} must be a text, not {record[name]!r}")
        check_unicode(record[name], name)
    if not record["id"].strip():
        raise Unusable("id is empty")
    if record["better"] not in ("a", "b"):
        raise Unusable(f"better must be 'a' or 'b', not {record['better']!r}")
    if record["response_a"] == record["response_b"]:
        raise Unusable("both responses are the same")
    texts = record["response_a"], record["response_b"], record["better"]
    messages = messages_of_prompt(record["prompt"])
    return GoldPair(record["id"], record.get("category", ""), record["principle"], messages, *texts)
