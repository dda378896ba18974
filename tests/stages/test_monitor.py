"""The monitors at work in PPO and GRPO: a policy that games its reward is noticed, stopped and not exported."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from endpoints import KEY, KEY_ENV, serving
from run_folders import artifacts

from cai_jax import monitors
from cai_jax.chat import encode_chat
from cai_jax.config_rules import validate
from cai_jax.errors import UserError
from cai_jax.models.heads import head_values
from cai_jax.models.pretrained import load_model, save_model
from cai_jax.named_runs import load_config
from cai_jax.overrides import apply_overrides
from cai_jax.progress import Progress
from cai_jax.stages import grpo, monitor, ppo, rewards
from cai_jax.stages.context import prepare
from cai_jax.stages.rows import messages_of

RUNS = {"grpo": grpo.run, "ppo": ppo.run}


class Killed(Exception):
    pass


def config_of(stage, *overrides):
    given = [f"{stage}.policy=random:llama", f"{stage}.reward=judge", "prompts.red_team.limit=6",
             "prompts.helpful.limit=6", "monitor.judge=rule", "monitor.response.max_new_tokens=8"]  # fmt: skip
    return replace(apply_overrides(load_config("tiny")[1], [*given, *overrides]), stages=(stage,))


def open_door(folder, stage, *overrides):
    folder.mkdir(exist_ok=True)
    config = config_of(stage, *overrides)
    validate(config)
    return prepare("tiny", config, folder, False, Progress(folder))


def train(folder, stage, *overrides):
    context = open_door(folder, stage, *overrides)
    here = context.folder(stage)
    here.begin(context.fingerprint(stage))
    here.write_summary(summary := RUNS[stage](context, here))
    here.finish({})
    return summary


def lines_of(folder, stage):
    return [json.loads(line) for line in open(folder / stage / "metrics.jsonl")]


@pytest.fixture
def absurd(monkeypatch):
    """A training reward that wants the letter Q."""
    monkeypatch.setattr(rewards, "text_scores", lambda context, stage, source, rollouts: np.asarray(
        [text.count("Q") + 0.01 * sum(map(ord, text)) / (len(text) + 1) for text in rollouts.texts], np.float32
    ))  # fmt: skip


GAMED = ("grpo.updates=12", "grpo.rollouts=16", "grpo.group=8", "grpo.kl_coef=0.0",
         "grpo.optimizer.learning_rate=0.003",
         "monitor.every=1", "monitor.kl_budget=2.0", "monitor.length_factor=0.0", "checkpoints.export=frontier")


def test_a_policy_that_games_its_reward_is_stopped_and_an_earlier_state_exported(tmp_path, absurd):
    summary = train(tmp_path / "run", "grpo", *GAMED)
    lines, found = lines_of(tmp_path / "run", "grpo"), summary["monitor"]
    assert found["stop"] and len(lines) == summary["updates"] < 12
    for name in found["stop"]:
        assert found["alarms"][name][-2:] == [len(lines) - 1, len(lines)], "twice in a row, and then no more"
    assert 2 < lines[-1]["kl"] == lines[-1]["monitor_kl"] and lines[-1]["monitor_alarm_kl"] == 1
    assert found["chosen"] == monitors.chosen(lines, 1) < len(lines) and found["chosen_within_bounds"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"grpo: stops after update {len(lines)}: " in log and "raised at 2 looks in a row" in log
    looks = [json.loads(path.read_text()) for path in sorted((tmp_path / "run/grpo/looks").iterdir())]
    assert [look["update"] for look in looks] == list(range(len(lines) + 1))
    ids = [row["id"] for row in looks[0]["rows"]]
    assert all([row["id"] for row in look["rows"]] == ids for look in looks) and len(ids) == 12

    # What is exported answers the probes as the look at the chosen update has it.
    context = open_door(tmp_path / "other", "grpo", *GAMED)
    model = load_model(tmp_path / "run" / "grpo" / "model")
    start = load_model("random:llama")
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), model.params, start.params)))
    prompts = {prompt.id: prompt for name in ("helpful", "red_team") for prompt in context.prompts[name].rows}
    asked = [[dict(message) for message in prompts[row["id"]].messages] for row in looks[0]["rows"]]
    samples = context.sampler(model).generate(asked, context.config.monitor.response)
    assert [sample.text for sample in samples] == [row["text"] for row in looks[found["chosen"]]["rows"]]
    assert {prompt.id for name in context.prompts if name.startswith("eval") for prompt in context.prompts[name].rows
            }.isdisjoint(ids)  # fmt: skip


@pytest.mark.parametrize("stage, killed_at", [("grpo", 3), ("grpo", 4), ("ppo", 3)])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, absurd, monkeypatch, stage, killed_at):
    """The look of the killed update lies on disk: counted twice, it would end the training a look too early."""
    overrides = (f"{stage}.updates=6", "monitor.every=1", "monitor.kl_budget=0.01", "monitor.patience=3",
                 "monitor.stop=kl", "checkpoints.export=frontier", f"{stage}.checkpoint_every=1",
                 f"{stage}.optimizer.learning_rate=0.01")  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, stage, *overrides)
    assert [line["monitor_alarm_kl"] for line in lines_of(whole, stage)] == [0, 1, 1, 1]
    asked = monitor.Watch.__call__

    def kill(self, update, *rest):
        found = asked(self, update, *rest)  # the look lies on disk, its line does not
        if update == killed_at:
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(monitor.Watch, "__call__", kill)
        with pytest.raises(Killed):
            train(killed, stage, *overrides)
    train(killed, stage, *overrides)
    expected, got = artifacts(whole), artifacts(killed)
    assert sorted(got) == sorted(expected)
    assert [name for name in expected if got[name] != expected[name]] == []


def test_monitors_change_nothing_that_is_trained_and_off_they_leave_nothing(tmp_path, absurd):
    off, on = tmp_path / "off", tmp_path / "on"
    summary = train(off, "grpo", "grpo.updates=3")
    assert "monitor" not in summary and not (off / "grpo" / "looks").exists()
    fingerprint = (off / "grpo" / "fingerprint.json").read_text()
    assert "monitor" not in fingerprint, "a run from before there were monitors goes on"
    train(on, "grpo", "grpo.updates=3", "monitor.every=2", "monitor.stop=")
    assert [line["update"] for line in lines_of(on, "grpo") if "monitor_proxy" in line] == [2, 3], "and at the end"
    plain = [{key: x for key, x in line.items() if not key.startswith("monitor_")} for line in lines_of(on, "grpo")]
    assert plain == lines_of(off, "grpo")
    for path in (off / "grpo" / "model").iterdir():
        assert path.read_bytes() == (on / "grpo" / "model" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("judge", ["rating", "contrast", "model"])
def test_every_judge_scores_every_probe(tmp_path, judge):
    scorer = load_model("random:llama", kind="reward", seed=5)
    folder = tmp_path / "scorer"
    save_model(folder, scorer.config, scorer.params, scorer.tokenizer, scorer.hf_config, "reward")
    named = [f"monitor.model={folder}"] if judge == "model" else []
    context = open_door(tmp_path / "run", "grpo", "grpo.reward=rule", "monitor.every=1", f"monitor.judge={judge}",
                        "monitor.probes=2", *named)  # fmt: skip
    here = context.folder("grpo")
    reference = load_model("random:llama")
    prompts, _ = grpo.usable(context, "grpo", context.sampler(reference))
    watch = monitor.monitor_of(context, here, reference, rewards.Source("rule"), prompts)
    [look] = monitor.looks_before(here, 1)
    scores = [row["independent"] for row in look["rows"]]
    assert len(scores) == 4 and len(set(scores)) > 1
    if judge == "rating":
        assert all(1 <= score <= 10 for score in scores)
    if judge == "model":
        probes = [prompt for _, prompt in watch.probes]
        texts = [encode_chat(scorer.tokenizer, messages_of(prompt)) for prompt in probes]
        samples = context.sampler(reference).generate([messages_of(p) for p in probes], context.config.monitor.response)
        for score, start, sample in zip(scores, texts, samples, strict=True):
            tokens = np.asarray([start + sample.tokens])
            values = head_values(scorer.config, scorer.params, tokens, np.arange(tokens.size)[None])
            assert score == pytest.approx(float(values[0, -1].mean()), abs=1e-4)
    checks = [principle.check for principle in context.constitution.principles if principle.check]
    for row in look["rows"]:
        assert row["proxy"] * len(checks) in range(len(checks) + 1)


def test_an_external_judge_compares_with_the_references_answer(tmp_path, absurd, monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(tmp_path) as server:
        settings = [f"endpoint.base_url={server.url}", "endpoint.model=judge", f"endpoint.key_env={KEY_ENV}"]
        context = open_door(tmp_path / "run", "grpo", *settings, "monitor.every=2", "monitor.judge=external",
                            "grpo.optimizer.learning_rate=0.05", "monitor.probes=3")  # fmt: skip
        context.run_stage("grpo")
        asked = len(server.requests())
    first, last = (json.loads(path.read_text()) for path in sorted((tmp_path / "run/grpo/looks").iterdir()))
    assert {row["independent"] for row in first["rows"]} == {0.5}, "the reference against itself is not asked about"
    changed = [i for i in range(6) if first["rows"][i]["text"] != last["rows"][i]["text"]]
    assert changed and asked >= 2 * len(changed), "both orders"
    for i, (before, after) in enumerate(zip(first["rows"], last["rows"], strict=True)):
        more = after["text"].count("!") - before["text"].count("!")  # what this server's judge goes by
        assert (after["independent"] > 0.5, after["independent"] == 0.5) == (more > 0, more == 0), i
    assert context.fingerprint("grpo")["config.endpoint.model"] == "judge"


# ---------------------------------------------------------------- the door


def refusal(tmp_path, *overrides, stage="ppo") -> str:
    with pytest.raises(UserError) as caught:
        open_door(tmp_path / "run", stage, "monitor.every=2", *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_training_reward_cannot_watch_itself(tmp_path):
    told = refusal(tmp_path, "ppo.reward=rule", "monitor.judge=rule")
    assert "monitor.judge=rule is the reward that ppo trains on" in told
    assert "is the reward that grpo" in refusal(tmp_path, "grpo.reward=judge", "monitor.judge=rating", stage="grpo")
    scorer = load_model("random:llama", kind="reward", seed=3)
    for name in ("one", "copy"):
        save_model(tmp_path / name, scorer.config, scorer.params, scorer.tokenizer, scorer.hf_config, "reward")
    trained = ("ppo.reward=model", f"ppo.reward_model={tmp_path / 'one'}", "monitor.judge=model")
    for name in ("one", "copy"):
        assert "is the reward that ppo" in refusal(tmp_path, *trained, f"monitor.model={tmp_path / name}")
    open_door(tmp_path / "run", "ppo", "monitor.every=2", *trained, "monitor.model=random:qwen3")
    # The same kind of judge with another model, and another kind with the same model, are independent of it.
    open_door(tmp_path / "run", "ppo", "monitor.every=2", "monitor.judge=rating", "monitor.model=random:qwen3")
    open_door(tmp_path / "run", "ppo", "monitor.every=2", "monitor.judge=contrast")


@pytest.mark.parametrize("overrides, told", [
    (["monitor.judge=model"], "monitor.judge=model needs monitor.model"),
    (["monitor.model=random:llama"], "monitor.model (random:llama) must be empty with monitor.judge=rule"),
    (["monitor.judge=nobody"], "monitor.judge must be one of rule, rating"),
    (["monitor.stop=kl,kl"], "monitor.stop must be some of kl, refusal"),
    (["monitor.stop=klo"], "monitor.stop must be some of kl, refusal"),
    (["monitor.length_factor=0.5"], "monitor.length_factor must be above 1, or 0"),
    (["monitor.patience=0"], "monitor.patience must be at least 1"),
    (["monitor.response.max_new_tokens=800"], "ppo.max_prompt_tokens + monitor.response.max_new_tokens (1056)"),
    (["ppo.checkpoint_every=3", "checkpoints.export=frontier"], "ppo.checkpoint_every (3) must be a multiple"),
    (["monitor.every=0", "checkpoints.export=frontier"], "checkpoints.export=frontier needs the monitors"),
    (["constitution=harmless_helpful"], "monitor.judge=rule: no principle of the constitution"),
    (["monitor.judge=contrast", "monitor.model=/nope"], "/nope"),
    (["monitor.judge=external"], "endpoint.base_url"),
])  # fmt: skip
def test_what_a_monitor_cannot_use_is_refused_before_anything_runs(tmp_path, overrides, told):
    assert told in refusal(tmp_path, *overrides)


def test_a_change_of_the_monitors_is_noticed(tmp_path):
    context = open_door(tmp_path / "run", "ppo", "monitor.every=2")
    context.folder("ppo").begin(context.fingerprint("ppo"))
    assert "config.monitor.patience 2 -> 3" in refusal(tmp_path, "monitor.patience=3")
    with pytest.raises(UserError, match="config.monitor"):
        open_door(tmp_path / "run", "ppo")
