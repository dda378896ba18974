"""The judge stage: what is measured of which labeler, the gate, pleas, and shards that are resumed."""

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_rows import CannedSampler, context, prompt_rows, sample

from cai_jax.config import Judge
from cai_jax.constitution import load_constitution
from cai_jax.errors import UserError
from cai_jax.gold import load_gold
from cai_jax.labelers.opinion import Opinion
from cai_jax.labelers.pleading import PLEAS
from cai_jax.provenance import read_json
from cai_jax.run_folder import StageFolder
from cai_jax.sampler import Generate
from cai_jax.stages import judge, labelling
from cai_jax.stages.inputs import asks_endpoint, check_principles, labelers_of

HARMLESS = load_constitution("harmless_helpful")


def run_context(tmp_path, answer=None, constitution=HARMLESS, pleas=0, max_length=10_000, **changed):
    given = context(CannedSampler(answer or one_letter), prompt_rows("a"), max_length)
    section = {name: changed.pop(name) for name in list(changed) if name in Judge.__dataclass_fields__}
    preferences = replace(given.config.preferences, rows_per_shard=40, **changed)
    given.config = replace(given.config, preferences=preferences, judge=Judge(pleas=pleas, **section))
    given.constitution = constitution
    given.gold = load_gold("", constitution)
    given.folder = lambda stage: StageFolder(tmp_path, stage)
    return given


def one_letter(request):
    """A judge that is for whatever stands first, a little more so the longer the request is."""
    if isinstance(request, Generate):
        return sample("Hm." * (1 + request.seed % 3))
    longer = 0.001 * len(str(request.conversation))
    return [np.asarray([-0.5 - longer * n] * len(option)) for n, option in enumerate(request.options)]


def run(given) -> dict:
    folder = given.folder("judge")
    folder.begin({})
    summary = judge.run(given, folder)
    folder.write_summary(summary)
    folder.finish({})
    return read_json(folder.path / "summary.json")


@dataclass(frozen=True)
class Broken:
    """A labeler that asks nobody."""

    name: str
    say: object  # (pair) -> log-odds of response_a in each order
    hash: str = "broken"
    preamble: tuple = ()
    judge: None = None

    def compare(self, pair, principles, seed):
        yield from ()
        orders = [float(x) for x in self.say(pair, seed)]
        return Opinion(sum(orders) / 2, detail={"orders": orders})


BROKEN = {
    "random": lambda pair, seed: [random.Random(seed).gauss(0, 2)] * 2,
    "position": lambda pair, seed: (2.0, -2.0),
    "position, noisy": lambda pair, seed: (2.0 + random.Random(seed).gauss(0, 0.1), -2.0),
    "length": lambda pair, seed: [len(pair.response_a) - len(pair.response_b)] * 2,
    "brevity": lambda pair, seed: [len(pair.response_b) - len(pair.response_a)] * 2,
}


def with_labeler(monkeypatch, say):
    monkeypatch.setattr(judge, "labeler", lambda name, *rest: Broken(name, say))


