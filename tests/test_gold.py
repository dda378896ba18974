"""Gold sets: those that ship, and what is refused of others."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from cai_jax import judging
from cai_jax.constitution import load_constitution
from cai_jax.errors import UserError
from cai_jax.gold import check_apart, load_gold
from cai_jax.labelers.pleading import unpleaded
from cai_jax.named_runs import load_config, named_runs
from cai_jax.rules import satisfies
from cai_jax.similarity import Index
from cai_jax.stages.inputs import EVAL_SETS, read_prompts

ALIKE = 0.4  # overlap of shingles from which on two short texts say much the same

VERIFIABLE = load_constitution("verifiable")
GOOD = {"id": "one", "category": "format", "principle": "brief", "prompt": "Hi?", "response_a": "Hi.",
        "response_b": "Hello there.", "better": "a"}  # fmt: skip


def written(tmp_path, *records, name="gold.jsonl"):
    path = tmp_path / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


@pytest.mark.parametrize("name", ["harmless_helpful", "verifiable"])
def test_a_shipped_set_has_four_pairs_a_principle_and_favours_no_place_and_no_length(name):
    constitution = load_constitution(name)
    gold = load_gold("", constitution)
    assert Counter(pair.principle for pair in gold.pairs) == {p.id: 4 for p in constitution.principles}
    category = {principle.id: principle.category for principle in constitution.principles}
    assert all(pair.category == category[pair.principle] for pair in gold.pairs)
    kinds = Counter((pair.better, len(pair.sides[0]) > len(pair.sides[1])) for pair in gold.pairs)
    assert set(kinds.values()) == {len(gold.pairs) / 4} and len(kinds) == 4
    rules = judging.baselines(gold.pairs)
    assert rules["longer_wins"] == rules["shorter_wins"] == 0.5
    texts = [text for pair in gold.pairs for text in (pair.response_a, pair.response_b)]
    assert all(unpleaded(text) == text for text in texts), "the guard must not touch a plain response"


def test_every_verifiable_pair_keeps_its_rule_in_the_better_response_alone():
    checks = {principle.id: principle.check for principle in VERIFIABLE.principles}
    for pair in load_gold("", VERIFIABLE).pairs:
        better, other = pair.sides
        assert satisfies(checks[pair.principle], better) and not satisfies(checks[pair.principle], other), pair.id


def test_no_shipped_gold_prompt_stands_in_a_prompt_set_or_among_the_worked_examples():
    sets = read_prompts(load_config("cai_7b")[1]) | read_prompts(load_config("cai_smollm2_full")[1])
    for name in ("harmless_helpful", "verifiable"):
        constitution = load_constitution(name)
        gold = load_gold("", constitution)
        check_apart(gold, sets)
        asked = Index((pair.id, pair.messages[-1]["content"]) for pair in gold.pairs)
        for prompts in (sets[name] for name in EVAL_SETS):
            for prompt in prompts.rows:
                asked.add(prompt.id, prompt.messages[-1]["content"])
        answered = Index((f"{pair.id} {side}", text) for pair in gold.pairs
                         for side, text in (("a", pair.response_a), ("b", pair.response_b)))  # fmt: skip
        for shot in (*constitution.critique_few_shots, *constitution.preference_few_shots):
            assert asked.nearest(shot.prompt)[0] < ALIKE, (shot.prompt, asked.nearest(shot.prompt))
        for shot in constitution.critique_few_shots:  # the labeler `examples` reads these
            assert answered.nearest(shot.revision)[0] < ALIKE, (shot.revision, answered.nearest(shot.revision))
    assert {load_config(run)[1].constitution for run, _ in named_runs()} <= {"harmless_helpful", "verifiable"}


def test_a_gold_prompt_among_the_runs_prompts_is_refused_by_its_ids(tmp_path):
    prompts = read_prompts(load_config("tiny")[1])
    row = prompts["helpful"].rows[0]
    asked = row.messages[-1]["content"].upper().replace(" ", "  ")
    gold = load_gold(written(tmp_path, GOOD, GOOD | {"id": "two", "prompt": asked}), VERIFIABLE)
    with pytest.raises(UserError, match=f"two = helpful {row.id}; take them out"):
        check_apart(gold, prompts)


@pytest.mark.parametrize("change, said", [
    ({"better": "A"}, "better must be 'a' or 'b', not 'A'"),
    ({"principle": "breif"}, "no principle 'breif'; did you mean 'brief'"),
    ({"response_b": "Hi."}, "both responses are the same"),
    ({"response_a": 3}, "response_a must be a text"),
    ({"prompt": " "}, "empty prompt"),
    ({"prompt": [{"role": "assistant", "content": "x"}]}, "no user turn"),
    ({"id": " "}, "id is empty"),
    ({"id": "first"}, "the id 'first' stands in line 1 too"),
    ({"bettr": "a"}, "unknown field 'bettr'; did you mean 'better'"),
    ({"response_a": "\ud83d"}, "response_a is not valid Unicode"),
])  # fmt: skip
def test_a_line_that_is_no_gold_pair_is_named_by_number(tmp_path, change, said):
    path = written(tmp_path, GOOD | {"id": "first"}, "", GOOD | change)
    with pytest.raises(UserError) as refused:
        load_gold(path, VERIFIABLE)
    assert f"{path}:3: " in str(refused.value) and said in str(refused.value)


@pytest.mark.parametrize("line, said", [
    ("{torn", ":1: not JSON"), ("[]", ":1: must be a JSON object"),
    (json.dumps({k: v for k, v in GOOD.items() if k != "better"}), ":1: no field 'better'"), ("", "has no pair"),
])  # fmt: skip
def test_a_torn_file_is_refused(tmp_path, line, said):
    with pytest.raises(UserError, match=said):
        load_gold(written(tmp_path, line), VERIFIABLE)


def test_a_set_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="must be a .jsonl file"):
        load_gold(str(tmp_path / "gold.json"), VERIFIABLE)
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="is not UTF-8"):
        load_gold(str(tmp_path / "latin.jsonl"), VERIFIABLE)
    with pytest.raises(UserError, match="no gold set ships for the constitution 'mine'"):
        load_gold("", replace(VERIFIABLE, name="mine"))


def test_of_the_shipped_set_the_pairs_of_the_runs_principles_are_taken(tmp_path):
    two = replace(VERIFIABLE, principles=VERIFIABLE.principles[:2])
    gold, whole = load_gold("", two), load_gold("", VERIFIABLE)
    assert gold.pairs == whole.pairs[:8] and gold.hash != whole.hash
    other = replace(VERIFIABLE, principles=(replace(VERIFIABLE.principles[0], id="mine"),))
    with pytest.raises(UserError, match="has no pair for the principles of"):
        load_gold("", other)


def test_the_hash_is_of_what_the_pairs_say(tmp_path):
    one = load_gold(written(tmp_path, GOOD), VERIFIABLE)
    spaced = load_gold(written(tmp_path, "", GOOD, name="other.jsonl"), VERIFIABLE)
    changed = load_gold(written(tmp_path, GOOD | {"better": "b"}, name="third.jsonl"), VERIFIABLE)
    assert one.hash == spaced.hash != changed.hash
    assert one.pairs[0].sides == ("Hi.", "Hello there.") == changed.pairs[0].sides[::-1]
