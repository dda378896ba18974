"""The constitution: shipped ones, every mistake in a file, hashes."""

from datetime import date

import pytest
import yaml

from cai_jax import constitution as module
from cai_jax.config import Sampler
from cai_jax.constitution import AIMS, CritiqueExample, PreferenceExample, load_constitution
from cai_jax.errors import UserError
from cai_jax.rules import Check, satisfies

SHIPPED = ("harmless_helpful", "verifiable")
HARMS = {
    "violence", "weapons", "self_harm", "crime", "cyber", "privacy", "hate", "sexual", "drugs", "fraud",
    "misinformation", "medical",
}  # fmt: skip


def plain() -> dict:
    """A small constitution as YAML would hold it, to be broken."""
    return {
        "name": "small",
        "version": 1,
        "principles": [
            {
                "id": name,
                "title": f"Title of {name}",
                "category": "format",
                "critique_request": f"Does your answer keep to {name}?",
                "revision_request": f"Rewrite your answer to keep to {name}.",
                "preference_question": f"Which response keeps to {name}?",
            }
            for name in ("brief", "digits")
        ],
        "few_shots": {
            "critique": [
                {"prompt": "Hi", "response": "Hello you", "principle": "brief", "critique": "Long.", "revision": "Hi"}
            ],
            "preference": [
                {"prompt": "Hi", "principle": "digits", "response_a": "1", "response_b": "one", "answer": "B"}
            ],
        },
    }


def write(folder, data, **style) -> str:
    path = folder / "mine.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False, **style))
    return str(path)


def load(folder, data, **style):
    return load_constitution(write(folder, data, **style))


# ---------------------------------------------------------------- shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_constitutions_load_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    constitution = load_constitution(name)
    assert constitution.name == name
    assert constitution.critique_few_shots and constitution.preference_few_shots
    assert len({principle.hash for principle in constitution.principles}) == len(constitution.principles)


def test_harmless_helpful_covers_harms_and_the_other_side():
    constitution = load_constitution("harmless_helpful")
    categories = {principle.category for principle in constitution.principles}
    assert len(constitution.principles) >= 18
    assert HARMS <= categories
    assert {"over_refusal", "preachiness", "honesty"} <= categories
    for field in ("title", "critique_request", "revision_request", "preference_question"):
        texts = [getattr(principle, field) for principle in constitution.principles]
        assert len(set(texts)) == len(texts), field


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_requests_are_short_and_ask_for_the_answer_alone(name):
    for principle in load_constitution(name).principles:
        assert len(principle.critique_request.split()) <= 35, principle.id
        assert len(principle.revision_request.split()) <= 35, principle.id
        assert principle.revision_request.startswith("Rewrite your answer"), principle.id
        assert principle.revision_request.endswith("Give only the new answer."), principle.id
        assert principle.preference_question.startswith("Which response"), principle.id
        assert principle.preference_question.endswith("?"), principle.id


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_critique_examples_answer_the_question_and_change_the_response(name):
    for example in load_constitution(name).critique_few_shots:
        assert example.critique.startswith("Yes. "), example.prompt
        assert example.revision not in (example.response, example.critique)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_preference_examples_favour_no_position(name):
    answers = [example.answer for example in load_constitution(name).preference_few_shots]
    assert answers.count("A") == answers.count("B") > 0


@pytest.mark.parametrize("aim", AIMS)
def test_critique_preamble_of_harmless_helpful_leaves_room_for_the_row(aim):
    constitution = load_constitution("harmless_helpful")
    principles = [principle for principle in constitution.principles if principle.aim == aim]
    texts = []
    for example in constitution.worked(principles):
        principle = constitution.principle(example.principle)
        texts += [principle.critique_request, principle.revision_request]
        texts += [example.prompt, example.response, example.critique, example.revision]
    # About 1.3 tokens a word in English, and some five more for the template around each message.
    assert 1.3 * len(" ".join(texts).split()) + 5 * len(texts) < Sampler().max_length - 700


def test_examples_of_verifiable_are_true_by_their_own_checks():
    constitution = load_constitution("verifiable")
    assert len(constitution.principles) >= 4
    assert all(principle.check for principle in constitution.principles)
    for example in constitution.critique_few_shots:
        check = constitution.principle(example.principle).check
        assert not satisfies(check, example.response)
        assert satisfies(check, example.revision)
    for example in constitution.preference_few_shots:
        check = constitution.principle(example.principle).check
        better, worse = example.response_a, example.response_b
        if example.answer == "B":
            better, worse = worse, better
        assert satisfies(check, better) and not satisfies(check, worse)


