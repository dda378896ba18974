"""The door: whatever a stage cannot use is refused before a stage runs and before `--fresh` discards anything."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cai_jax.config import NO_REVISIONS, ROUND_FLAGS, STAGES
from cai_jax.errors import UserError
from cai_jax.models.byte_tokenizer import byte_tokenizer
from cai_jax.models.pretrained import load_model, save_model
from cai_jax.named_runs import load_config
from cai_jax.overrides import apply_overrides
from cai_jax.progress import Progress
from cai_jax.run_folder import StageFolder
from cai_jax.stages import inputs, sft
from cai_jax.stages.context import prepare
from cai_jax.stages.rows import usable_prompts


def open_door(run_dir, *overrides, stages=STAGES, fresh=False):
    run_dir.mkdir(exist_ok=True)
    config = replace(apply_overrides(load_config("tiny")[1], overrides), stages=tuple(stages))
    return prepare("tiny", config, run_dir, fresh, Progress(run_dir))


def refusal(run_dir, *overrides, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_door(run_dir, *overrides, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def export(folder, kind="policy", tokenizer=None, source="random:llama"):
    model = load_model(source, kind=kind)
    save_model(folder, model.config, model.params, tokenizer or model.tokenizer, model.hf_config, kind)
    return folder


def done(run_dir, stage, **model):
    """A stage that is done, with a model if it leaves one."""
    folder = StageFolder(run_dir, stage)
    folder.begin({})
    if model:
        export(folder.path / "model", **model)
    folder.finish({})


def rotated():
    """The tokenizer of random models with the ids of two letters exchanged."""
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    return tokenizer


# ---------------------------------------------------------------- prompts


def write_prompts(path, *texts, **more):
    path.write_text("".join(json.dumps({"prompt": text} | more) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("stages", [("evaluate",), ("critique_revision",)])
def test_a_prompt_on_both_sides_is_refused_whatever_stages_are_selected(tmp_path, stages):
    path = write_prompts(tmp_path / "own.jsonl", "How do I open a safe?")
    sets = [f"prompts.{name}.{field}" for name in ("red_team", "eval_helpful") for field in (f"path={path}", "split=")]
    message = refusal(tmp_path / "run", *sets, stages=stages)
    assert "red_team red_team-00001 = eval_helpful eval_helpful-00001" in message


def test_numbered_sets_get_rows_of_their_own(tmp_path):
    overrides = []
    for name in ("red_team", "helpful", "eval_red_team", "eval_helpful"):
        path = write_prompts(tmp_path / f"{name}.jsonl", f"Is {name} a word?", id=0)
        overrides += [f"prompts.{name}.path={path}", f"prompts.{name}.split="]
    context = open_door(tmp_path / "run", *overrides)
    ids = {name: [prompt.id for prompt in rows.rows] for name, rows in context.prompts.items()}
    assert (ids["red_team"], ids["helpful"]) == (["red_team/0"], ["helpful/0"])
    assert (ids["eval_red_team"], ids["eval_helpful"]) == (["eval_red_team/0"], ["eval_helpful/0"])
    assert context.fingerprint("sft")["input.prompts.helpful"] == context.describe()["prompts"]["helpful"]["hash"]


# ---------------------------------------------------------------- stages and models that are not there


@pytest.mark.parametrize("stages, told", [
    (("ppo",), "stage ppo needs the artifacts of stage sft"),
    (("critique_revision", "ppo"), "set ppo.policy to a model folder"),
    (("critique_revision", "sft", "ppo"), "stage ppo needs the artifacts of stage reward_model"),
    (("sft",), "run --stages=critique_revision first"),
])  # fmt: skip
def test_a_stage_without_its_input_is_refused_at_the_door(tmp_path, stages, told):
    assert told in refusal(tmp_path, stages=stages)


@pytest.mark.parametrize("field", [
    "preferences.policy", "preferences.judge", "reward_model.start", "ppo.policy", "ppo.reward_model",
    "evaluate.sft", "evaluate.rl", "evaluate.reward_model", "dpo.policy", "best_of_n.policy", "best_of_n.reward_model",
    "evaluate.dpo", "evaluate.best_of_n", "evaluate.grpo",
])  # fmt: skip
def test_every_model_that_is_named_is_looked_at(tmp_path, field):
    assert "/nope: no such folder" in refusal(tmp_path / "run", f"{field}=/nope")
    reward = "reward_model" in field.split(".")[1]
    other = export(tmp_path / "other", kind="policy" if reward else "reward")
    if field != "reward_model.start":  # which may be both
        told = "holds no score head" if reward else "holds a reward model"
        assert told in refusal(tmp_path / "run", f"{field}={other}")


def test_models_that_will_be_made_or_are_done_are_taken(tmp_path):
    open_door(tmp_path / "new")
    for stage in ("critique_revision", "preferences"):
        done(tmp_path / "old", stage)
    for stage, kind in (("sft", "policy"), ("reward_model", "reward")):
        done(tmp_path / "old", stage, kind=kind)
    open_door(tmp_path / "old", stages=("ppo", "evaluate"))
    (tmp_path / "old" / "sft" / "model" / "model.safetensors").unlink()
    assert "sft/model/model.safetensors: no such file" in refusal(tmp_path / "old", stages=("ppo",))
    assert open_door(tmp_path / "empty", stages=("evaluate",))  # compares what there is


def test_a_judge_that_cannot_answer_is_refused(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(inputs, "resolve_options", lambda tokenizer: asked.append(tokenizer.get_vocab()["A"]))
    judge = export(tmp_path / "judge", tokenizer=rotated())
    open_door(tmp_path / "run", f"preferences.judge={judge}")
    open_door(tmp_path / "run")
    assert asked == [rotated().get_vocab()["A"], byte_tokenizer().get_vocab()["A"]]


def test_a_model_that_the_command_makes_itself_is_refused(tmp_path):
    for stage, kind in (("sft", "policy"), ("ppo", "policy"), ("reward_model", "reward")):
        done(tmp_path, stage, kind=kind)
    own = tmp_path / "ppo" / "model"
    assert "is what stage ppo of this command makes" in refusal(
        tmp_path, f"ppo.policy={own}", stages=("ppo",), fresh=True
    )
    assert own.exists()


def test_fresh_discards_only_when_the_stages_can_run(tmp_path):
    done(tmp_path, "ppo", kind="policy")
    for overrides in ([], ["ppo.policy=random:llama", "ppo.reward_model=/nope"], ["model.source=/nope"]):
        refusal(tmp_path, *overrides, stages=("ppo",), fresh=True)
        assert StageFolder(tmp_path, "ppo").done()
    open_door(tmp_path, "ppo.policy=random:llama", "ppo.reward_model=random:llama", stages=("ppo",), fresh=True)
    assert not (tmp_path / "ppo").exists()


# ---------------------------------------------------------------- what models must have in common


@pytest.mark.parametrize("stages, field, kind", [
    (("ppo",), "ppo.reward_model", "reward"),
    (("ppo",), "ppo.policy", "policy"),
    (("evaluate",), "evaluate.sft", "policy"),
    (("evaluate",), "evaluate.rl", "policy"),
    (("evaluate",), "evaluate.dpo", "policy"),
    (("evaluate",), "evaluate.best_of_n", "policy"),
    (("evaluate",), "evaluate.grpo", "policy"),
    (STAGES, "best_of_n.policy", "policy"),
    (STAGES, "best_of_n.reward_model", "reward"),
    (("evaluate",), "evaluate.reward_model", "reward"),
    (STAGES, "reward_model.start", "policy"),
])  # fmt: skip
def test_another_tokenizer_is_refused_where_ids_go_from_model_to_model(tmp_path, stages, field, kind):
    given = {"ppo.policy": "random:llama", "ppo.reward_model": "random:llama"} if stages == ("ppo",) else {}
    fine = given | {field: export(tmp_path / "same", kind)}
    open_door(tmp_path / "run", *(f"{name}={model}" for name, model in fine.items()), stages=stages)
    other = given | {field: export(tmp_path / "other", kind, rotated())}
    message = refusal(tmp_path / "run", *(f"{name}={model}" for name, model in other.items()), stages=stages)
    assert "its tokenizer is not that of" in message and str(tmp_path / "other") in message


def test_preferences_are_text_so_their_models_may_have_other_tokenizers(tmp_path):
    other = export(tmp_path / "other", tokenizer=rotated())
    open_door(tmp_path / "run", f"preferences.judge={other}", f"preferences.policy={other}")


@pytest.mark.parametrize(
    "field", ["sft.sequence_length", "reward_model.max_length", "dpo.max_length", "best_of_n.sequence_length"]
)
def test_a_length_beyond_the_positions_of_the_model_is_refused(tmp_path, field):
    distilled = "best_of_n.distill=true"
    open_door(tmp_path, f"{field}=1024", distilled)
    assert f"{field} (1025) exceeds the 1024 positions of random:llama" in refusal(tmp_path, f"{field}=1025", distilled)


def test_rollouts_longer_than_the_reward_model_holds_are_refused(tmp_path):
    model = load_model("random:llama", kind="reward")
    short = replace(model.config, max_position=128), model.params, model.tokenizer
    save_model(tmp_path / "short", *short, model.hf_config | {"max_position_embeddings": 128}, "reward")
    fields = ["ppo.policy=random:llama", f"ppo.reward_model={tmp_path / 'short'}", "ppo.response.max_new_tokens=28"]
    open_door(tmp_path / "run", *fields, "ppo.max_prompt_tokens=100", stages=("ppo",))
    message = refusal(tmp_path / "run", *fields, "ppo.max_prompt_tokens=101", stages=("ppo",))
    assert "ppo.max_prompt_tokens + ppo.response.max_new_tokens (129) exceeds the 128 positions" in message


# ---------------------------------------------------------------- what has changed since


def test_the_evaluation_depends_on_how_best_of_n_answers_where_it_is_a_way_to_answer(tmp_path):
    def of_best_of_n(*overrides, stages=STAGES):
        fingerprint = open_door(tmp_path / "run", *overrides, stages=stages).fingerprint("evaluate")
        return {key: value for key, value in fingerprint.items() if "best_of_n." in key and "evaluate." not in key}

    assert of_best_of_n("best_of_n.n=5")["config.best_of_n.n"] == 5
    assert "input.best_of_n.policy" in of_best_of_n("best_of_n.policy=random:llama")
    assert of_best_of_n("best_of_n.distill=true") == {}, "the hash of its artifacts says all"
    assert of_best_of_n("evaluate.best_of_n=random:llama") == {}
    assert of_best_of_n(stages=("evaluate",)) == {}, "there is no best-of-n in this run"


def test_best_of_n_without_a_model_is_not_asked_for_one(tmp_path):
    for stage, kind in (("sft", "policy"), ("reward_model", "reward")):
        done(tmp_path, stage, kind=kind)
    done(tmp_path, "best_of_n")
    open_door(tmp_path, stages=("evaluate",))
    assert "best_of_n/model" in refusal(tmp_path, "best_of_n.distill=true", stages=("evaluate",))


def test_another_judge_in_the_same_folder_is_noticed(tmp_path):
    judge = export(tmp_path / "judge")
    for stage in ("critique_revision", "sft"):
        done(tmp_path / "run", stage, **({"kind": "policy"} if stage == "sft" else {}))
    begin = open_door(tmp_path / "run", f"preferences.judge={judge}", stages=("preferences",))
    begin.folder("preferences").begin(begin.fingerprint("preferences"))
    open_door(tmp_path / "run", f"preferences.judge={judge}", stages=("preferences",))
    export(judge, source="random:qwen3")
    assert "input.judge" in refusal(tmp_path / "run", f"preferences.judge={judge}", stages=("preferences",))


def test_random_models_stand_in_for_every_override(tmp_path):
    context = open_door(tmp_path, "ppo.policy=random:llama", "ppo.reward_model=random:llama", stages=("ppo",))
    assert context.fingerprint("ppo")["input.policy"] == context.base.hash


def test_changed_work_of_any_selected_stage_is_refused_before_the_first_runs(tmp_path):
    first = open_door(tmp_path)
    first.folder("ppo").begin(first.fingerprint("ppo") | {"input.sft": "x", "input.reward_model": "y"})
    open_door(tmp_path)
    assert "config.ppo.kl_coef 0.02 -> 0.5" in refusal(tmp_path, "ppo.kl_coef=0.5")
    open_door(tmp_path, "ppo.kl_coef=0.5", stages=("critique_revision", "sft"))


# ---------------------------------------------------------------- rows that a stage can use


def test_a_prompt_must_leave_room_for_the_whole_completion():
    """Also where the model holds fewer positions than ppo.max_prompt_tokens and a completion need."""
    sampler = SimpleNamespace(max_length=100, fits=lambda messages, room: len(messages[0]["content"]) + room <= 100)
    prompts = [SimpleNamespace(id=n, messages=[{"role": "user", "content": "x" * n}]) for n in (30, 60, 90)]
    rows = SimpleNamespace(rows=prompts, skipped=())

    def usable(*limits):
        return [prompt.id for prompt in usable_prompts(sampler, rows, *limits)[0]]

    assert usable(30) == [30, 60] and usable(10) == [30, 60, 90]
    assert usable(30, 50) == [30]  # asks for shorter ones
    assert usable(30, 95) == usable(30, 200) == [30, 60]


def completion(text="Fine.", truncated=False):
    return {"text": text, "truncated": truncated, "tokens": 1}


def sft_context(tmp_path, *revisions):
    messages = [{"role": "user", "content": "Hello"}]
    folder = StageFolder(tmp_path, "critique_revision")
    folder.write_shard(0, 1, [
        {"id": f"rt-{n}", "messages": messages, "rounds": [{
            "round": 1, "revision": revision,
            "flags": {flag: flag == revision.get("flagged") for flag in ROUND_FLAGS},
            "chosen": 0, "draws": [{"rated": "ratio" in revision, "ratio": revision.get("ratio", 0.0)}],
        }]}
        for n, revision in enumerate(revisions)
    ])  # fmt: skip
    config = apply_overrides(load_config("tiny")[1], [f"sft.drop={','.join(NO_REVISIONS)}"])
    return SimpleNamespace(
        base=SimpleNamespace(tokenizer=byte_tokenizer()), config=config, folder=lambda stage: folder
    )


def test_an_empty_revision_is_named_and_the_rest_is_used(tmp_path):
    counters, skipped = {"empty_completion": 0, "truncated_completion": 0, "too_long": 0}, []
    context = sft_context(tmp_path, completion(" \n"), completion(), completion("x" * 999))
    assert len(sft._revisions(context, counters, skipped)) == 1
    assert [row["id"] for row in skipped] == ["rt-0/round-1", "rt-2/round-1"]
    assert skipped[0]["reason"] == "empty completion" and "sft.sequence_length=256" in skipped[1]["reason"]
    assert counters == {"empty_completion": 1, "truncated_completion": 0, "too_long": 1}


@pytest.mark.parametrize("setting", ["critique_revision.draws=2", "sft.least_ratio=0.5"])
def test_ratios_of_revisions_need_worked_answers(tmp_path, setting):
    text = (Path(__file__).parents[2] / "constitutions" / "verifiable.yaml").read_text(encoding="utf-8")
    bare = tmp_path / "bare.yaml"
    bare.write_text(text[: text.index("few_shots:")].replace("name: verifiable", "name: bare"), encoding="utf-8")
    told = refusal(tmp_path / "run", setting, f"constitution={bare}")
    assert "no worked critique, by which critique_revision.draws (" in told


SHIPPED = (Path(__file__).parents[2] / "constitutions" / "harmless_helpful.yaml").read_text(encoding="utf-8")
MATCHED = "preferences.matched=true"


@pytest.mark.parametrize(
    ("text", "settings", "told"),
    [
        (SHIPPED, ["preferences.labelers=examples"], f"set {MATCHED}, so that the aim fits the prompt"),
        (SHIPPED.replace("aim: helpful", "aim: harmless"), [MATCHED], "no principle has the aim helpful"),
        (re.sub(r"    aim: \w+\n", "", SHIPPED), [MATCHED], "no principle has an aim"),
        (
            re.sub(r"    aim: \w+\n", "", SHIPPED),
            ["preferences.contrasted=true"],
            "no worked critique has a principle of harmless or helpful aim, which preferences.contrasted needs",
        ),
        (
            SHIPPED,
            ["principles=careful_with_money,no_lecture", "critique_revision.draws=2"],
            "no worked critique has a principle of harmless aim, and others have",
        ),
        (
            SHIPPED,
            ["principles=careful_with_money,no_lecture", "sft.least_ratio=0.5"],
            "no worked critique has a principle of harmless aim, and others have",
        ),
    ],
    ids=[
        "unmatched", "an aim is missing", "no aims", "contrasted without aims", "draws: no worked critique of an aim",
        "least_ratio: no worked critique of an aim",
    ],
)
def test_aims_that_labels_or_drafts_would_miss_are_refused(tmp_path, text, settings, told):
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("name: harmless_helpful", "name: mine"), encoding="utf-8")
    assert told in refusal(tmp_path / "run", *settings, f"constitution={mine}")


def test_what_is_no_revision_is_dropped_by_name(tmp_path):
    counters, skipped = Counter(), []
    flagged = [completion() | {"flagged": flag} for flag in ("revision_unchanged", "revision_truncated", "")]
    examples = sft._revisions(sft_context(tmp_path, *flagged), counters, skipped)
    assert len(examples) == 2 and counters["dropped/revision_unchanged"] == 1
    assert skipped == [{"id": "rt-0/round-1", "reason": "revision unchanged"}]
    with pytest.raises(UserError, match="sft: sft.drop .revision_unchanged, .* and sft.least_ratio .0. leave no rev"):
        sft._revisions(sft_context(tmp_path / "none", flagged[0]), counters, skipped)


def test_a_revision_that_worked_answers_make_no_likelier_is_dropped_where_it_was_rated(tmp_path):
    counters, skipped = Counter(), []
    context = sft_context(tmp_path, *[completion() | {"ratio": ratio} for ratio in (-0.1, 0.3, 0.9)], completion())
    assert len(sft._revisions(context, counters, skipped)) == 4 and not skipped, "without a least ratio all are learnt"
    context.config = apply_overrides(context.config, ["sft.least_ratio=0.2"])
    assert len(sft._revisions(context, counters, skipped)) == 3
    assert skipped == [{"id": "rt-0/round-1", "reason": "unlike worked answers"}]
    context.config = apply_overrides(context.config, ["sft.least_ratio=0.5"])
    assert len(sft._revisions(context, counters, skipped)) == 2 and counters["dropped/unlike_worked_answers"] == 3
    context.config = apply_overrides(context.config, ["sft.least_ratio=1"])
    assert len(sft._revisions(context, Counter(), [])) == 1, "what was not rated stays"


def test_revisions_are_made_again_where_ratios_are_wanted_and_only_there(tmp_path):
    def of(*overrides):
        return open_door(tmp_path / "run", *overrides).fingerprint("critique_revision")

    plain, rated, other = of(), of("sft.least_ratio=0.5"), of("sft.least_ratio=0.8")
    assert "input.ratios" not in plain and rated == other == plain | {"input.ratios": rated["input.ratios"]}
    assert of("critique_revision.draws=2") == of("critique_revision.draws=2", "sft.least_ratio=0.5")


def test_a_least_ratio_for_revisions_without_any_is_refused(tmp_path):
    context = sft_context(tmp_path, completion(), completion())
    context.config = apply_overrides(context.config, ["sft.least_ratio=0.2"])
    with pytest.raises(UserError, match="sft.least_ratio: the rows of critique_revision have no ratios.*--fresh"):
        sft._revisions(context, Counter(), [])


def test_nothing_is_sampled_or_trained_where_no_revision_can_be_used(tmp_path):
    with pytest.raises(UserError, match="sft: no revision can be used: of 2, 1 are empty and 1 exceed .*summary.json"):
        sft.run(sft_context(tmp_path, completion(""), completion("x" * 999)), None)
