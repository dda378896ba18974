"""The whole pipeline on a tiny random model: run, killed and resumed, refused, and read by others."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.json
import pytest
from event_files import event_files, scalars
from run_folders import artifacts

from cai_jax.config import OPTIONAL, STAGES
from cai_jax.models import lora
from cai_jax.models.adapters import load_adapter
from cai_jax.models.families import flatten
from cai_jax.models.pretrained import load_model

DEFAULT = [stage for stage in STAGES if stage not in OPTIONAL]
COMMAND = [sys.executable, "-m", "cai_jax.launch", "--config=tiny"]
KILLED_WHEN = str(Path(__file__).parents[1] / "killed_when.py")
# In each stage, a file that is written while the stage is far from done.
MIDDLES = {
    "critique_revision": "rows-00000-of-*.jsonl",
    "sft": "checkpoints/[0-9]",
    "preferences": "pairs-00001-of-*.jsonl",
    "reward_model": "checkpoints/[0-9]",
    "ppo": "checkpoints/[0-9]",
    "evaluate": "rows-base-00000-of-*.jsonl",
}
# The same for stages that it has when asked.
OTHERS = {
    "red_team": "lists-00001-of-*.jsonl", "judge": "opinions-options-00001-of-*.jsonl", "dpo": "checkpoints/[0-9]",
    "best_of_n": "checkpoints/[0-9]",
}  # fmt: skip


def launch(run_dir: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, f"--run_dir={run_dir}", *flags], capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    result = launch(run_dir, "--profile")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("report.html")
    return run_dir


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def assert_same_artifacts(finished: Path, run_dir: Path) -> None:
    expected, got = artifacts(finished), artifacts(run_dir)
    assert sorted(got) == sorted(expected)
    assert [name for name in expected if got[name] != expected[name]] == []


def kill_in(stage: str, run_dir: Path, *flags: str) -> None:
    """Start the run and kill it in the middle of a stage."""
    middle = f"{run_dir / stage}/{(MIDDLES | OTHERS)[stage]}"
    command = [sys.executable, KILLED_WHEN, middle, *COMMAND[3:], f"--run_dir={run_dir}", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == -signal.SIGKILL, f"{stage} did not come to its middle: {result.stderr}"
    assert not (run_dir / stage / "done.json").exists()


def summary(run_dir: Path, stage: str) -> dict:
    return json.loads((run_dir / stage / "summary.json").read_text())


def test_every_stage_leaves_its_artifacts_and_the_report_shows_them(finished):
    report = (finished / "report.html").read_text()
    for stage in DEFAULT:
        done = json.loads((finished / stage / "done.json").read_text())
        assert {"summary.json", "fingerprint.json"} <= set(done["artifacts"])
        assert not (finished / stage / "checkpoints").exists()
        timing = json.loads((finished / stage / "timing.json").read_text())
        assert timing["peak_memory_bytes"] > 2**20
    assert 3 <= timing["sampler_programs_so_far"] <= 12
    assert "not run yet" not in report and "not asked for" not in report and "Verifiable principles" in report
    assert set(summary(finished, "evaluate")["models"]) == {"base", "sl_cai", "rl_cai"}


def test_a_run_killed_in_every_stage_ends_with_the_same_bytes(finished, tmp_path):
    run_dir = tmp_path / "killed"
    for stage in DEFAULT:
        kill_in(stage, run_dir)
    result = launch(run_dir)
    assert result.returncode == 0, result.stderr
    assert "going on where it stopped" in result.stderr
    assert_same_artifacts(finished, run_dir)
    for stage in ("sft", "reward_model", "ppo"):
        once, resumed = scalars(finished / stage), scalars(run_dir / stage)
        assert len(event_files(run_dir / stage)) == 2
        assert {tag: [step for step, _ in pairs] for tag, pairs in resumed.items()} == {
            tag: [step for step, _ in pairs] for tag, pairs in once.items()}
        assert all(resumed[tag] == once[tag] for tag in once if tag.startswith("metrics/") and "accuracy" not in tag)


def test_numbers_are_in_event_files_and_timings(finished):
    for stage, unit in (("sft", "step"), ("reward_model", "step"), ("ppo", "update")):
        metrics = [json.loads(line) for line in open(finished / stage / "metrics.jsonl")]
        timings = [json.loads(line) for line in open(finished / stage / "timings.jsonl")]
        assert [line[unit] for line in timings] == [line[unit] for line in metrics]
        assert all(line["seconds"] > 0 and line["flops_per_second"] > 0 and line["mfu"] is None for line in timings)
        shown = scalars(finished / stage)
        assert shown["metrics/grad_norm"] == [(line[unit], pytest.approx(line["grad_norm"])) for line in metrics]
        assert [value for _, value in shown["speed/seconds"]] == pytest.approx([line["seconds"] for line in timings])
        done = json.loads((finished / stage / "done.json").read_text())["artifacts"]
        assert "metrics.jsonl" in done and not [name for name in done if name.startswith(("events", "timing"))]


def test_profile_traces_every_kind_of_work_and_says_where(finished):
    log = (finished / "log.txt").read_text()
    assert f"under {finished / 'profile'}" in log
    for name in ("critique_revision", "sft", "preferences_labels_options", "reward_model", "ppo", "evaluate_base"):
        assert list((finished / "profile" / name).glob("plugins/profile/*/*.xplane.pb")), f"no trace of {name}"


def test_adapters_run_through_all_stages_and_survive_a_kill(finished, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    shutil.copytree(finished / "critique_revision", whole / "critique_revision")  # no adapter has a part in it
    anchored = "--set=sft.anchor=0.5", "--set=sft.share_start=true"
    result = launch(whole, "--set", "lora.rank=4", *anchored)
    assert result.returncode == 0, result.stderr
    assert "critique_revision: done before, skipped" in result.stderr
    assert summary(whole, "sft")["last_loss"] < summary(whole, "sft")["first_loss"]
    metrics = [json.loads(line) for line in open(whole / "ppo" / "metrics.jsonl")]
    assert abs(metrics[0]["kl"]) < 1e-3 and metrics[1]["kl_k3"] > 1e-6
    for stage, kind in (("sft", "policy"), ("reward_model", "reward"), ("ppo", "policy")):
        start = load_model(whole / "sft" / "model" if stage != "sft" else "random:llama", kind=kind, new_head=True)
        adapted = load_adapter(whole / stage / "adapter", start)
        merged, exported = flatten(lora.merge(adapted.params)), flatten(load_model(whole / stage / "model").params)
        for name, leaf in exported.items():
            np.testing.assert_allclose(merged[name], leaf, atol=1e-6, err_msg=f"{stage} {name}")
        assert np.abs(exported["layers/q"] - start.params["layers"]["q"]).max() > 1e-5
        np.testing.assert_array_equal(exported["embed"], start.params["embed"])
    shutil.copytree(whole, killed)
    for stage in ("sft", "ppo"):
        shutil.rmtree(killed / stage)
    flags = ("--set", "lora.rank=4", *anchored, "--stages=sft,ppo")
    for stage in ("sft", "ppo"):
        kill_in(stage, killed, *flags)
    assert launch(killed, *flags).returncode == 0
    assert_same_artifacts(whole, killed)


@pytest.mark.parametrize("rank", [0, 4])
def test_an_anchored_model_leaves_its_own_answers_as_they_were(finished, tmp_path, rank):
    """The same steps with a strong anchor keep the model nearer to what it was than with none to speak of."""
    flags = ("--stages=sft", f"--set=lora.rank={rank}", "--set=sft.epochs=3", "--set=sft.optimizer.learning_rate=3e-3")
    drift = {}
    for anchor in ("0.001", "30"):
        run_dir = tmp_path / anchor
        shutil.copytree(finished / "critique_revision", run_dir / "critique_revision")
        result = launch(run_dir, *flags, f"--set=sft.anchor={anchor}")
        assert result.returncode == 0, result.stderr
        metrics = [json.loads(line) for line in open(run_dir / "sft" / "metrics.jsonl")]
        assert metrics[0]["anchor_kl"] == pytest.approx(0, abs=1e-6), "it starts as the model that it is anchored to"
        drift[anchor] = metrics[-1]["anchor_kl"]
    assert 0 < drift["30"] < drift["0.001"] / 2


def test_alternatives_learn_from_the_same_data_and_survive_a_kill(finished, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for run_dir in (whole, killed):
        for stage in DEFAULT[:-1]:
            shutil.copytree(finished / stage, run_dir / stage)
    flags = ("--stages=dpo,best_of_n,evaluate", "--set=best_of_n.distill=true", "--set=checkpoints.export=best")
    result = launch(whole, *flags)
    assert result.returncode == 0, result.stderr
    for stage in ("dpo", "best_of_n"):
        kill_in(stage, killed, *flags)
    assert launch(killed, *flags).returncode == 0
    assert_same_artifacts(whole, killed)
    assert set(summary(whole, "evaluate")["models"]) == {"base", "sl_cai", "rl_cai", "dpo", "best_of_n"}
    assert "could not be drawn" not in (whole / "report.html").read_text()

    learnt = summary(whole, "dpo")
    metrics = [json.loads(line) for line in open(whole / "dpo" / "metrics.jsonl")]
    assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-6), "policy and reference start as one"
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-5) and learnt["last_loss"] < learnt["first_loss"]
    rows = [json.loads(line) for path in sorted((whole / "dpo").glob("reference-*")) for line in open(path)]
    assert sum(row["held_out"] for row in rows) == learnt["held_out"]["n"]
    labels = [json.loads(line) for path in (whole / "preferences").glob("rows-*") for line in open(path)]
    labels = [row for row in labels if row["kept"]]
    prefers_a = {row["id"]: row["probability_a"] >= 0.5 for row in labels}
    assert all((row["chosen"] == "a") == prefers_a[row["id"]] for row in rows)
    assert len(rows) + learnt["counters"]["tie"] + learnt["counters"]["identical_responses"] == len(labels)

    best = summary(whole, "best_of_n")
    assert best["best"]["value"] > best["first"]["value"] and best["curve"][-1]["score"] == best["best"]
    assert best["distillation"]["last_loss"] > 0 and (whole / "best_of_n" / "model").is_dir()
    models = [load_model(whole / stage / "model").params["layers"]["q"] for stage in ("sft", "dpo", "best_of_n")]
    assert all(np.abs(after - models[0]).max() > 1e-5 for after in models[1:])


def test_dpo_with_adapters_has_its_reference_below_them_and_soft_labels_take_ties_in(finished, tmp_path):
    run_dir = tmp_path / "run"
    for stage in ("sft", "preferences"):
        shutil.copytree(finished / stage, run_dir / stage)
    result = launch(run_dir, "--stages=dpo", "--set=lora.rank=4", "--set=dpo.soft_labels=true")
    assert result.returncode == 0, result.stderr
    metrics = [json.loads(line) for line in open(run_dir / "dpo" / "metrics.jsonl")]
    assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and abs(metrics[0]["margin"]) < 1e-5
    assert max(abs(line["margin"]) for line in metrics[1:]) > 1e-4
    found, labels = summary(run_dir, "dpo"), summary(run_dir, "preferences")
    assert found["counters"]["tie"] == 0
    used = found["train_pairs"] + found["held_out"]["n"]
    assert used == labels["kept"] - found["counters"]["identical_responses"] - found["counters"]["too_long"]
    start = load_model(run_dir / "sft" / "model")
    merged = flatten(lora.merge(load_adapter(run_dir / "dpo" / "adapter", start).params))
    for name, leaf in flatten(load_model(run_dir / "dpo" / "model").params).items():
        np.testing.assert_allclose(merged[name], leaf, atol=1e-6, err_msg=name)


def test_best_of_n_that_is_not_distilled_answers_by_choice(finished, tmp_path):
    run_dir = tmp_path / "run"
    for stage in ("sft", "reward_model"):
        shutil.copytree(finished / stage, run_dir / stage)
    flags = ("--set", "evaluate.response.temperature=1.0")
    assert launch(run_dir, "--stages=best_of_n,evaluate", *flags).returncode == 0
    assert not (run_dir / "best_of_n" / "model").exists()
    files = {name: sorted((run_dir / "evaluate").glob(f"rows-{name}-*")) for name in ("sl_cai", "best_of_n")}
    by_model = {name: [json.loads(line) for path in paths for line in open(path)] for name, paths in files.items()}
    assert all(best["reward"] >= first["reward"] for first, best in zip(*by_model.values(), strict=True))
    assert any(best["reward"] > first["reward"] for first, best in zip(*by_model.values(), strict=True))
    for first, best in zip(*by_model.values(), strict=True):
        assert (first["id"], first["margin"]) == (best["id"], pytest.approx(best["margin"]))
        same = first["response"] == best["response"]
        assert not same or best["kl"] == pytest.approx(first["kl"] + np.log(3) - 2 / 3, abs=1e-3)
    changed = launch(run_dir, "--stages=evaluate", *flags, "--set", "best_of_n.n=2")
    assert changed.returncode == 2 and "best_of_n.n 3 -> 2" in changed.stderr


def test_a_finished_run_does_nothing_again(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("model/*")}
    result = launch(copy)
    assert result.returncode == 0
    assert result.stderr.count("skipped") == len(DEFAULT)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("model/*")} == before


def test_a_changed_config_is_refused_by_name_and_fresh_does_it_again(copy):
    refused = launch(copy, "--set", "ppo.kl_coef=0.5")
    assert refused.returncode == 2
    assert "ppo.kl_coef 0.02 -> 0.5" in refused.stderr and "--fresh" in refused.stderr
    assert "Traceback" not in refused.stderr
    again = launch(copy, "--set", "ppo.kl_coef=0.5", "--stages=ppo,evaluate", "--fresh")
    assert again.returncode == 0, again.stderr
    fingerprint = json.loads((copy / "ppo" / "fingerprint.json").read_text())
    assert fingerprint["config.ppo.kl_coef"] == 0.5


def test_an_altered_artifact_is_noticed(copy):
    shard = next((copy / "critique_revision").glob("rows-*.jsonl"))
    shard.write_text(shard.read_text().replace('"round"', '"Round"'))
    result = launch(copy)
    assert result.returncode == 2 and shard.name in result.stderr and "Traceback" not in result.stderr


def test_a_stage_without_its_input_is_refused(tmp_path):
    result = launch(tmp_path / "run", "--stages=ppo")
    assert result.returncode == 2
    assert "needs the artifacts of stage sft" in result.stderr


def test_rows_are_read_by_datasets_and_carry_their_provenance(finished):
    import datasets

    stages = {"critique_revision": "rows", "sft": "samples", "preferences": "rows", "evaluate": "rows"}
    for stage, prefix in [*stages.items(), ("preferences", "pairs")]:
        files = sorted(str(path) for path in (finished / stage).glob(f"{prefix}-*.jsonl"))
        schemas = [pyarrow.json.read_json(file).schema for file in files]
        assert len(files) > 1 and all(schema == schemas[0] for schema in schemas)
        assert "null" not in str(schemas[0])
        rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(finished / "cache"))
        assert len(rows) > 0
        assert {"constitution", "constitution_hash", "model_hash", "seed", "stage"} <= set(rows[0]["provenance"])
    shutil.rmtree(finished / "cache")
    config = json.loads((finished / "config.json").read_text())
    shard = finished / "critique_revision" / "rows-00000-of-00002.jsonl"
    for row in map(json.loads, shard.read_text().splitlines()):
        assert row["provenance"]["constitution_hash"] == config["constitution"]["hash"]
        assert [entry["round"] for entry in row["rounds"]] == [1, 2]
        assert all(entry["principle_hash"] for entry in row["rounds"])


def test_both_orders_of_a_label_are_averaged(finished):
    rows = [json.loads(line) for path in sorted((finished / "preferences").glob("rows-*")) for line in open(path)]
    assert rows
    for row in rows:
        vote, ab, ba = (np.log(p / (1 - p)) for p in (
            row["probability_a"], row["probability_a_ab"], row["probability_a_ba"]))
        assert vote == pytest.approx((ab + ba) / 2, abs=1e-6), "the mean is one of log-odds"
        assert row["consistent"] == ((row["probability_a_ab"] > 0.5) == (row["probability_a_ba"] > 0.5))


def test_training_moved_and_ppo_measured(finished):
    metrics = [json.loads(line) for line in open(finished / "ppo" / "metrics.jsonl")]
    assert [line["update"] for line in metrics] == [1, 2]
    assert abs(metrics[0]["kl"]) < 1e-3, "the first rollouts are the reference's own"
    assert metrics[0]["approx_kl"] > 1e-6, "the steps of an update move the policy off the one that sampled"
    assert metrics[1]["kl_k3"] > 100 * abs(metrics[0]["kl_k3"]) + 1e-3, "the next rollouts are the trained policy's"
    assert summary(finished, "sft")["last_loss"] < summary(finished, "sft")["first_loss"]


def test_two_runs_in_one_folder_are_refused(copy):
    shutil.rmtree(copy / "evaluate")
    first = subprocess.Popen([*COMMAND, f"--run_dir={copy}"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        while not (copy / "evaluate").exists():
            time.sleep(0.01)
            assert first.poll() is None
        second = launch(copy)
        assert second.returncode == 2 and "in use" in second.stderr
    finally:
        first.kill()
        first.communicate()


ENSEMBLE = ("--stages=reward_model,ppo", "--set=reward_model.heads=3", "--set=reward_model.margin=0.3",
            "--set=ppo.uncertainty_penalty=0.5")  # fmt: skip


def test_an_ensemble_goes_from_labels_to_ppo(copy):
    result = launch(copy, "--fresh", *ENSEMBLE)
    assert result.returncode == 0, result.stderr
    found = summary(copy, "reward_model")
    assert found["heads"] == 3 and found["held_out"]["uncertainty"] > 0 and found["verdict"] in result.stderr
    assert load_model(copy / "reward_model" / "model").params["score"].shape[1] == 3
    lines = [json.loads(line) for line in open(copy / "ppo" / "metrics.jsonl")]
    assert all(line["uncertainty"] > 0 for line in lines)


@pytest.mark.slow
def test_an_ensemble_survives_a_kill(finished, copy, tmp_path):
    killed = Path(shutil.copytree(finished, tmp_path / "killed"))
    for stage in ("reward_model", "ppo"):
        shutil.rmtree(killed / stage)
    assert launch(copy, "--fresh", *ENSEMBLE).returncode == 0
    kill_in("reward_model", killed, *ENSEMBLE)
    assert launch(killed, *ENSEMBLE).returncode == 0
    assert_same_artifacts(copy, killed)
    start = shutil.copytree(copy / "reward_model" / "model", tmp_path / "start")
    refused = launch(copy, "--fresh", "--stages=reward_model", f"--set=reward_model.start={start}")
    assert refused.returncode == 2 and "3 score head(s), not the 1" in refused.stderr, refused.stderr


def test_red_team_prompts_by_model_survive_a_kill_and_stand_in_the_report(tmp_path):
    flags = "--stages=red_team", "--set=red_team.draws=6", "--set=red_team.rows_per_shard=2", \
            "--set=red_team.request.max_new_tokens=24", "--set=red_team.response.max_new_tokens=8"  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = launch(whole, *flags)
    assert result.returncode == 0, result.stderr
    found = summary(whole, "red_team")
    assert found["lists"] == 24 and found["counters"]["lists_unparsable"] > 0, "a random model writes no list"
    assert "Red-team prompts by model" in (whole / "report.html").read_text()
    kill_in("red_team", killed, *flags)
    assert launch(killed, *flags).returncode == 0
    assert_same_artifacts(whole, killed)


def test_the_gate_stops_a_run_with_its_report_and_going_on_measures_nothing_again(copy, tmp_path):
    judge = ("--stages=judge", "--set=judge.also=rule", "--set=judge.pleas=1")
    stopped, killed, go_on = tmp_path / "stopped", tmp_path / "killed", "--set=judge.on_failure=continue"
    result = launch(stopped, *judge)
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and line.startswith("error: judge: the labels of options are right on")
    assert "--set judge.on_failure=continue" in line
    assert "the run stops before labels are spent" in (stopped / "report.html").read_text()
    again = launch(stopped, *judge, go_on)
    assert again.returncode == 0 and "judge: done before, skipped" in again.stderr
    head = (stopped / "report.html").read_text().split("What came out")[0]
    assert "the run went on because its config says so" in head
    kill_in("judge", killed, *judge)
    resumed = launch(killed, *judge, go_on)
    assert resumed.returncode == 0 and "judge: going on where it stopped" in resumed.stderr
    assert_same_artifacts(stopped, killed)
    # Labels that were made without the temperatures are other labels.
    shutil.copytree(stopped / "judge", copy / "judge")
    refused = launch(copy, "--stages=preferences", go_on)
    assert refused.returncode == 2 and "input.calibration (absent) -> " in refused.stderr
    assert "--fresh --stages=preferences" in refused.stderr
    barred = launch(copy, "--stages=preferences", "--fresh")
    assert barred.returncode == 2 and "error: judge: the labels of options are right on" in barred.stderr