@pytest.mark.parametrize(
    ("id", "kept", "broken"),
    [
        ("brief", "word " * 20, "word " * 21),
        ("closing_words", "Boil it.\nI hope this helps.\n", "I hope this helps. Boil it."),
        ("opening_words", "\n In short, boil it.", "So, in short, boil it."),
        ("no_digits", "four eggs", "\u0664 eggs"),
        ("no_exclamation", "Boil it.", "Boil it\uff01"),
        ("no_lists", "A well-known fact - salt it. In 1999. Then 2) rest.", "Take:\n  - eggs\n"),
        ("no_lists", "*Boil* it.\n-5 degrees is cold.", "First:\n1. eggs"),
    ],
)
def test_verifiable_principles_tell_kept_from_broken(id, kept, broken):
    check = load_constitution("verifiable").principle(id).check
    assert satisfies(check, kept)
    assert not satisfies(check, broken)


# ---------------------------------------------------------------- what a file becomes


def test_everything_in_the_file_arrives(tmp_path):
    data = plain()
    data["principles"][0]["check"] = {"max_words": 3, "ends_with": "."}
    path = write(tmp_path, data)
    constitution = load_constitution(path)
    assert (constitution.name, constitution.version, constitution.path) == ("small", "1", path)
    for principle, written in zip(constitution.principles, data["principles"], strict=True):
        for field in written.keys() - {"check"}:
            assert getattr(principle, field) == written[field]
    assert constitution.principles[0].check == Check(max_words=3, ends_with=".")
    assert constitution.principles[1].check is None
    assert constitution.critique_few_shots == (CritiqueExample(**data["few_shots"]["critique"][0]),)
    assert constitution.preference_few_shots == (PreferenceExample(**data["few_shots"]["preference"][0]),)
    assert constitution.principle("digits") is constitution.principles[1]
    with pytest.raises(UserError, match="no principle 'digit'; did you mean digits?"):
        constitution.principle("digit")


def test_few_shots_and_their_kinds_are_optional(tmp_path):
    data = plain()
    del data["few_shots"]["critique"]
    assert load(tmp_path, data).critique_few_shots == ()
    assert len(load(tmp_path, data).preference_few_shots) == 1
    del data["few_shots"]
    assert load(tmp_path, data).preference_few_shots == ()


@pytest.mark.parametrize("version", ["1.10", "2026-11-23", "0x10", "'1.10'", "v2-beta"])
def test_version_stays_as_written(tmp_path, version):
    text = yaml.safe_dump(plain()).replace("version: 1", f"version: {version}")
    assert load(tmp_path, text).version == version.strip("'")


def test_wheel_folder_comes_before_the_checkout(tmp_path, monkeypatch):
    package = tmp_path / "cai_jax"
    for folder in (tmp_path / "constitutions", package / "constitutions"):
        folder.mkdir(parents=True)
        write(folder, plain() | {"name": f"from_{folder.parent.name}"})
    monkeypatch.setattr(module, "__file__", str(package / "constitution.py"))
    assert load_constitution("mine").name == "from_cai_jax"


# ---------------------------------------------------------------- hashes


def reversed_keys(data):
    if isinstance(data, dict):
        return {key: reversed_keys(data[key]) for key in reversed(data)}
    return [reversed_keys(item) for item in data] if isinstance(data, list) else data


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("style", [{}, {"default_flow_style": True}, {"default_style": '"'}, {"width": 30}])
def test_layout_does_not_change_hashes(tmp_path, name, style):
    shipped = load_constitution(name)
    with open(shipped.path, encoding="utf-8") as file:
        data = yaml.safe_load(file)
    copy = load(tmp_path, reversed_keys(data), **style)
    assert copy.hash == shipped.hash
    assert [p.hash for p in copy.principles] == [p.hash for p in shipped.principles]


def places(data, path=()):
    """Every text and number in a constitution, as a path of keys."""
    if isinstance(data, dict):
        return [place for key, value in data.items() for place in places(value, (*path, key))]
    if isinstance(data, list):
        return [place for key, value in enumerate(data) for place in places(value, (*path, key))]
    return [path]


def changed(data, path, value):
    copy = yaml.safe_load(yaml.safe_dump(data))
    *parents, last = path
    node = copy
    for key in parents:
        node = node[key]
    node[last] = value(node[last])
    return copy


