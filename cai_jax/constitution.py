"""The written constitution: principles, examples and exact rules, read from YAML and checked whole.

    name: brief_answers
    version: 1
    principles:
      - id: brief
        title: Keep it short
        category: format
        critique_request: Is your answer longer than 20 words? Say so in one sentence.
        revision_request: Rewrite your answer in at most 20 words. Give only the new answer.
        preference_question: Which response is shorter?
        check: {max_words: 20}        # optional: a rule on the response, an exact ground truth
        opposite: Ramble on.          # optional: asks for a reply that breaks the principle
        aim: helpful                  # optional: harmless or helpful, what the principle is for
    few_shots:                        # optional
      critique:
        - {prompt: ..., response: ..., principle: brief, critique: ..., revision: ...}
      preference:
        - {prompt: ..., principle: brief, response_a: ..., response_b: ..., answer: A}
"""

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import date, datetime
from pathlib import Path

from cai_jax.errors import UserError, did_you_mean
from cai_jax.provenance import content_hash
from cai_jax.rules import RULES, Check, contradiction, listed, set_bounds
from cai_jax.strict_yaml import read_yaml

# What a principle is for. Bai et al. (2022, section 4.1) judge harmlessness on red-team prompts, helpfulness on others.
AIMS = ("harmless", "helpful")


@dataclass(frozen=True)
class Principle:
    """One rule of the constitution, with the words that ask for critique, revision and preference."""

    id: str
    title: str
    category: str
    critique_request: str
    revision_request: str
    preference_question: str
    check: Check | None
    hash: str  # of all that is written
    opposite: str = ""  # how a reply that breaks the principle is asked for; "": from the title
    aim: str = ""  # one of AIMS; "": not said


@dataclass(frozen=True)
class CritiqueExample:
    """A worked example of critique and revision under the principle whose id it names."""

    prompt: str
    response: str
    principle: str
    critique: str
    revision: str


@dataclass(frozen=True)
class PreferenceExample:
    """A worked example of a comparison under the principle whose id it names."""

    prompt: str
    principle: str
    response_a: str
    response_b: str
    answer: str  # "A" or "B": the response that follows the principle better


@dataclass(frozen=True)
class Constitution:
    """A constitution that `load_constitution` has checked.

    `hash` is the sha256 of the content: the order of keys, layout and comments do not change it, any word
    does, and so does the order of principles or examples (draws depend on it).
    """

    name: str
    version: str
    principles: tuple[Principle, ...]
    critique_few_shots: tuple[CritiqueExample, ...]
    preference_few_shots: tuple[PreferenceExample, ...]
    hash: str
    path: str

    def principle(self, id: str) -> Principle:
        """The principle of this id; UserError with the nearest one where there is none."""
        for principle in self.principles:
            if principle.id == id:
                return principle
        nearest = did_you_mean(id, [principle.id for principle in self.principles])
        raise UserError(f"{self.path}: there is no principle {id!r}{nearest}")

    def matching(self, category: str, aim: str) -> tuple[Principle, ...]:
        """The principles of an aim and a category; without such those of the aim, and without these all.

        A principle that says no aim is of either.
        """
        of_aim = tuple(principle for principle in self.principles if principle.aim in ("", aim))
        return tuple(p for p in of_aim if category and p.category == category) or of_aim or self.principles

    @property
    def aims(self) -> tuple[str, ...]:
        """The aims of its principles, "" where one says none; in their order."""
        return tuple(dict.fromkeys(principle.aim for principle in self.principles))

    def worked(self, principles: Sequence[Principle] = ()) -> tuple[CritiqueExample, ...]:
        """The worked critiques whose principles have an aim of these; all where none has, or none are given."""
        unlike = self.unlike(principles)
        return tuple(shot for shot in self.critique_few_shots if shot not in unlike) or self.critique_few_shots

    def unlike(self, principles: Sequence[Principle]) -> tuple[CritiqueExample, ...]:
        """The worked critiques whose principles have another aim than these; none where none are given."""
        aims = {principle.aim for principle in principles or self.principles}
        return tuple(shot for shot in self.critique_few_shots if self.principle(shot.principle).aim not in aims)


def load_constitution(path: str | Path, principles: Sequence[str] = ()) -> Constitution:
    """The constitution in a YAML file, or the shipped one of that name ("harmless_helpful").

    What holds a path separator or ends in .yaml or .yml is a path; anything else is a shipped name. Raises
    UserError that names file, principle and field for whatever is not as the schema says. `principles` names those to
    keep, with their examples; without it all.
    """
    file = _find(path)
    constitution = _constitution(read_yaml(file, as_written="version"), str(file))
    return _only(constitution, principles) if principles else constitution


