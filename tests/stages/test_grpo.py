"""GRPO: groups share their prompt, no value model is there, and what beats its group becomes likelier."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from run_folders import artifacts

from cai_jax import Sampler
from cai_jax.config import Config, Grpo, Mesh, Model, Sampling
from cai_jax.mesh import make_mesh
from cai_jax.models.pretrained import load_model
from cai_jax.named_runs import load_config
from cai_jax.objectives import grpo as formulas
from cai_jax.objectives.model_losses import completion_logprobs, grpo_objective
from cai_jax.overrides import apply_overrides
from cai_jax.progress import Progress
from cai_jax.provenance import row_seed
from cai_jax.stages import grpo, rewards
from cai_jax.stages.context import prepare
from cai_jax.stages.rollouts import Prompts, sample_rollouts


@pytest.fixture(scope="module")
def policy():
    return load_model("random:llama")


def group_rollouts(policy, slots, reuse=True):
    """Two prompts, four responses to each."""
    settings = Grpo(rollouts=8, group=4, response=Sampling(max_new_tokens=6))
    context = SimpleNamespace(
        config=Config(model=Model("random:llama"), description="groups", grpo=settings),
        row_seed=lambda *parts: row_seed(0, *parts),
    )
    prompts = [SimpleNamespace(id=n, messages=[{"role": "user", "content": n * 60}]) for n in "ab"]
    sampler = Sampler(policy, max_length=192, rows=slots, reuse=reuse)
    return sample_rollouts(context, "grpo", sampler, Prompts(prompts, 128), "update-0", 4), sampler.counts


def test_a_group_runs_its_prompt_once_where_slots_are_few(policy):
    (few, shared), (many, _), (none, apart) = (
        group_rollouts(policy, 2), group_rollouts(policy, 8), group_rollouts(policy, 2, reuse=False)
    )  # fmt: skip
    for other in (many, none):
        for name, array in few.arrays.items():
            atol = 1e-5 if name == "old_logprobs" else 0  # with other slots it is another program
            np.testing.assert_allclose(array, other.arrays[name], rtol=0, atol=atol, err_msg=name)
    assert [prompt.id for prompt in few.prompts] in (list("aaaabbbb"), list("bbbbaaaa"))
    assert len({tuple(row) for row in few.arrays["tokens"].tolist()}) == 8, "each response has a key of its own"
    assert shared.prefilled < 0.4 * apart.prefilled


def test_a_step_makes_what_beats_its_group_likelier(policy):
    rolled, _ = group_rollouts(policy, 8)
    arrays = {name: rolled.arrays[name] for name in ("tokens", "positions", "mask", "old_logprobs")}
    scores = np.random.default_rng(0).normal(size=8).astype(np.float32)
    advantages = np.asarray(formulas.advantages(scores, np.ones(8, bool), 4))
    batch = arrays | {"ref_logprobs": arrays["old_logprobs"], "advantages": advantages}
    objective = grpo_objective(policy.config, temperature=1.0, clip=0.2, kl_coef=0.04)
    loss, rows, sums = objective({"policy": policy.params}, batch)
    assert rows == 8 and abs(float(loss)) < 1e-4, "at the start ratios are 1 and advantages of a group add up to 0"
    assert float(sums["kl_loss"]) < 1e-6
    gradient = jax.jit(jax.grad(lambda params: objective({"policy": params}, batch)[0]))(policy.params)
    moved = jax.tree.map(lambda leaf, grad: leaf - 1e-3 * grad, policy.params, gradient)
    after, _ = completion_logprobs(policy.config, moved, *(arrays[name] for name in ("tokens", "positions", "mask")))
    gain_B = ((np.asarray(after) - arrays["old_logprobs"]) * arrays["mask"]).sum(axis=1) / arrays["mask"].sum(axis=1)
    assert (gain_B * advantages).sum() > 1e-4


def test_the_objective_is_the_loss_of_the_arrays(policy):
    rolled, _ = group_rollouts(policy, 8)
    arrays = {name: rolled.arrays[name] for name in ("tokens", "positions", "mask", "old_logprobs")}
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.3, (2, *arrays["mask"].shape)).astype(np.float32)
    batch = arrays | {
        "old_logprobs": arrays["old_logprobs"] + noise[0], "ref_logprobs": arrays["old_logprobs"] + noise[1],
        "advantages": rng.normal(size=8).astype(np.float32),
    }  # fmt: skip
    now, _ = completion_logprobs(policy.config, policy.params, *(arrays[n] for n in ("tokens", "positions", "mask")))
    for length_norm in ("response", "limit"):
        objective = grpo_objective(policy.config, temperature=1.0, clip=0.2, kl_coef=0.3, length_norm=length_norm)
        loss, rows, _ = objective({"policy": policy.params}, batch)
        recorded = (batch[name] for name in ("old_logprobs", "ref_logprobs", "advantages", "mask"))
        want, _ = formulas.loss(now, *recorded, 0.2, 0.3, length_norm)
        assert float(loss / rows) == pytest.approx(float(want), rel=1e-4)


def run_grpo(folder, *overrides, monitor=None):
    folder.mkdir(exist_ok=True)
    # Rules that the random model's texts keep or break by turns: another principle would change which are drawn.
    rules = "principles=brief,closing_words,opening_words,no_digits,no_exclamation,no_lists"
    asked = ["grpo.policy=random:llama", "grpo.reward=rule", "grpo.updates=3", rules, *overrides]
    config = replace(apply_overrides(load_config("tiny")[1], asked), stages=("grpo",))
    context = prepare("tiny", config, folder, False, Progress(folder))
    stage = context.folder("grpo")
    stage.begin(context.fingerprint("grpo"))
    stage.write_summary(summary := grpo.run(context, stage, monitor))
    stage.finish({})
    return summary


class Killed(Exception):
    pass


@pytest.mark.parametrize("overrides", [(), ("lora.rank=2",), ("grpo.epochs=2", "grpo.minibatches=2")])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, overrides):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    summary = run_grpo(whole, *overrides)
    assert summary["updates"] == 3 and summary["rollouts"] == 12 and summary["stopped"] == ""
    metrics = [json.loads(line) for line in open(whole / "grpo" / "metrics.jsonl")]
    assert abs(metrics[0]["kl"]) < 1e-3 and metrics[-1]["kl_k3"] > 1e-6
    assert {metrics[0]["score"] * 4, metrics[1]["score"] * 4} <= {0, 1, 2, 3, 4}, "a drawn rule holds or does not"

    def kill(update, *_):
        if update == 3:
            raise Killed
        return {}, False

    with pytest.raises(Killed):
        run_grpo(killed, *overrides, monitor=kill)
    run_grpo(killed, *overrides)
    expected, got = artifacts(whole), artifacts(killed)
    assert sorted(got) == sorted(expected)
    assert [name for name in expected if got[name] != expected[name]] == []
    assert load_model(whole / "grpo" / "model").kind == "policy"


def test_a_monitor_is_asked_once_an_update_and_its_stop_survives_a_kill(tmp_path, monkeypatch):
    asked = []

    def monitor(update, policy_sampler, rollouts, report):
        [sample] = policy_sampler().generate([rollouts.prompts[0].messages], Sampling(max_new_tokens=3))
        asked.append((update, len(rollouts.texts), len(sample.tokens), report["score"]))
        return {"watched": float(update)}, update == 2

    summary = run_grpo(tmp_path / "run", "grpo.updates=5", monitor=monitor)
    assert [(update, texts) for update, texts, *_ in asked] == [(1, 4), (2, 4)]
    assert summary["stopped"] == "the monitor asked to stop after update 2 of 5" and summary["updates"] == 2
    metrics = [json.loads(line) for line in open(tmp_path / "run" / "grpo" / "metrics.jsonl")]
    assert [line["watched"] for line in metrics] == [1, 2]
    assert (tmp_path / "run" / "grpo" / "model").is_dir()

    # Killed after the state of the last update was saved and before the model was: the stop still holds.
    def killed(*_):
        raise Killed

    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr("cai_jax.stages.context.Context.export", killed)
        with pytest.raises(Killed):
            run_grpo(tmp_path / "again", "grpo.updates=5", monitor=monitor)
    assert run_grpo(tmp_path / "again", "grpo.updates=5", monitor=killed) == summary


def test_a_reward_model_scores_groups(policy, tmp_path):
    reward = load_model("random:llama", kind="reward", seed=3)
    settings = Grpo(rollouts=8, group=4, response=Sampling(max_new_tokens=6), missing_eos_penalty=0.0)
    config = Config(model=Model("random:llama"), description="groups", grpo=settings)
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    context = SimpleNamespace(config=config, mesh=mesh, put_rows=lambda batch: batch)
    rolled, _ = group_rollouts(policy, 8)
    source = rewards.Source("model", reward)
    batch, report = grpo.score_rollouts(context, grpo.Frozen(policy, source, Prompts([], 128)), rolled)
    *_, scores = rewards.measure(context, "grpo", policy, source, rolled)
    for start in (0, 4):
        part = scores[start : start + 4]
        want = (part - part.mean()) / (part.std(ddof=1) + 1e-4)
        np.testing.assert_allclose(batch["advantages"][start : start + 4], want, atol=1e-3)
    assert report["score"] == pytest.approx(scores.mean(), rel=1e-4)
    np.testing.assert_allclose(batch["ref_logprobs"], batch["old_logprobs"], atol=1e-3)