def another(value):
    swapped = {"A": "B", "B": "A", "brief": "digits", "digits": "brief"}
    return value + 1 if isinstance(value, int) else swapped.get(value, value + "x")


def with_checks() -> dict:
    data = plain()
    data["principles"][1]["check"] = {"max_words": 3, "required_pattern": "a", "ends_with": "a."}
    return data


@pytest.mark.parametrize("place", places(with_checks()), ids=lambda place: ".".join(map(str, place)))
def test_every_word_counts_in_the_hash(tmp_path, place):
    before = load(tmp_path, with_checks())
    data = changed(with_checks(), place, another)
    if place[-1] == "id":  # two must not have the same, and the example goes with its principle
        data["principles"][place[1]]["id"] = "renamed"
        data["few_shots"][("critique", "preference")[place[1]]][0]["principle"] = "renamed"
    after = load(tmp_path, data)
    assert after.hash != before.hash
    differs = [old.hash != new.hash for old, new in zip(before.principles, after.principles, strict=True)]
    assert differs == [place[:2] == ("principles", number) for number in range(2)]


def test_order_of_principles_and_moving_a_rule_between_fields_count_in_the_hash(tmp_path):
    before = load(tmp_path, plain())
    swapped = plain()
    swapped["principles"].reverse()
    assert load(tmp_path, swapped).hash != before.hash
    ends, starts = plain(), plain()
    ends["principles"][0]["check"] = {"ends_with": "x"}
    starts["principles"][0]["check"] = {"starts_with": "x"}
    assert load(tmp_path, ends).hash != load(tmp_path, starts).hash


# ---------------------------------------------------------------- mistakes


def fails(path, *named) -> str:
    with pytest.raises(UserError) as raised:
        load_constitution(path)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    for words in (str(path), *named):
        assert words in message
    return message