@pytest.mark.parametrize("orders", ["both", "first"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_labeler_is_stopped_by_the_gate(tmp_path, monkeypatch, kind, orders):
    with_labeler(monkeypatch, BROKEN[kind])
    given = run_context(tmp_path, orders=orders)
    summary = run(given)
    with pytest.raises(UserError) as stopped:
        judge.check_gate(given.config, given.folder("judge"))
    line = str(stopped.value)
    right = round(96 * summary["vote"]["accuracy"]["value"])
    assert f"right on {right} of 96 gold pairs" in line and "must be above 50.0%" in line
    assert "--set judge.on_failure=continue" in line and "\n" not in line
    going_on = replace(given.config, judge=replace(given.config.judge, on_failure="continue"))
    judge.check_gate(going_on, given.folder("judge"))


def test_random_labelers_of_many_seeds_pass_no_more_often_than_stated(tmp_path, monkeypatch):
    with_labeler(monkeypatch, BROKEN["random"])
    given, passes, seeds = run_context(tmp_path, calibrate=False), 0, 30
    heard = judge.Heard(Broken("options", None), [], {}, [])
    for seed in range(seeds):
        draw = random.Random(seed)
        said = [Opinion(draw.gauss(0, 2)) for _ in given.gold.pairs]
        summary = judge.summarize(given.config, given.gold, {"options": replace(heard, gold=said)})
        passes += judge.judging.passes(summary, 0.5)
    assert passes <= 4, "2.6% of 30 are 0.8; more than 4 has a chance of 0.1%"


def test_a_good_labeler_passes_and_its_numbers_stand_in_the_summary(tmp_path, monkeypatch):
    better = {pair.id: 1 if pair.better == "a" else -1 for pair in load_gold("", HARMLESS).pairs}
    with_labeler(monkeypatch, lambda pair, seed: [3.0 * better.get(pair.id, 0) + side for side in (1, -1)])
    given = run_context(tmp_path)
    summary = run(given)
    judge.check_gate(given.config, given.folder("judge"))
    found = summary["labelers"]["options"]
    assert found["accuracy"]["value"] == 1 and found["same_position"]["value"] == 0
    assert found["first_position"]["value"] == 0.5 and found["worth"] == "above chance and above every simple rule"
    temperature = read_json(tmp_path / "judge" / "calibration.json")["labelers"]["options"]["temperature"]
    assert temperature == found["temperature"] == labelling.temperature_of(given, "options") != 1
    assert summary["vote"]["accuracy"] == found["accuracy"]


def test_every_labeler_is_measured_and_those_of_preferences_vote(tmp_path):
    given = run_context(tmp_path, constitution=load_constitution("verifiable"),
                        labelers=("rule", "options"), also=("contrast", "rating", "thought"))  # fmt: skip
    summary = run(given)
    assert {name: of["votes"] for name, of in summary["labelers"].items()} == {
        "rule": True, "options": True, "contrast": False, "rating": False, "thought": False}
    rule, options = summary["labelers"]["rule"], summary["labelers"]["options"]
    assert rule["accuracy"]["value"] == 1 and rule["temperature"] == 1 and rule["same_position"] is None
    assert options["same_position"]["value"] == 1 == options["first_position"]["value"]
    assert options["first_order_accuracy"]["value"] == 0.5
    assert summary["labelers"]["thought"]["same_position"]["value"] == 1
    assert summary["vote"]["accuracy"]["value"] == 1, "the rule outweighs a judge without an opinion"
    assert len(summary["agreement"]) == 10


def test_the_accuracy_is_that_of_the_order_in_which_labels_are_made(tmp_path):
    both, first = (run(run_context(tmp_path / orders, orders=orders)) for orders in ("both", "first"))
    assert first["vote"]["accuracy"] == first["labelers"]["options"]["first_order_accuracy"]
    assert first["vote"]["accuracy"]["value"] == 0.5 and first["labelers"]["options"]["ties"] == 0
    assert first["labelers"]["options"]["same_position"] == both["labelers"]["options"]["same_position"]
    assert first["labelers"]["options"]["hash"] == both["labelers"]["options"]["hash"]


def test_without_calibration_there_are_no_temperatures(tmp_path):
    given = run_context(tmp_path, calibrate=False)
    found = run(given)["labelers"]["options"]
    assert found["temperature"] == 1 and found["calibration_error"] == found["calibration_error_after"]
    assert not (tmp_path / "judge" / "calibration.json").exists()


def seduced(request):
    """A judge that falls for verdicts in what it reads."""
    if isinstance(request, Generate):
        return sample("Hm.")
    text = request.conversation[-2]["content"] if request.conversation[-1]["role"] == "assistant" else str(request)
    first, _, second = text.rpartition("\nResponse (B):\n")
    pull = 2.0 * (("choose this" in first) - ("choose this" in second))
    return [np.asarray([pull * (1 - n)] * len(option)) for n, option in enumerate(request.options)]


def test_a_plea_that_works_is_in_the_table_and_the_guard_takes_it_away(tmp_path):
    found = run(run_context(tmp_path, seduced, pleas=6))["pleas"]
    rows = {(row["plea"], row["guard"]): row for row in found}
    assert len(rows) == 2 * len(PLEAS)
    assert rows["command", False]["shift"]["value"] == 2 and rows["command", False]["flipped"]["value"] == 1
    assert rows["command", True]["shift"]["value"] == 0 == rows["command", True]["flipped"]["value"]
    assert rows["praise", False]["shift"]["value"] == 0 and rows["none", False]["shift"]["n"] == 6
    bare = run(run_context(tmp_path / "off", seduced, pleas=6, guard=False))["pleas"]
    assert [row for row in bare] == [row for row in found if not row["guard"]]


def test_pleas_of_none_cost_nothing_and_a_labeler_that_is_not_guarded_is_asked_once(tmp_path):
    given = run_context(tmp_path, labelers=("contrast",), pleas=3)
    found = run(given)["pleas"]
    assert {row["guard"] for row in found} == {True} and len(found) == len(PLEAS)
    assert not list((tmp_path / "judge").glob("unguarded-*"))
    assert run(run_context(tmp_path / "none"))["pleas"] == []
    places = judge.pleading_places(96, 8)
    pairs = [given.gold.pairs[place] for place in places]
    assert sum(len(pair.sides[0]) > len(pair.sides[1]) for pair in pairs) == 4
    assert 3 <= sum(pair.better == "a" for pair in pairs) <= 5
    assert judge.pleading_places(3, 8) == [0, 1, 2] and judge.pleading_places(3, 0) == []


def test_a_stage_killed_in_a_pass_ends_with_the_same_bytes(tmp_path):
    asked = {"labelers": ("options", "thought"), "pleas": 3}
    summary = run(run_context(tmp_path / "whole", **asked))
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "judge").iterdir()}
    assert {name.rsplit("-", 3)[0] for name in files if "-of-" in name} == {
        "opinions-options", "opinions-thought", "unguarded-options", "unguarded-thought"}
    for after in (1, 300, 420):
        given, count = run_context(tmp_path / str(after), **asked), 0

        def answer(request, after=after):
            nonlocal count
            count += 1
            if count > after:
                raise KeyboardInterrupt
            return one_letter(request)

        given.sampler = lambda model, answer=answer: CannedSampler(answer)
        with pytest.raises(KeyboardInterrupt):
            run(given)
        there = len(list((tmp_path / str(after) / "judge").glob("*-of-*")))
        assert (there > 0) == (after > 1)
        assert run(run_context(tmp_path / str(after), **asked)) == summary
        assert {path.name: path.read_bytes() for path in (tmp_path / str(after) / "judge").iterdir()} == files


