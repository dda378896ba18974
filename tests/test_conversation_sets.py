"""Sets of conversations: the mixer's grammar, what is drawn, what is left out and by which name."""

import json

import pytest

from cai_jax.conversation_sets import draw, load_conversations, parse_mixer
from cai_jax.errors import UserError
from cai_jax.prompt_sets import Prompt, PromptRows


def talk(*turns, **columns):
    roles = ("user", "assistant")
    return columns | {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_an_empty_mixer_is_all_of_the_runs_own_sets():
    assert parse_mixer(()) == {"revisions": 1.0, "helpful": 1.0}
    assert parse_mixer(("helpful=0.5", "a=b/c.jsonl=1")) == {"helpful": 0.5, "a=b/c.jsonl": 1.0}


@pytest.mark.parametrize("mixer, told", [
    (("helpful",), "'helpful' must be SET=FRACTION"), (("=1",), "must be SET=FRACTION"),
    (("helpful=0",), "above 0 and at most 1"), (("helpful=1.5",), "at most 1"), (("helpful=nan",), "above 0"),
    (("helpful=x",), "must be SET=FRACTION"), (("a=1", "a=0.5"), "named twice"),
])  # fmt: skip
def test_a_wrong_mixer_is_one_line(mixer, told):
    with pytest.raises(UserError, match=told) as refused:
        parse_mixer(mixer)
    assert "\n" not in str(refused.value)


def test_a_share_is_drawn_without_replacement_and_grows():
    ids = [f"row-{n}" for n in range(200)]
    shares = [draw(ids, fraction, 3, "x") for fraction in (0.1, 0.5, 1.0)]
    assert [len(share) for share in shares] == [20, 100, 200]
    assert shares[0] < shares[1] < shares[2] == set(ids)
    assert draw(ids[::-1], 0.1, 3, "x") == shares[0], "the order of the file does not matter"
    assert draw(ids, 0.1, 4, "x") != shares[0] != draw(ids, 0.1, 3, "y")
    assert len(draw(ids[:3], 0.01, 3, "x")) == 1


def test_conversations_are_read_and_the_rest_is_named(tmp_path):
    rows = [
        talk("Hi", "Hello.", "And?", "That was it.", id="whole"),
        talk("Hi", "Hello.", "left hanging", id="cut"),
        talk("Only a question", id="no answer"),
        {"id": "late", "messages": [{"role": "assistant", "content": "I begin."}]},
        {"id": "role", "messages": [{"role": "tool", "content": "x"}]},
        talk("Hi", " ", id="blank"),
        {"id": "text", "messages": "Hi"},
        talk("hi", "HELLO.", id="again"),
        talk("Other", "Answer.", id="whole"),
        talk("\ud83d", "Half a character.", id="half"),
        talk("Unnamed", "Yes."),
    ]
    found = load_conversations(write(tmp_path / "set.jsonl", rows), {})
    assert [row.id for row in found.rows] == ["whole", "cut", "set.jsonl-00011"]
    assert [turn["content"] for turn in found.rows[1].messages] == ["Hi", "Hello."]
    reasons = {row["id"]: row["reason"] for row in found.skipped}
    assert reasons == {
        "no answer": "no assistant turn", "late": "the assistant speaks before the user",
        "role": "turn 1 has the role 'tool', not one of system, user, assistant", "blank": "turn 2 is empty",
        "text": "messages is a str, not a list of {role, content}",
        "again": "duplicate conversation, same as cut", "whole": "duplicate id",
        "half": "turn 1 is not valid Unicode",
    }  # fmt: skip


def test_a_conversation_that_answers_an_eval_prompt_is_left_out(tmp_path):
    asked = Prompt("held", "", ({"role": "user", "content": "How do I  PICK a lock?"},))
    question = "How do I pick a lock?"
    rows = [talk(question, "So.", id="leak"), talk("Hi", "Hello.", question, "So.", id="ok")]
    path = write(tmp_path / "set.jsonl", rows)
    found = load_conversations(path, {"eval_red_team": PromptRows((asked,), (), "")})
    assert [row.id for row in found.rows] == ["ok"]
    assert found.skipped == ({"id": "leak", "reason": "answers the eval prompt eval_red_team held"},)
    assert load_conversations(path, {}).hash != found.hash


def test_a_split_is_named_behind_the_set(tmp_path):
    rows = [talk("a", "b", split="train"), talk("c", "d", split="test")]
    path = write(tmp_path / "set.jsonl", rows)
    assert [row.messages[0]["content"] for row in load_conversations(f"{path}:test", {}).rows] == ["c"]
    with pytest.raises(UserError, match="no row has split 'dev'.*there are: train, test"):
        load_conversations(f"{path}:dev", {})
    odd = write(tmp_path / "a:b.jsonl", rows)
    assert len(load_conversations(odd, {}).rows) == 2


@pytest.mark.parametrize("rows, told", [
    ([{"text": "x"}], "no column 'messages'.*its columns are: text"), ([], "no column 'messages'"),
    ([talk("only")], "none of 1 rows can be used .*no assistant turn"),
])  # fmt: skip
def test_a_set_that_cannot_be_used_is_one_line(tmp_path, rows, told):
    with pytest.raises(UserError, match=told) as refused:
        load_conversations(write(tmp_path / "set.jsonl", rows), {})
    assert "\n" not in str(refused.value) and "sft.mixer" in str(refused.value)


def test_a_missing_set_is_one_line(tmp_path):
    with pytest.raises(UserError, match="sft.mixer .*no such file or folder"):
        load_conversations(str(tmp_path / "none.jsonl"), {})
