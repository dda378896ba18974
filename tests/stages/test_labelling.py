"""Labels in a run: votes, failures by name, temperatures, principles, and shards that are resumed."""

import json
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_rows import CannedSampler, context, prompt_rows, sample

from cai_jax.config import Filters
from cai_jax.constitution import AIMS, load_constitution
from cai_jax.errors import UserError
from cai_jax.labelers.examples import Examples
from cai_jax.labelers.judge import Judge
from cai_jax.labelers.opinion import Opinion, Pair
from cai_jax.prompt_sets import Prompt, PromptRows, with_unique_ids
from cai_jax.prompts import worked_answers
from cai_jax.provenance import row_seed, write_json
from cai_jax.run_folder import StageFolder
from cai_jax.sampler import Generate
from cai_jax.stages import labelling, preferences
from cai_jax.stages.critique_revision import draw_principle
from cai_jax.stages.inputs import check_principles

VERIFIABLE = load_constitution("verifiable")
RULES = ("brief", "closing_words", "opening_words", "no_digits", "no_exclamation", "no_lists")


def answers(request):
    """Responses that keep different rules, and a judge that is for whatever is shown first."""
    if isinstance(request, Generate):
        return sample("In short, hi." if request.seed % 2 else "1 2 3! " * (1 + request.seed % 5))
    return [np.asarray([-0.5 - 0.1 * n] * len(option)) for n, option in enumerate(request.options)]


def run_context(tmp_path, texts=("a", "b", "c"), sampler=None, **changed):
    given = context(sampler or CannedSampler(answers), prompt_rows(*texts))
    given.config = replace(given.config, preferences=replace(given.config.preferences, **changed))
    given.folder = lambda stage: StageFolder(tmp_path, stage)
    return given


def rows_of(tmp_path, prefix="rows"):
    return StageFolder(tmp_path, "preferences").read_shards(prefix)


def test_the_vote_is_the_mean_of_the_labelers_and_names_what_each_said(tmp_path):
    given = run_context(tmp_path, labelers=("options", "rule", "rating"))
    given.constitution = load_constitution("verifiable", RULES)  # another one would change which are drawn
    write_json(tmp_path / "judge" / "calibration.json", {"labelers": {"rating": {"temperature": 4.0}}})
    summary = preferences.run(given, given.folder("preferences"))
    said = {name: {row["id"]: json.loads(row["opinion"])["logit"] for row in rows_of(tmp_path, f"opinions-{name}")}
            for name in ("options", "rule", "rating")}  # fmt: skip
    rows = rows_of(tmp_path)
    assert len(rows) == 4 and any(logit for logit in said["rule"].values())
    for row in rows:
        assert [vote["labeler"] for vote in row["opinions"]] == ["options", "rule", "rating"]
        assert [vote["temperature"] for vote in row["opinions"]] == [1, 1, 4]
        logits = [said["options"][row["id"]], said["rule"][row["id"]], said["rating"][row["id"]] / 4]
        assert [vote["logit"] for vote in row["opinions"]] == logits
        assert row["probability_a"] == pytest.approx(1 / (1 + math.exp(-np.mean(logits))))
    assert summary["labelers"]["rating"]["temperature"] == 4
    assert [entry["labelers"] for entry in summary["agreement"]] == [
        ["options", "rule"], ["options", "rating"], ["rule", "rating"]]
    assert summary["labelers"]["options"]["first_position_share"] == 1
    assert summary["labelers"]["rule"]["first_position_share"] is None


def test_a_failing_labeler_has_no_vote_and_a_pair_without_any_is_skipped_by_name(tmp_path):
    def by_length(request):
        return sample("y" * 12_000) if isinstance(request, Generate) and "long" in str(request) else answers(request)

    one, *others = VERIFIABLE.principles
    constitution = replace(VERIFIABLE, principles=(one, *(replace(p, check=None) for p in others)))
    given = run_context(tmp_path, [f"long {n}" if n % 2 else f"{n}" for n in range(12)], CannedSampler(by_length),
                        labelers=("options", "rule"))  # fmt: skip
    given.constitution = constitution
    summary = preferences.run(given, given.folder("preferences"))
    failures = [json.loads(json.dumps(row["failures"])) for row in rows_of(tmp_path)]
    assert {"options": "too_long", "rule": ""} in failures and {"options": "", "rule": "no_check"} in failures
    for row in rows_of(tmp_path):
        assert [vote["labeler"] for vote in row["opinions"]] == [n for n, why in row["failures"].items() if not why]
    skipped = [entry["reason"] for entry in summary["skipped"]]
    assert skipped and set(skipped) == {"no opinion: no_check, too_long"}
    counters = summary["counters"]
    assert counters["unlabelled"] == len(skipped) == summary["pairs"] - summary["labelled"]
    assert counters["options/too_long"] == 6
    assert counters["rule/no_check"] == summary["labelers"]["rule"]["failures"]["no_check"] > len(skipped)
    schemas = {json.dumps({name: type(value).__name__ for name, value in row.items()}) for row in rows_of(tmp_path)}
    assert len(schemas) == 1


