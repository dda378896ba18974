"""Rows as others read them: the same types in every shard, whatever happened to the rows."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cai_jax.config import ROUND_FLAGS, Config, CritiqueRevision, Model, Preferences, Sampling
from cai_jax.config import Sampler as SamplerShape
from cai_jax.constitution import load_constitution
from cai_jax.errors import UserError
from cai_jax.models.byte_tokenizer import byte_tokenizer
from cai_jax.progress import Progress
from cai_jax.prompt_sets import Prompt, PromptRows
from cai_jax.provenance import row_seed
from cai_jax.run_folder import StageFolder
from cai_jax.sampler import Generate, Sample
from cai_jax.sampler.engine import Counts
from cai_jax.similarity import Index
from cai_jax.stages import critique_revision, preferences, revisions
from cai_jax.stages.critique_revision import checks

SAMPLING = Sampling(max_new_tokens=10)


class CannedSampler:
    """Answers requests from a function of the request; a token is a character."""

    def __init__(self, answer, max_length=10_000):
        self.answer, self.max_length, self.counts = answer, max_length, Counts()
        self.model = SimpleNamespace(config=SimpleNamespace(max_position=20_000))
        self.shared = []  # the conversation starts that were told of

    def fits(self, conversation, new_tokens, prefix=()):
        return sum(len(turn["content"]) for turn in [*prefix, *conversation]) + new_tokens <= self.max_length

    def stream(self, programs, shared=(), more=()):
        self.shared += [start for start in (shared, *more) if start]
        for place, program in enumerate(programs):
            answer = None
            try:
                while True:
                    answer = self.answer(program.send(answer))
            except StopIteration as end:
                yield place, end.value


def prompt_rows(*texts):
    turns = [({"role": "user", "content": text},) for text in texts]
    return PromptRows(tuple(Prompt(f"p{i}", "", turn) for i, turn in enumerate(turns)), (), "")


def context(sampler, red_team, max_length=1024, judge=""):
    config = Config(
        model=Model("random:llama"),
        description="rows made by hand",
        critique_revision=CritiqueRevision(
            rounds=2, response=SAMPLING, critique=SAMPLING, revision=SAMPLING, rows_per_shard=1
        ),
        preferences=Preferences(response=SAMPLING, rows_per_shard=1, judge=judge),
        sampler=SamplerShape(max_length=max_length),
    )
    model = SimpleNamespace(tokenizer=byte_tokenizer(), config=SimpleNamespace(max_position=20_000), hash="model")
    return SimpleNamespace(
        config=config, base=model, constitution=load_constitution("verifiable"), progress=Progress(),
        prompts={"red_team": red_team, "helpful": prompt_rows("Hello")},
        sampler=lambda model: sampler,
        load_from=lambda *_: model,
        row_seed=lambda *parts: row_seed(0, *parts),
        provenance=lambda stage, model=None: {"stage": stage},
        folder=lambda stage: StageFolder("nowhere", stage),
        endpoint=None,
    )  # fmt: skip


def completion(text):
    return {"text": text, "tokens": len(text), "truncated": True}


def sample(text, truncated=False):
    return Sample(text, [1] * len(text), [0.0] * len(text), truncated=truncated)


def columns_of(files, cache):
    import datasets

    rows = datasets.load_dataset("json", data_files=[str(file) for file in files], split="train", cache_dir=str(cache))
    return rows.features, len(rows)


def assert_read_in_every_order(folder, prefix, rows, tmp_path):
    """Forwards, backwards, and each shard that holds a row alone: always the same types."""
    files = sorted(folder.path.glob(f"{prefix}-*.jsonl"))
    expected, count = columns_of(files, tmp_path / "cache")
    assert count == rows
    assert columns_of(files[::-1], tmp_path / "cache") == (expected, rows)
    for file in files:
        if file.read_text():
            assert columns_of([file], tmp_path / "cache")[0] == expected, file.name


def answers_of_a_chain(request):
    """Plain answers to the first prompt; unchanged, truncated or empty ones to the others."""
    if "trouble" in str(request.conversation):
        return sample("same", truncated=True)
    return sample(f"a{request.seed}")


@pytest.mark.parametrize("texts", [("calm", "trouble"), ("trouble", "calm"), ("x" * 9000, "calm", "trouble")])
def test_chains_have_the_same_types_whatever_was_flagged(tmp_path, texts):
    folder = StageFolder(tmp_path, "critique_revision")
    sampler = CannedSampler(answers_of_a_chain, max_length=9_020)
    summary = critique_revision.run(context(sampler, prompt_rows(*texts)), folder)
    rows = folder.read_shards()
    troubled = [row for row in rows if row["messages"][0]["content"] == "trouble"]
    assert [row["flags"]["response_truncated"] for row in troubled] == [True]
    assert all(entry["flags"]["revision_unchanged"] for entry in troubled[0]["rounds"])
    assert summary["counters"]["revision_unchanged"] == 2 and summary["counters"]["response_empty"] == 0
    assert_read_in_every_order(folder, "rows", 2, tmp_path)
    roomless = [skipped["id"] for skipped in summary["skipped"]]
    assert roomless == (["p0"] if len(texts) == 3 else [])
    assert summary["counters"]["context_full"] == len(roomless)
    again = critique_revision.run(context(sampler, prompt_rows(*texts)), folder)
    assert again == summary, "a resumed stage finds the rows on disk"


@pytest.mark.parametrize(
    ("sentences", "kept"), [(0, "One. Two. Thr"), (1, "One."), (2, "One. Two."), (3, "One. Two. Thr")]
)
def test_a_revision_keeps_so_many_sentences_and_is_not_cut_off_where_it_has_them(tmp_path, sentences, kept):
    texts = iter(["Sure.", "Bad.", "One. Two. Thr"] + ["It is bad.", "One. Two. Thr"])
    sampler = CannedSampler(lambda request: sample(next(texts), truncated=True))
    here = context(sampler, prompt_rows("Hi"))
    here.config = replace(here.config, critique_revision=replace(here.config.critique_revision, sentences=sentences))
    folder = StageFolder(tmp_path, "critique_revision")
    critique_revision.run(here, folder)
    (row,) = folder.read_shards()
    revision = row["rounds"][0]["revision"]
    assert revision == {"text": kept, "tokens": len(kept), "truncated": kept.endswith("Thr")}
    assert row["rounds"][0]["flags"]["revision_truncated"] == revision["truncated"]
    assert row["rounds"][1]["flags"]["revision_unchanged"], "the second round is told the same text again"


def test_what_repeats_something_is_told_before_it_is_cut(tmp_path):
    """The first sentence of a text alone is neither the whole response nor the whole worked revision."""
    here = context(None, prompt_rows("Hi"))
    here.config = replace(here.config, critique_revision=replace(here.config.critique_revision, sentences=1))
    worked = Index([("w", "I keep it short, as you asked. It is a plain answer of few words.")])

    def flags(text, newest="Sure, do it. Then run."):
        told = revisions.told(here, worked, newest, "Too long. Cut it.", completion(text))
        return {name for name, raised in told["flags"].items() if raised}

    assert flags("Sure, do it. Then run.") == flags("Sure, do it. Then run.", "Sure, do it.") == {"revision_unchanged"}
    assert flags("Too long. Cut it.") == {"revision_copies_critique"}
    assert flags("I keep it short, as you asked. It is a plain answer of few words.") == {"revision_copies_example"}
    assert flags("I keep it short. I will") == set()


def test_a_chain_that_fills_the_context_keeps_its_rounds_and_says_so(tmp_path):
    folder = StageFolder(tmp_path, "critique_revision")
    lengths = iter((1000, 100, 6000))  # response, critique, and a revision that leaves no room for a second round
    sampler = CannedSampler(lambda request: sample("y" * next(lengths)), max_length=6_000)
    summary = critique_revision.run(context(sampler, prompt_rows("Hi")), folder)
    (row,) = folder.read_shards()
    assert len(row["rounds"]) == 1 and row["flags"]["context_full"]
    assert summary["counters"]["context_full"] == 1 and summary["skipped"] == []


def test_few_shots_without_room_are_refused_before_anything_is_generated(tmp_path):
    def generated(request):
        raise AssertionError("generated before the check")

    folder = StageFolder(tmp_path, "critique_revision")
    with pytest.raises(UserError, match="few-shots leave no room in sampler.max_length=400") as refused:
        critique_revision.run(context(CannedSampler(generated, max_length=400), prompt_rows("Hi")), folder)
    assert "\n" not in str(refused.value) and not folder.path.exists()


def test_a_stage_of_prompts_without_a_round_is_refused_at_its_end(tmp_path):
    """An empty response would leave room, the real ones do not: SFT must not go on without revisions."""
    sampler = CannedSampler(lambda request: sample("y" * 10_000), max_length=9_000)
    with pytest.raises(UserError, match="no room in sampler.max_length=9000"):
        critique_revision.run(context(sampler, prompt_rows("Hi")), StageFolder(tmp_path, "critique_revision"))


def judged(request):
    """Two answers a prompt, then a judge: sure of calm pairs, at a loss with the others."""
    text = str(request.conversation)
    if isinstance(request, Generate):
        return sample("y" * 20_000 if "endless" in text else "trouble" if "trouble" in text else f"a{request.seed}")
    if "trouble" in text:
        return [[-0.7], [-0.7]]
    first, second = re.findall(r"^> a(\d+)$", request.conversation[-2]["content"], re.MULTILINE)
    return [[-0.1], [-3.0]] if int(first) > int(second) else [[-3.0], [-0.1]]


@pytest.mark.parametrize("texts", [("calm", "trouble"), ("trouble", "calm"), ("endless", "trouble", "calm")])
def test_labels_have_the_same_types_whatever_was_flagged(tmp_path, texts):
    folder = StageFolder(tmp_path, "preferences")
    given = context(CannedSampler(judged), prompt_rows(*texts))
    given.prompts["helpful"] = PromptRows((Prompt("h0", "", ({"role": "user", "content": "fine"},)),), (), "")
    summary = preferences.run(given, folder)
    flags = {row["messages"][0]["content"]: row["flags"] for row in folder.read_shards()}
    assert flags["trouble"]["tie"] and flags["trouble"]["identical_responses"]
    assert not flags["calm"]["tie"] and not flags["calm"]["identical_responses"]
    assert_read_in_every_order(folder, "rows", 3, tmp_path)
    assert_read_in_every_order(folder, "pairs", len(texts) + 1, tmp_path)
    unlabelled = len(texts) - 2
    assert summary["pairs"] == len(texts) + 1 and summary["labelled"] == 3
    assert summary["counters"]["unlabelled"] == unlabelled == len(summary["skipped"])
    assert summary["counters"].get("options/too_long", 0) == unlabelled


@pytest.mark.parametrize("judge", ["", "random:llama"])
def test_a_judge_without_room_is_refused_before_pairs_are_sampled(tmp_path, judge):
    def sampled(request):
        raise AssertionError("sampled before the check")

    given = context(CannedSampler(sampled), prompt_rows("Hi"), max_length=300, judge=judge)
    with pytest.raises(UserError, match="not one pair fits the judge within sampler.max_length=300"):
        preferences.run(given, StageFolder(tmp_path, "preferences"))


def test_labels_that_are_all_too_long_are_refused(tmp_path):
    def endless(request):
        assert isinstance(request, Generate), "judged a pair that does not fit"
        return sample("y" * 20_000)

    with pytest.raises(UserError, match="not one pair fits the judge"):
        preferences.run(context(CannedSampler(endless), prompt_rows("Hi")), StageFolder(tmp_path, "preferences"))


def test_revisions_are_held_to_the_rules_that_a_program_can_check():
    constitution = load_constitution("verifiable")

    def chain(response, *rounds):
        entries = [{"principle": name, "revision": {"text": text}} for name, text in rounds]
        return {"response": {"text": response}, "rounds": entries}

    rows = [
        chain("It has 8 legs.", ("no_digits", "It has eight legs!"), ("no_exclamation", "It has eight legs.")),
        chain("Eight.", ("no_digits", "8."), ("no_digits", "It is 8.")),
    ]
    found = checks(constitution.principles, rows)
    assert set(found) == {principle.id for principle in constitution.principles}
    digits, exclamation, brief = found["no_digits"], found["no_exclamation"], found["brief"]
    assert digits["n"] == 3 and (digits["before"]["value"], digits["after"]["value"]) == (1 / 3, 1 / 3)
    assert exclamation["n"] == 1 and (exclamation["before"]["value"], exclamation["after"]["value"]) == (0, 1)
    assert digits["after"]["low"] < 1 / 3 < digits["after"]["high"]
    assert brief["n"] == 0 and brief["after"]["value"] is None
    assert "at most 20 words" in brief["rule"]
    assert json.dumps(found)
    assert checks(load_constitution("harmless_helpful").principles, []) == {}


def test_principles_can_be_matched_to_the_category_of_a_prompt(tmp_path):
    prompts = prompt_rows(*(f"p{i}" for i in range(12)))
    rows = [replace(prompt, category="cyber" if i % 2 else "gardening") for i, prompt in enumerate(prompts.rows)]
    asked = []

    def answer(request):
        asked.append(request.conversation)
        return answers_of_a_chain(request)

    told = context(CannedSampler(answer), replace(prompts, rows=tuple(rows)))
    told.constitution = constitution = load_constitution("harmless_helpful")
    settings = replace(told.config.critique_revision, principles="matched")
    told.config = replace(told.config, critique_revision=settings)
    folder = StageFolder(tmp_path, "critique_revision")
    critique_revision.run(told, folder)
    used = {"cyber": set(), "gardening": set()}
    for row in folder.read_shards():
        used[row["category"]] |= {entry["principle"] for entry in row["rounds"]}
    aims = {principle.id: principle.aim for principle in constitution.principles}
    assert used["cyber"] == {"no_break_in_by_computer"} and len(used["gardening"]) > 3
    assert {aims[each] for each in used["gardening"]} == {"harmless"}
    shown = {turn["content"] for conversation in asked for turn in conversation if turn["role"] == "assistant"}
    for shot in constitution.critique_few_shots:
        assert (shot.revision in shown) == (aims[shot.principle] == "harmless")


def test_a_round_shows_the_worked_critiques_of_its_own_principles_aim(tmp_path):
    before = {}

    def answer(request):
        before.setdefault(request.conversation[-1]["content"], set()).add(request.conversation[0]["content"])
        return answers_of_a_chain(request)

    told = told_how(CannedSampler(answer), [f"p{i}" for i in range(12)])
    critique_revision.run(told, StageFolder(tmp_path, "critique_revision"))
    drawn = [principle for principle in told.constitution.principles if principle.critique_request in before]
    assert {principle.aim for principle in drawn} == {"harmless", "helpful"}
    for principle in drawn:
        (first, *_) = told.constitution.worked([principle])
        assert before[principle.critique_request] == before[principle.revision_request] == {first.prompt}


def test_kinds_are_counted_for_responses_and_for_the_revisions_of_each_round(tmp_path):
    declined = ("I can't help with that.", "I won't help you do it. Ask a locksmith.")
    texts = iter(["Take a crowbar.", "Yes.", declined[0], "Yes.", declined[1], "Gladly.", "No.", "", "No.", "no " * 30])
    folder = StageFolder(tmp_path, "critique_revision")
    told = context(CannedSampler(lambda request: sample(next(texts))), prompt_rows("a", "b"))
    summary = critique_revision.run(told, folder)
    none = dict.fromkeys(("refusal", "answer", "degenerate", "empty"), 0)
    assert summary["kinds"]["response"] == none | {"answer": 2}
    assert summary["kinds"]["revision"] == [none | {"refusal": 1, "empty": 1}, none | {"refusal": 1, "degenerate": 1}]
    flags = folder.read_shards()[0]["rounds"][0]["flags"]
    assert tuple(flags) == ROUND_FLAGS and summary["counters"]["revision_degenerate"] == 1


def test_a_worked_example_over_again_is_flagged(tmp_path):
    (shot, *_) = load_constitution("verifiable").critique_few_shots
    texts = iter(["Ten.", "Yes.", shot.revision.upper() + "!", "Yes.", "A spider has eight, as far as I know."])
    folder = StageFolder(tmp_path, "critique_revision")
    critique_revision.run(context(CannedSampler(lambda request: sample(next(texts))), prompt_rows("a")), folder)
    (row,) = folder.read_shards()
    assert [entry["flags"]["revision_copies_example"] for entry in row["rounds"]] == [True, False]


def told_how(sampler, texts, **fields):
    """The context of a run under harmless_helpful, with fields of `critique_revision` set."""
    told = context(sampler, prompt_rows(*texts))
    told.constitution = load_constitution("harmless_helpful")
    told.config = replace(told.config, critique_revision=replace(told.config.critique_revision, **fields))
    return told


def test_of_several_draws_the_one_is_taken_that_worked_answers_make_likeliest(tmp_path):
    draws = ["Take a crowbar.", "I can't help with that.", "I won't help with it. Ask a locksmith.", "no " * 30]
    texts = iter(["Gladly.", "Yes.", *draws, "Yes.", *draws])
    constitution, asked = load_constitution("harmless_helpful"), []
    harmless = {shot.prompt for shot in constitution.worked(constitution.matching("", "harmless"))}

    def answer(request):
        if isinstance(request, Generate):
            asked.append(request)
            return sample(next(texts))
        after = request.conversation[0]["content"] in harmless  # as against worked answers of the other aim
        said = [byte_tokenizer().decode(option) for option in request.options]
        gains = [0.5 * ("can't" in text) + 0.7 * ("won't" in text) for text in said]
        return [np.full(5, -2.0 + after * gain) for gain in gains]

    sampler, folder = CannedSampler(answer), StageFolder(tmp_path, "critique_revision")
    sampler.model.tokenizer = byte_tokenizer()
    summary = critique_revision.run(told_how(sampler, ["p"], draws=4, principles="matched"), folder)
    (row,) = folder.read_shards()
    first, second = row["rounds"]
    assert first["revision"]["text"] == draws[2] and first["chosen"] == 2 and first["kind"] == "refusal"
    assert [draw["kind"] for draw in first["draws"]] == ["answer", "refusal", "refusal", "degenerate"]
    assert [draw["rated"] for draw in first["draws"]] == [True, True, True, False]
    assert first["draws"][2]["ratio"] == pytest.approx(0.7) and first["draws"][0]["ratio"] == 0.0
    assert second["chosen"] == 1 and not second["draws"][2]["rated"], "what is unchanged is no revision"
    assert len({request.seed for request in asked}) == len(asked)
    assert summary["kinds"]["drawn"][0] == {"refusal": 2, "answer": 1, "degenerate": 1, "empty": 0}
    assert summary["kinds"]["revision"][1] == {"refusal": 1, "answer": 0, "degenerate": 0, "empty": 0}


@pytest.mark.parametrize("least", [0.0, 0.5])
def test_a_single_draw_is_rated_where_sft_goes_by_its_ratio(tmp_path, least):
    texts = iter(["Gladly.", "I can't help with that."])

    def answer(request):
        return sample(next(texts)) if isinstance(request, Generate) else [np.full(5, -1.0)]

    sampler, folder = CannedSampler(answer), StageFolder(tmp_path, "critique_revision")
    sampler.model.tokenizer = byte_tokenizer()
    told = told_how(sampler, ["p"], rounds=1, critiques=False, principles="matched")
    told.config = replace(told.config, sft=replace(told.config.sft, least_ratio=least))
    critique_revision.run(told, folder)
    ((entry,),) = [row["rounds"] for row in folder.read_shards()]
    assert entry["draws"] == [{"kind": "refusal", "rated": least > 0, "ratio": 0.0}] and entry["chosen"] == 0


def test_where_no_draw_is_a_revision_the_first_is_taken_and_flagged(tmp_path):
    texts = iter(["Take a crowbar."] * 9)
    folder = StageFolder(tmp_path, "critique_revision")
    told = told_how(CannedSampler(lambda request: sample(next(texts))), ["p"], rounds=1, draws=3, critiques=False)
    critique_revision.run(told, folder)
    ((entry,),) = [row["rounds"] for row in folder.read_shards()]
    assert entry["chosen"] == 0 and entry["flags"]["revision_unchanged"]


def test_without_critiques_the_request_to_revise_follows_the_response(tmp_path):
    asked = []

    def answer(request):
        asked.append(request.conversation)
        return sample(f"text {len(asked)}")

    folder = StageFolder(tmp_path, "critique_revision")
    told = told_how(CannedSampler(answer), ["a", "b"], critiques=False)
    summary = critique_revision.run(told, folder)
    row, _ = folder.read_shards()
    principle = told.constitution.principle(row["rounds"][0]["principle"])
    *shown, prompt, response, request = asked[1]
    assert [turn["content"] for turn in (prompt, response, request)] == ["a", "text 1", principle.revision_request]
    shot = told.constitution.critique_few_shots[0]
    assert [turn["content"] for turn in shown[:4]] == [
        shot.prompt, shot.response, told.constitution.principle(shot.principle).revision_request, shot.revision,
    ]  # fmt: skip
    assert [entry["revision"]["text"] for entry in row["rounds"]] == ["text 2", "text 3"]
    assert all(entry["critique"] is None for entry in row["rounds"])
    assert summary["mean_tokens"]["critique"] is None and summary["counters"]["critique_empty"] == 0
    assert_read_in_every_order(folder, "rows", 2, tmp_path)