REMOVED = object()
MISTAKES = {
    # place in plain(), value put there, words in the message
    "no name": (("name",), REMOVED, ["field name is missing"]),
    "name is null": (("name",), None, ["name is empty"]),
    "name of two lines": (("name",), "a\nb", ["name must be a single line"]),
    "version true": (("version",), True, ["version must be a text", "true or false"]),
    "no version": (("version",), REMOVED, ["field version is missing"]),
    "principles is a text": (("principles",), "be kind", ["principles must be a list", "a text"]),
    "no principles": (("principles",), [], ["principles is empty"]),
    "principle is a text": (("principles", 1), "be kind", ["principle 2", "must be a mapping", "a text"]),
    "principle is null": (("principles", 0), None, ["principle 1", "must be a mapping", "nothing"]),
    "title missing": (("principles", 1, "title"), REMOVED, ["principle 2 (digits)", "field title is missing"]),
    "title empty": (("principles", 1, "title"), "  ", ["principle 2 (digits)", "title is empty"]),
    "title nbsp": (("principles", 1, "title"), "\u00a0", ["principle 2 (digits)", "title is empty"]),
    "title number": (("principles", 1, "title"), 7, ["principle 2 (digits)", "title must be a text", "in quotes"]),
    "title list": (("principles", 0, "title"), ["a"], ["principle 1 (brief)", "title must be a text", "a list"]),
    "request is date": (
        ("principles", 0, "revision_request"),
        date(2026, 1, 2),
        ["principle 1 (brief)", "revision_request must be a text", "a date"],
    ),
    "control character": (
        ("principles", 0, "critique_request"),
        "a\0b",
        ["principle 1 (brief)", "critique_request", "U+0000"],
    ),
    "id missing": (("principles", 1, "id"), REMOVED, ["principle 2:", "field id is missing"]),
    "id number": (("principles", 1, "id"), 3, ["principle 2:", "id must be a text"]),
    "id with space": (("principles", 1, "id"), "no digits", ["principle 2 (no digits)", "id must not hold"]),
    "same id": (("principles", 1, "id"), "brief", ["principle 2 (brief)", "principle 1 has the same id"]),
    "check null": (("principles", 0, "check"), None, ["principle 1 (brief)", "check must be a mapping"]),
    "check list": (("principles", 0, "check"), [1], ["principle 1 (brief)", "check must be a mapping", "a list"]),
    "check empty": (("principles", 0, "check"), {}, ["principle 1 (brief)", "check is empty"]),
    "check key": (
        ("principles", 0, "check"),
        {"max_word": 3},
        ["principle 1 (brief)", "unknown field check.max_word; did you mean max_words?"],
    ),
    "bound zero": (("principles", 0, "check"), {"max_words": 0}, ["(brief)", "check.max_words", "at least 1", "0"]),
    "bound below": (("principles", 0, "check"), {"min_words": -2}, ["(brief)", "check.min_words", "-2"]),
    "bound fraction": (("principles", 0, "check"), {"max_characters": 1.5}, ["check.max_characters", "1.5"]),
    "bound text": (("principles", 0, "check"), {"max_words": "3"}, ["check.max_words must be a whole number"]),
    "bound true": (("principles", 0, "check"), {"max_words": True}, ["check.max_words", "True"]),
    "bounds cross": (
        ("principles", 0, "check"),
        {"min_words": 5, "max_words": 4},
        ["principle 1 (brief)", "check", "min_words 5", "max_words 4"],
    ),
    "too few characters for words": (
        ("principles", 0, "check"),
        {"min_words": 5, "max_characters": 8},
        ["(brief)", "check", "max_characters 8"],
    ),
    "end longer than text": (
        ("principles", 0, "check"),
        {"ends_with": "Bye now", "max_words": 1},
        ["(brief)", "check", "ends_with"],
    ),
    "end is white space": (("principles", 0, "check"), {"ends_with": "a "}, ["(brief)", "ends_with"]),
    "pattern number": (("principles", 0, "check"), {"required_pattern": 3}, ["check.required_pattern must be a text"]),
    "pattern empty": (("principles", 0, "check"), {"forbidden_pattern": ""}, ["check.forbidden_pattern is empty"]),
    "pattern bad": (
        ("principles", 1, "check"),
        {"required_pattern": "(a"},
        ["principle 2 (digits)", "check.required_pattern is not a Python regular expression", "unterminated"],
    ),
    "pattern huge": (
        ("principles", 1, "check"),
        {"forbidden_pattern": "a{99999999999999999999}"},
        ["principle 2 (digits)", "check.forbidden_pattern is not"],
    ),
    "few_shots null": (("few_shots",), None, ["few_shots must be a mapping", "nothing"]),
    "few_shots key": (
        ("few_shots", "critiques"),
        [],
        ["unknown field few_shots.critiques; did you mean critique?"],
    ),
    "few_shots mapping": (("few_shots", "critique"), {}, ["few_shots.critique must be a list", "a mapping"]),
    "example null": (("few_shots", "critique", 0), None, ["few_shots.critique 1", "must be a mapping"]),
    "example field": (("few_shots", "critique", 0, "revision"), REMOVED, ["few_shots.critique 1", "revision"]),
    "example empty": (("few_shots", "preference", 0, "response_a"), "", ["few_shots.preference 1", "response_a"]),
    "example of no principle": (
        ("few_shots", "critique", 0, "principle"),
        "digit",
        ["few_shots.critique 1", "principle names digit", "did you mean digits?"],
    ),
    "answer": (("few_shots", "preference", 0, "answer"), "C", ["few_shots.preference 1", "answer must be A or B"]),
    "same responses": (("few_shots", "preference", 0, "response_a"), "one", ["few_shots.preference 1", "same"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_place(tmp_path, mistake):
    (*parents, last), value, named = MISTAKES[mistake]
    data = plain()
    node = data
    for key in parents:
        node = node[key]
    if value is REMOVED:
        del node[last]
    else:
        node[last] = value
    fails(write(tmp_path, data), *named)


@pytest.mark.parametrize(
    ("place", "key", "nearest"),
    [
        ((), "principle", "principles"),
        (("principles", 1), "critique_reqest", "critique_request"),
        (("few_shots", "preference", 0), "respnse_a", "response_a"),
    ],
)
def test_an_unknown_field_is_met_with_the_nearest_one(tmp_path, place, key, nearest):
    data = plain()
    node = data
    for step in place:
        node = node[step]
    node[key] = node.pop(nearest)
    fails(write(tmp_path, data), f"unknown field {key}; did you mean {nearest}?")
    del node[key]
    node[17] = "x"
    fails(write(tmp_path, data), "unknown field 17")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", ["empty"]),
        ("# only a comment\n", ["empty"]),
        ("null\n", ["empty"]),
        ("- a\n- b\n", ["must be a mapping with name, version and principles", "a list"]),
        ("be kind\n", ["must be a mapping", "a text"]),
        ("name: a\nversion: [1\n", ["line 3", "not valid YAML"]),
        ("name: a\n\tversion: 1\n", ["line 2", "not valid YAML"]),
        ("name: a\nversion: 1\nname: b\n", ["line 3", "field name is given twice (first on line 1)"]),
        ("name: a\nprinciples:\n- {id: a, title: b, id: c}\n", ["line 3", "id is given twice"]),
        ("name: a\nversion: b\n---\nname: c\n", ["line 3", "not valid YAML"]),
        ("name: a\nversion: 1\nprinciples: 2024-13-45\n", ["line 3", "put it in quotes"]),
        ("name: a\nversion: 1\nprinciples: !!python/object:os.system {}\n", ["line 3", "not valid YAML"]),
        ("name: a\nversion: 1\nprinciples: *nowhere\n", ["line 3", "not valid YAML"]),
        ("name: &a [*a]\nversion: 1\nprinciples: []\n", ["name must be a text", "a list"]),
        ("name: a\nversion: 1\nprinciples: " + "9" * 5000 + "\n", ["line 3", "put it in quotes"]),
        ("[" * 5000, ["nested too deeply"]),
        ("? [a]\n: b\n", ["line 1", "not valid YAML"]),
        ("name: a\nversion: \x07\n", ["line 2", "U+0007"]),
    ],
)
def test_a_file_that_is_no_constitution(tmp_path, text, named):
    fails(write(tmp_path, text), *named)


def test_a_file_in_another_encoding_is_named_with_its_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes("name: caf\n# \xe9\n".encode("latin-1"))
    fails(path, "line 2", "UTF-8")
    path.write_bytes(yaml.safe_dump(plain()).encode("utf-16"))
    fails(path, "line 1", "UTF-8")
    path.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(plain()).encode())
    assert load_constitution(path).name == "small"