def test_a_stage_without_any_opinion_ends_with_one_line(tmp_path):
    given = run_context(tmp_path, labelers=("rule",))
    given.constitution = replace(VERIFIABLE, principles=(replace(VERIFIABLE.principles[0], check=None),))
    with pytest.raises(UserError, match="no labeler of rule has an opinion on any pair"):
        preferences.run(given, given.folder("preferences"))


def test_rows_of_rules_alone_say_nothing_of_positions(tmp_path):
    given = run_context(tmp_path, labelers=("rule",))
    summary = preferences.run(given, given.folder("preferences"))
    assert summary["consistent_share"] is None and summary["first_position_share"] is None
    assert summary["agreement"] == [] and all(row["consistent"] for row in rows_of(tmp_path))


def test_one_order_leaves_out_what_only_two_can_say(tmp_path):
    given = run_context(tmp_path, orders="first")
    preferences.run(given, given.folder("preferences"))
    assert not {"consistent", "probability_a_ab", "probability_a_ba"} & set(rows_of(tmp_path)[0])
    assert rows_of(tmp_path)[0]["probability_a"] == pytest.approx(1 / (1 + math.exp(-0.1)))


def test_dropped_rows_stay_with_their_reason(tmp_path):
    given = run_context(tmp_path, labelers=("rule",), filters=Filters(duplicates=False, ties=True))
    summary = preferences.run(given, given.folder("preferences"))
    rows = rows_of(tmp_path)
    assert [row["dropped_by"] for row in rows] == ["ties" if row["tie"] else "" for row in rows]
    assert all(row["kept"] == (not row["dropped_by"]) for row in rows)
    kept = sum(row["kept"] for row in rows)
    assert (summary["kept"], summary["kept_share"]) == (kept, kept / len(rows)) and summary["labelled"] == len(rows)
    assert summary["counters"]["dropped/ties"] == len(rows) - kept == summary["filters"][0]["dropped"]


def test_a_stage_killed_between_labelers_ends_with_the_same_bytes(tmp_path):
    names = ("options", "thought", "rule")
    whole = run_context(tmp_path / "whole", labelers=names)
    summary = preferences.run(whole, whole.folder("preferences"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "preferences").iterdir()}
    assert sum(name.startswith("opinions-thought") for name in files) == 4
    part = tmp_path / "killed" / "preferences"
    part.mkdir(parents=True)
    left_out = ("rows-", "opinions-rule", "opinions-thought-00001", "opinions-thought-00003")
    for name, content in files.items():
        if not name.startswith(left_out):
            (part / name).write_bytes(content)
    asked = []
    again = run_context(tmp_path / "killed", labelers=names,
                        sampler=CannedSampler(lambda request: asked.append(request) or answers(request)))  # fmt: skip
    assert preferences.run(again, again.folder("preferences")) == summary
    assert {path.name: path.read_bytes() for path in part.iterdir()} == files
    assert len(asked) == 2 * 4, "two pairs, each reasoned about and judged in both orders"