def _only(whole: Constitution, ids: Sequence[str]) -> Constitution:
    for name in ids:
        whole.principle(name)
    parts = {
        "principles": tuple(principle for principle in whole.principles if principle.id in ids),
        **{name: tuple(shot for shot in getattr(whole, name) if shot.principle in ids)
           for name in ("critique_few_shots", "preference_few_shots")},
    }  # fmt: skip
    return replace(whole, **parts, hash=content_hash([whole.hash, [principle.id for principle in parts["principles"]]]))


def shipped_constitutions() -> list[str]:
    """The names of the constitutions that come with the package."""
    return sorted(path.stem for path in _shipped_folder().glob("*.yaml"))


# ---------------------------------------------------------------- files


def _shipped_folder() -> Path:
    """constitutions/ inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "constitutions"
    return inside if inside.is_dir() else package.parent / "constitutions"


def _find(path: str | Path) -> Path:
    text = os.fspath(path)
    if isinstance(path, Path) or os.sep in text or text.endswith((".yaml", ".yml")):
        return Path(path).expanduser()
    names = shipped_constitutions()
    if text in names:
        return _shipped_folder() / f"{text}.yaml"
    raise UserError(
        f"constitution: there is no shipped one named {text!r}{did_you_mean(text, names)}"
        f" (shipped: {', '.join(names)}; for a file of your own give its path, ending in .yaml)"
    )


# ---------------------------------------------------------------- schema

_TOP = ("name", "version", "principles")
_REQUESTS = ("critique_request", "revision_request", "preference_question")
_TYPE_NAMES = {
    bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list",
    dict: "a mapping", date: "a date", datetime: "a date",
}  # fmt: skip


def _constitution(data, path: str) -> Constitution:
    if data is None:
        raise _fault(path, f"the file is empty; a constitution has {listed(_TOP)}")
    _check_keys(data, path, required=_TOP, optional=("few_shots",))
    name, version = _line(data, "name", path), _line(data, "version", path)
    principles = tuple(
        _principle(item, f"{path}: principle {number}")
        for number, item in enumerate(_list(data, "principles", path), start=1)
    )
    if not principles:
        raise _fault(path, "principles is empty; write at least one")
    _refuse_double_ids(principles, path)
    critique, preference = _few_shots(data, path, [principle.id for principle in principles])
    content = {
        "name": name,
        "version": version,
        "principles": [principle.hash for principle in principles],
        "critique": critique,
        "preference": preference,
    }
    return Constitution(name, version, principles, critique, preference, content_hash(content), path)


def _principle(data, where: str) -> Principle:
    if isinstance(data, dict) and isinstance(data.get("id"), str) and data["id"].strip():
        where = f"{where} ({_shown(data['id'])})"
    _check_keys(data, where, required=("id", "title", "category", *_REQUESTS), optional=("check", "opposite", "aim"))
    content = {name: _line(data, name, where) for name in ("id", "title", "category")}
    if len(content["id"].split()) > 1:
        raise _fault(where, "id must not hold white space; write for example no_weapons")
    content |= {name: _text(data, name, where) for name in _REQUESTS}
    check = _check(data["check"], where) if "check" in data else None
    opposite = _text(data, "opposite", where) if "opposite" in data else ""
    aim = _aim(data, where) if "aim" in data else ""
    # What is not set stays out of the hash: a new field or kind of rule changes no old hash.
    written = {"check": set_bounds(check) if check else None, "opposite": opposite, "aim": aim}
    hashed = content | {name: value for name, value in written.items() if value}
    return Principle(**content, check=check, hash=content_hash(hashed), opposite=opposite, aim=aim)


def _aim(data, where: str) -> str:
    aim = _line(data, "aim", where)
    if aim not in AIMS:
        raise _fault(where, f"aim must be {listed(AIMS, last='or')}, not {_shown(aim)}{did_you_mean(aim, AIMS)}")
    return aim


def _refuse_double_ids(principles: tuple[Principle, ...], path: str) -> None:
    numbers = {}
    for number, principle in enumerate(principles, start=1):
        first = numbers.setdefault(principle.id, number)
        if first != number:
            where = f"{path}: principle {number} ({_shown(principle.id)})"
            raise _fault(where, f"principle {first} has the same id; ids must differ")


def _check(data, where: str) -> Check:
    _check_keys(data, where, optional=tuple(RULES), prefix="check")
    if not data:
        raise _fault(where, f"check is empty; remove it, or set {listed(RULES, last='or')}")
    for name, bound in data.items():
        if RULES[name].type is int and (type(bound) is not int or bound < 1):
            raise _fault(where, f"check.{name} must be a whole number of at least 1, not {_shown(bound)}")
        if RULES[name].type is str:
            _require_text(bound, f"check.{name}", where, blank="")
        if name.endswith("_pattern"):
            _require_pattern(bound, f"check.{name}", where)
    check = Check(**data)
    if why := contradiction(check):
        raise _fault(where, f"check: {why}")
    return check


def _require_pattern(pattern: str, field: str, where: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise _fault(where, f"{field} is not a Python regular expression: {error}") from None


def _few_shots(data: dict, path: str, ids: list[str]) -> tuple[tuple, tuple]:
    if "few_shots" not in data:
        return (), ()
    shots = data["few_shots"]
    _check_keys(shots, path, optional=("critique", "preference"), prefix="few_shots")
    return (
        _examples(CritiqueExample, shots, "critique", path, ids),
        _examples(PreferenceExample, shots, "preference", path, ids),
    )


def _examples(kind: type, shots: dict, name: str, path: str, ids: list[str]) -> tuple:
    items = _list(shots, name, path, prefix="few_shots.") if name in shots else []
    return tuple(
        _example(kind, item, f"{path}: few_shots.{name} {number}", ids)
        for number, item in enumerate(items, start=1)
    )


def _example(kind: type, data, where: str, ids: list[str]):
    names = tuple(f.name for f in fields(kind))
    _check_keys(data, where, required=names)
    example = kind(**{name: _text(data, name, where) for name in names})
    if example.principle not in ids:
        nearest = did_you_mean(example.principle, ids)
        raise _fault(where, f"principle names {_shown(example.principle)}, which is no principle{nearest}")
    if kind is PreferenceExample and example.answer not in ("A", "B"):
        raise _fault(where, f"answer must be A or B, not {_shown(example.answer)}")
    if kind is PreferenceExample and example.response_a == example.response_b:
        raise _fault(where, "response_a and response_b are the same text; one of them must be better")
    return example


# ---------------------------------------------------------------- fields


def _check_keys(data, where: str, required=(), optional=(), prefix: str = "") -> None:
    """`data` is a mapping that has every required field and none that is unknown."""
    known = (*required, *optional)
    if not isinstance(data, dict):
        named = f"{prefix} must" if prefix else "must"
        raise _fault(where, f"{named} be a mapping with {listed(required or known)}, not {_type_name(data)}")
    dot = f"{prefix}." if prefix else ""
    for key in data:
        if key not in known:
            nearest = did_you_mean(str(key), known) or f" (known: {listed(known)})"
            raise _fault(where, f"unknown field {dot}{_shown(key)}{nearest}")
    for name in required:
        if name not in data:
            raise _fault(where, f"field {dot}{name} is missing")


def _list(data: dict, name: str, where: str, prefix: str = "") -> list:
    if not isinstance(data[name], list):
        raise _fault(where, f"{prefix}{name} must be a list, not {_type_name(data[name])}")
    return data[name]


def _text(data: dict, name: str, where: str) -> str:
    """A text without the white space around it: how a YAML block ends is layout, not content."""
    _require_text(data[name], name, where, blank=None)
    return data[name].strip()


def _line(data: dict, name: str, where: str) -> str:
    text = _text(data, name, where)
    if len(text.splitlines()) > 1:
        raise _fault(where, f"{name} must be a single line")
    return text


def _require_text(value, name: str, where: str, blank: str | None) -> None:
    """`value` is a text that holds more than `blank` (None: white space), and no control characters."""
    if value is None or (isinstance(value, str) and not value.strip(blank)):
        raise _fault(where, f"{name} is empty; write a text")
    if not isinstance(value, str):
        hint = "" if isinstance(value, (list, dict)) else "; put it in quotes"
        raise _fault(where, f"{name} must be a text, not {_type_name(value)}{hint}")
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n":
            raise _fault(where, f"{name} holds U+{ord(character):04X}, which does not belong in a text")


def _type_name(value) -> str:
    return "nothing" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)


def _shown(value) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _fault(where: str, what: str) -> UserError:
    return UserError(_one_line(f"{where}: {what}"))