def test_a_path_that_is_no_file(tmp_path):
    fails(tmp_path / "nothing.yaml", "No such file")
    fails(tmp_path, "directory")
    with pytest.raises(UserError, match="'harmless_helpfull'; did you mean harmless_helpful.*verifiable"):
        load_constitution("harmless_helpfull")


def test_cutting_a_file_anywhere_never_ends_in_a_traceback(tmp_path):
    """Half a download, a stray keystroke: either it loads or one line says why."""
    text = yaml.safe_dump(with_checks())
    for cut in range(0, len(text), 7):
        for broken in (text[:cut], text[:cut] + ":" + text[cut:], text[:cut] + text[cut + 3 :]):
            path = write(tmp_path, broken)
            try:
                load_constitution(path)
            except UserError as error:
                assert len(str(error).splitlines()) == 1 and str(error).startswith(path)


def test_a_run_may_go_by_some_principles():
    whole = load_constitution("verifiable")
    some = load_constitution("verifiable", ("no_digits", "brief"))
    assert [principle.id for principle in some.principles] == ["brief", "no_digits"]  # in the constitution's order
    assert [shot.principle for shot in some.critique_few_shots] == ["no_digits"] and not some.preference_few_shots
    assert some.hash != whole.hash and some.hash == load_constitution("verifiable", ("brief", "no_digits")).hash
    with pytest.raises(UserError, match="no principle 'no_digit'; did you mean no_digits"):
        load_constitution("verifiable", ("no_digit",))


def test_an_aim_is_one_of_two_and_stays_out_of_the_hash_where_it_is_not_said(tmp_path):
    data = plain()
    silent = load(tmp_path, data)
    data["principles"][0]["aim"] = "helpful"
    said = load(tmp_path, data)
    assert (silent.principles[0].aim, said.principles[0].aim) == ("", "helpful") and silent.hash != said.hash
    data["principles"][0]["aim"] = "helpfull"
    with pytest.raises(UserError, match=r"aim must be harmless or helpful, not helpfull.*did you mean"):
        load(tmp_path, data)


def test_principles_match_by_category_then_by_aim():
    constitution = load_constitution("harmless_helpful")
    assert {p.id for p in constitution.matching("crime", "harmless")} == {"no_help_with_crime", "no_hiding_of_crime"}
    for aim in AIMS:
        found = constitution.matching("cooking", aim)
        assert found and {p.aim for p in found} == {aim} and constitution.matching("", aim) == found
    verifiable = load_constitution("verifiable")  # says no aims
    assert verifiable.matching("cooking", "helpful") == verifiable.principles
    assert verifiable.worked(verifiable.principles[:1]) == verifiable.critique_few_shots


def test_a_category_of_the_other_aim_does_not_match():
    constitution = load_constitution("harmless_helpful")
    assert {p.aim for p in constitution.matching("medical", "helpful")} == {"helpful"}
    assert [p.id for p in constitution.matching("medical", "harmless")] == ["careful_with_health"]