def test_principles_are_drawn_without_repetition_and_one_as_ever():
    given = SimpleNamespace(
        constitution=load_constitution("harmless_helpful"), row_seed=lambda *parts: row_seed(7, *parts),
        config=SimpleNamespace(preferences=SimpleNamespace(principles=1)),
    )  # fmt: skip
    one = [labelling.draw_principles(given, "preferences", f"p{i}") for i in range(40)]
    assert one == [[draw_principle(given, "preferences", f"p{i}")] for i in range(40)]
    given.config.preferences.principles = 16
    drawn = [labelling.draw_principles(given, "preferences", f"p{i}") for i in range(400)]
    assert all(len({p.id for p in each}) == 16 for each in drawn) and [each[:1] for each in drawn[:40]] == one
    counts = np.unique([p.id for each in drawn for p in each], return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 230 and counts.max() < 305  # 267 expected
    given.config.preferences.principles = 0
    assert labelling.draw_principles(given, "preferences", "p") == list(given.constitution.principles)


def test_labelers_with_principles_of_their_own_stand_for_these():
    given = SimpleNamespace(
        constitution=VERIFIABLE, row_seed=lambda *parts: row_seed(7, *parts),
        config=SimpleNamespace(preferences=SimpleNamespace(principles=1)),
    )  # fmt: skip
    own = SimpleNamespace(own_principles=VERIFIABLE.principles[1:3])
    assert labelling.principles_of(given, [own, own], "preferences", "p") == list(VERIFIABLE.principles[1:3])
    drawn = labelling.draw_principles(given, "preferences", "p")
    assert labelling.principles_of(given, [own, SimpleNamespace()], "preferences", "p") == drawn


def test_several_principles_stand_in_the_row():
    columns = labelling.principle_columns(VERIFIABLE.principles[:2])
    assert columns["principle"] == "several" and columns["principles"] == ["brief", "closing_words"]
    alone = labelling.principle_columns(VERIFIABLE.principles[:1])
    assert (alone["principle"], alone["principle_hash"]) == ("brief", VERIFIABLE.principles[0].hash)


def test_a_temperature_divides_and_a_limit_holds():
    names = [SimpleNamespace(name="one", hash="1"), SimpleNamespace(name="other", hash="2")]
    given = [Opinion(4.0, detail={"orders": [6.0, 2.0]}), Opinion(-9.0, limit=1.0)]
    found = labelling.label(names, given, [2.0, 1.0])
    assert [vote["logit"] for vote in found["opinions"]] == [2.0, -1.0]
    assert found["probability_a"] == pytest.approx(1 / (1 + math.exp(-0.5)))
    assert labelling.label(names, [Opinion(None, "too_long")] * 2, [1.0, 1.0]) is None


@pytest.mark.parametrize("changed, message", [
    ({"labelers": ("options", "rule")}, "no principle has a check, which the labeler rule needs"),
    ({"principles": 25}, "preferences.principles .25. is more than the 24"),
])  # fmt: skip
def test_what_the_constitution_cannot_give_is_refused_at_the_door(tmp_path, changed, message):
    config = run_context(tmp_path, **changed).config
    with pytest.raises(UserError, match=message):
        check_principles(config, load_constitution("harmless_helpful"))
    check_principles(replace(config, stages=("sft",)), load_constitution("harmless_helpful"))


def test_opinions_ask_for_any_stage_and_any_principles(tmp_path):
    """What the pairs are is the caller's affair."""
    given = run_context(tmp_path, labelers=("rule",))
    folder = given.folder("judge")
    (rule,) = labelling.labelers_of(given, None)
    pairs = [Pair(f"g{n}", ({"role": "user", "content": "Hi"},), "Hi!", "Hi.") for n in range(3)]
    under = [[VERIFIABLE.principle(name)] for name in ("no_exclamation", "no_digits", "no_exclamation")]
    given.sampler = lambda model: pytest.fail("a rule needs no model")
    found = labelling.opinions(given, folder, rule, pairs, under, labelling.driver_of(given, given.base))
    assert [opinion.logit for opinion in found] == [-10, 0, -10]
    refuses = lambda labeler: pytest.fail("asked again")  # noqa: E731
    assert labelling.opinions(given, folder, rule, pairs, under, refuses) == found


def test_matched_principles_are_those_of_the_category_or_of_the_aim_of_the_set(tmp_path):
    given = run_context(tmp_path, matched=True, labelers=("rating",))
    given.constitution = constitution = load_constitution("harmless_helpful")
    aims = {aim: {each.id for each in constitution.principles if each.aim == aim} for aim in AIMS}
    crime = {each.id for each in constitution.principles if each.category == "crime"}
    prompts = [
        Prompt(f"{name}-{n}", category, ({"role": "user", "content": f"{name} {n}"},))
        for n in range(12) for name, category in (("unsafe", "crime"), ("other", "juggling"), ("safe", "cooking"))
    ]  # fmt: skip
    safe = [prompt for prompt in prompts if prompt.category == "cooking"]
    sets = {"red_team": [prompt for prompt in prompts if prompt not in safe], "helpful": safe}
    given.prompts = {name: PromptRows(tuple(rows), (), "") for name, rows in sets.items()}
    preferences.run(given, given.folder("preferences"))
    found = {}
    for row in rows_of(tmp_path):
        found.setdefault(row["id"].split("-")[0], set()).add(row["principle"])
    assert found["unsafe"] == crime
    assert found["other"] <= aims["harmless"] and len(found["other"]) > 3
    assert found["safe"] <= aims["helpful"] and len(found["safe"]) > 3


def test_the_worked_answers_of_both_aims_are_run_once_for_all_pairs(tmp_path):
    given = run_context(tmp_path, labelers=("examples",), rows_per_shard=2)
    constitution = load_constitution("harmless_helpful")
    judge, seen = Judge(given.base.tokenizer, "model", 20_000), []

    class Watched(CannedSampler):
        def stream(self, rows, shared=(), more=()):
            seen.append([shared, *more])
            return super().stream(rows, shared)

    labeler = Examples(judge, given.config.preferences.examples, constitution)
    pairs = [Pair(f"p{n}", [{"role": "user", "content": f"Q{n}"}], "A", "B") for n in range(6)]
    under = [[constitution.principle("no_scams" if n % 3 else "no_lecture")] for n in range(6)]
    folder = given.folder("preferences")
    asked = labelling.opinions(given, folder, labeler, pairs, under, lambda _: Watched(answers))
    of_aims = [worked_answers(constitution, under[n]) for n in (0, 1)]
    assert len(seen) == 1 and sorted(map(str, seen[0])) == sorted(map(str, of_aims))
    rows = folder.read_shards("opinions-examples")
    assert [row["id"] for row in rows] == [pair.id for pair in pairs] and len(asked) == 6
    said = {row["id"]: json.loads(row["opinion"])["logit"] for row in rows}
    assert [opinion.logit for opinion in asked] == [said[pair.id] for pair in pairs]
    again = labelling.opinions(given, folder, labeler, pairs, under, lambda _: pytest.fail("asked again"))
    assert again == asked


def test_a_share_of_the_prompts_of_each_set_is_asked_the_same_ones_at_every_start(tmp_path):
    asked = {}
    for share in (0.25, 0.5, 1.0):
        folder = tmp_path / str(share)
        given = run_context(folder, [str(n) for n in range(20)], labelers=("rating",), share=share)
        given.prompts = with_unique_ids(given.prompts | {"helpful": prompt_rows("x", "y", "z", "w")})
        preferences.run(given, given.folder("preferences"))
        asked[share] = {row["id"] for row in rows_of(folder)}
        sets = Counter(row_id.split("/")[0] for row_id in asked[share])
        assert sets == {"red_team": 20 * share, "helpful": 4 * share}
    assert asked[0.25] < asked[0.5] < asked[1.0]
    assert asked[0.25] != {f"red_team/p{n}" for n in range(5)} | {"helpful/p0"}


def test_labels_for_the_response_that_declines_are_counted_by_prompt_set(tmp_path):
    def declining(request):
        if isinstance(request, Generate):
            asked = request.conversation[-1]["content"]
            return sample("I can't help with that." if request.seed % 2 else f"Gladly, about {asked}. " + "x" * 9)
        return [np.asarray([-0.5]) for _ in request.options]

    given = run_context(tmp_path, [str(n) for n in range(24)], CannedSampler(declining), labelers=("rule",))
    given.constitution = load_constitution("verifiable", ("opening_words",))  # none keeps it: all are ties
    assert preferences.run(given, given.folder("preferences"))["declining"]["red_team"]["n"] == 0
    again = tmp_path / "again"
    given = run_context(again, [str(n) for n in range(24)], CannedSampler(declining), labelers=("rule",))
    given.constitution = load_constitution("verifiable", ("not_of_itself",))  # the response that declines breaks it
    summary = preferences.run(given, given.folder("preferences"))
    assert summary["declining"]["red_team"]["n"] > 5 and summary["declining"]["red_team"]["value"] == 0
    assert set(summary["declining"]) == {"red_team", "helpful"}


CHECKED = load_constitution("verifiable", ("not_of_itself",)).principles[0].check
SHIPPED = load_constitution("harmless_helpful")
# Its worked answers and aims, and a rule to label by.
TWO_AIMS = replace(SHIPPED, principles=tuple(replace(principle, check=CHECKED) for principle in SHIPPED.principles))


def contrasted_context(tmp_path, answer, max_length=20_000, **changed):
    changed = {"labelers": ("rule",), "contrasted": True} | changed
    given = run_context(tmp_path, [str(n) for n in range(12)], CannedSampler(answer, max_length), **changed)
    given.constitution = TWO_AIMS
    given.prompts = with_unique_ids(given.prompts | {"helpful": prompt_rows(*(f"safe {n}" for n in range(12)))})
    return given


def aims_behind(request) -> set[str]:
    """The aims whose worked answers stand before the prompt of a request."""
    return {aim for aim in AIMS if request.conversation[:-1] == worked_answers(SHIPPED, SHIPPED.matching("", aim))}


def test_contrasted_responses_have_worked_answers_of_one_aim_and_the_other_as_context(tmp_path):
    def behind(request):
        (aim,) = aims_behind(request)
        return sample(f"{aim} {request.conversation[-1]['content']} {request.seed}")

    given = contrasted_context(tmp_path, behind, responses_per_prompt=3, rows_per_shard=64)
    preferences.run(given, given.folder("preferences"))
    assert sorted(map(str, given.sampler(None).shared)) == sorted(
        str(worked_answers(SHIPPED, SHIPPED.matching("", aim))) for aim in AIMS
    ), "each context is run once for all prompts"
    responses = {}
    for pair in rows_of(tmp_path, "pairs"):
        places = map(int, pair["id"].split("/")[-1].split("-"))
        drawn = zip(places, (pair["response_a"], pair["response_b"]), strict=True)
        responses.setdefault(pair["prompt_id"], {}).update(drawn)
    firsts = set()
    for prompt_id, (first, second, third) in ((name, [of[n] for n in range(3)]) for name, of in responses.items()):
        assert {first["aim"], second["aim"]} == set(AIMS) and third["aim"] == first["aim"], "they take turns"
        assert all(response["text"].startswith(f"{response['aim']} ") for response in (first, second, third))
        assert len({response["text"] for response in (first, second, third)}) == 3, "each has a seed of its own"
        firsts.add((prompt_id.split("/")[0], first["aim"]))
    assert len(firsts) == 4, "which comes first is drawn"


def test_responses_that_are_not_contrasted_have_no_context(tmp_path):
    def bare(request):
        assert len(request.conversation) == 1
        return answers(request)

    given = contrasted_context(tmp_path, bare, contrasted=False)
    summary = preferences.run(given, given.folder("preferences"))
    assert "contrasted" not in summary and all("aim" not in row["response_a"] for row in rows_of(tmp_path))


@pytest.mark.parametrize("right", [True, False])
def test_labels_for_the_response_of_the_sets_aim_are_counted(tmp_path, right):
    def for_the_set(request):
        aim = "helpful" if "safe" in request.conversation[-1]["content"] else "harmless"
        keeps_the_rule = (aims_behind(request) == {aim}) == right
        return sample("We hear you." if keeps_the_rule else "I hear you.")

    given = contrasted_context(tmp_path, for_the_set)
    counted = preferences.run(given, given.folder("preferences"))["contrasted"]
    assert [(counted[name]["n"], counted[name]["value"]) for name in preferences.PROMPTS] == [(12, right)] * 2


def test_a_prompt_that_does_not_fit_after_worked_answers_is_left_out_by_name(tmp_path):
    of_aims = [worked_answers(SHIPPED, SHIPPED.matching("", aim)) for aim in AIMS]
    room = max(sum(len(turn["content"]) for turn in turns) for turns in of_aims) + 200
    given = contrasted_context(tmp_path, answers, room)
    given.prompts = with_unique_ids({"red_team": prompt_rows("x", "y" * 200), "helpful": prompt_rows("x")})
    summary = preferences.run(given, given.folder("preferences"))
    limit = room - given.config.preferences.response.max_new_tokens
    told = f"prompt longer than {limit} tokens with the worked answers before it"
    assert summary["skipped"] == [{"id": "red_team/p1", "reason": told}] and summary["pairs"] == 2
    given = contrasted_context(tmp_path / "again", answers, room)
    given.prompts = with_unique_ids({"red_team": prompt_rows("y" * 200), "helpful": prompt_rows("x")})
    with pytest.raises(UserError, match="raise sampler.max_length, or set preferences.contrasted=false, or shorten"):
        preferences.run(given, given.folder("preferences"))