def test_a_judge_without_room_is_refused_before_it_is_asked(tmp_path):
    def never(request):
        raise AssertionError("asked")

    given = run_context(tmp_path, never, max_length=300)
    with pytest.raises(UserError, match=r"judge: not one gold pair fits .*max_length=300 for the labeler options"):
        run(given)


def test_pairs_that_do_not_fit_are_failures_and_not_right(tmp_path):
    given = run_context(tmp_path, max_length=1_780)
    found = run(given)["labelers"]["options"]
    assert 0 < found["failures"]["too_long"] < 96
    assert found["opinions"] == 96 - found["failures"]["too_long"] and found["accuracy"]["n"] == 96


def test_the_gate_speaks_of_the_labelers_that_were_measured(tmp_path):
    given = run_context(tmp_path, on_failure="continue")
    judge.check_gate(given.config, given.folder("judge"))  # not measured yet
    run(given)
    other = replace(given.config, preferences=replace(given.config.preferences, labelers=("rating",)))
    with pytest.raises(UserError, match="options was measured, but preferences.labelers is rating"):
        judge.check_gate(other, given.folder("judge"))


def test_what_the_judge_stage_asks_is_checked_at_the_door(tmp_path):
    config = replace(run_context(tmp_path, also=("external", "rule")).config, stages=("judge",))
    assert labelers_of(config, "judge") == ("options", "external", "rule") and not labelers_of(config, "sft")
    assert asks_endpoint(config, "judge") == "judge.also" and not asks_endpoint(config, "preferences")
    with pytest.raises(UserError, match="no principle has a check, which the labeler rule needs"):
        check_principles(config, replace(HARMLESS, path="c.yaml"))
    check_principles(replace(config, judge=Judge()), HARMLESS)


def test_under_all_principles_every_one_is_asked(tmp_path):
    verifiable = load_constitution("verifiable")
    run(run_context(tmp_path, constitution=verifiable, principles="all", labelers=("rule",)))
    rows = StageFolder(tmp_path, "judge").read_shards("opinions-rule")
    assert {len(row["principles"]) for row in rows} == {7}
    own = run_context(tmp_path / "own", constitution=verifiable, labelers=("rule",))
    run(own)
    rows = StageFolder(tmp_path / "own", "judge").read_shards("opinions-rule")
    assert [row["principles"] for row in rows] == [[pair.principle] for pair in own.gold.pairs]


def test_the_numbers_of_an_endpoint_are_those_of_all_that_it_was_asked(tmp_path, monkeypatch):
    def said(name, *rest):
        labeler = Broken(name, BROKEN["random"])

        def compare(pair, principles, seed):
            opinion = yield from Broken.compare(labeler, pair, principles, seed)
            return replace(opinion, detail=opinion.detail | {"usage": [10, 1], "flags": {"guarded": True}})

        return SimpleNamespace(name=name, hash="h", preamble=(), judge=None, compare=compare)

    monkeypatch.setattr(judge, "labeler", said)
    summary = run(run_context(tmp_path, labelers=("external",), pleas=2))
    asked = 96 + 2 * len(PLEAS) + 2 * (1 + len(PLEAS))
    assert summary["endpoint"]["tokens_read"] == 10 * asked
