"""The arrays of PPO on a tiny model: the bias of the reward model stands in no advantage, and the policy learns."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cai_jax import Sampler
from cai_jax.config import Config, Mesh, Model, Ppo, Sampling, apply_overrides
from cai_jax.errors import UserError
from cai_jax.mesh import make_mesh
from cai_jax.models import transformer
from cai_jax.models.pretrained import load_model
from cai_jax.named_runs import load_config
from cai_jax.objectives.model_losses import completion_logprobs, completion_values, ppo_objective
from cai_jax.progress import Progress
from cai_jax.provenance import row_seed
from cai_jax.stages import ppo
from cai_jax.stages.context import prepare
from cai_jax.stages.ppo import Frozen, _reward_bias, _score, lower_score, sample_rollouts, score_rollouts
from cai_jax.stages.scoring import lower_rewards

PROMPT, ROOM, ROWS = 8, 6, 4


@pytest.fixture(scope="module")
def frozen():
    return Frozen(load_model("random:llama"), load_model("random:llama", kind="reward", seed=3), [], PROMPT)


@pytest.fixture(scope="module")
def rollouts(frozen):
    rng = np.random.default_rng(0)
    mask = (np.arange(ROOM) < np.asarray([[6], [3], [5], [6]])).astype(np.int32)
    positions = np.tile(np.arange(PROMPT + ROOM, dtype=np.int32), (ROWS, 1))
    positions[:, PROMPT:] = np.where(mask, positions[:, PROMPT:], -1)
    tokens = rng.integers(3, 200, positions.shape).astype(np.int32)
    logprobs, _ = completion_logprobs(frozen.reference.config, frozen.reference.params, tokens, positions, mask)
    return {
        "tokens": tokens, "positions": positions, "mask": mask, "old_logprobs": np.asarray(logprobs),
        "truncated": np.zeros(ROWS, bool),
    }  # fmt: skip


def one_device():
    return make_mesh(Mesh(), jax.devices()[:1])


def scored(frozen, rollouts, bias):
    settings = Ppo(rollouts=ROWS, minibatches=2, whiten_advantages=False, kl_coef=0.0)
    config = Config(model=Model("random:llama"), description="one update", ppo=settings)
    context = SimpleNamespace(config=config, mesh=one_device(), put_rows=lambda batch: batch)
    return score_rollouts(context, frozen, frozen.reward.params, rollouts, bias)


def test_the_bias_of_the_reward_model_stands_in_no_advantage(frozen, rollouts):
    """Values that keep the bias while scores lose it would carry -bias * lam^(T-t) into every advantage."""
    plain, _ = scored(frozen, rollouts, 0.0)
    shifted, report = scored(frozen, rollouts, 7.0)
    np.testing.assert_allclose(shifted["advantages"], plain["advantages"], atol=1e-4)
    np.testing.assert_allclose(shifted["old_values"], plain["old_values"] - 7, atol=1e-5)
    assert abs(float(report["value_mean"]) - float(report["score"])) < 3  # 7 apart, were only one of them shifted


def test_the_value_loss_is_of_the_value_without_the_bias(frozen, rollouts):
    batch, _ = scored(frozen, rollouts, 7.0)
    objective = ppo_objective(
        frozen.reference.config, frozen.reward.config, temperature=1.0, clip=0.2, value_clip=0.2, value_coef=0.1,
        value_offset=7.0,
    )  # fmt: skip
    _, count, sums = objective({"policy": frozen.reference.params, "value": frozen.reward.params}, batch)
    raw = completion_values(
        frozen.reward.config, frozen.reward.params, batch["tokens"], batch["positions"], batch["mask"]
    )
    errors = np.square(np.asarray(raw) - 7 - batch["returns"])[batch["mask"] > 0]
    assert float(sums["value_clip_fraction"]) == 0, "nothing has moved yet, so nothing is clipped"
    assert float(sums["value_loss"]) / float(count) == pytest.approx(errors.mean() / 2, rel=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_makes_what_has_advantage_likelier(frozen, rollouts, sign):
    batch, _ = scored(frozen, rollouts, 0.0)
    config, params = frozen.reference.config, frozen.reference.params
    rng = np.random.default_rng(1)
    batch = batch | {"advantages": (sign * rng.normal(size=batch["mask"].shape) * batch["mask"]).astype(np.float32)}
    objective = ppo_objective(
        config, frozen.reward.config, temperature=1.0, clip=0.2, value_clip=0.2, value_coef=0.0
    )
    both = {"policy": params, "value": frozen.reward.params}
    grads = jax.jit(jax.grad(lambda both: objective(both, batch)[0]))(both)["policy"]
    moved = jax.tree.map(lambda leaf, grad: leaf - 1e-3 * grad, params, grads)
    after, _ = completion_logprobs(config, moved, batch["tokens"], batch["positions"], batch["mask"])
    gain = ((np.asarray(after) - batch["old_logprobs"]) * batch["advantages"])[batch["mask"] > 0].sum()
    assert gain > 1e-4


@pytest.mark.parametrize("content", ["[]", "{}", '{"score_mean": null}', '{"score_mean": "1"}', "7"])
def test_an_altered_reference_is_one_line_to_the_user(tmp_path, content):
    (tmp_path / "reference.json").write_text(content)
    with pytest.raises(UserError, match="reference.json.*--fresh") as refused:
        _reward_bias(None, SimpleNamespace(path=tmp_path), None, None)
    assert "\n" not in str(refused.value)


def test_the_recorded_reference_is_taken_as_it_is(tmp_path):
    (tmp_path / "reference.json").write_text('{"score_mean": -1.5, "samples": 4}')
    assert _reward_bias(None, SimpleNamespace(path=tmp_path), None, None) == -1.5


def test_more_rollouts_than_slots_are_the_same_rollouts(frozen):
    settings = Ppo(rollouts=6, response=Sampling(max_new_tokens=ROOM))
    context = SimpleNamespace(
        config=Config(model=Model("random:llama"), description="rollouts", ppo=settings),
        row_seed=lambda *parts: row_seed(0, *parts),
    )
    prompts = [SimpleNamespace(id=n, messages=[{"role": "user", "content": n * 3}]) for n in "abcd"]
    asked = replace(frozen, prompts=prompts, prompt_length=64)
    wide, narrow = (
        sample_rollouts(context, Sampler(frozen.reference, max_length=128, rows=rows), asked, "update-0")
        for rows in (6, 2)
    )
    assert wide["mask"].shape == (6, ROOM)
    for name, array in wide.items():
        np.testing.assert_array_equal(array, narrow[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_smaller_frozen_models_stay_close(frozen, rollouts, dtype):
    small = Frozen(load_model("random:llama", dtype), load_model("random:llama", dtype, "reward", seed=3), [], PROMPT)
    part = {name: rollouts[name] for name in ("tokens", "positions", "mask")}
    (ref, _, scores), (small_ref, _, small_scores) = (
        _score(f.reference.config, f.reward.config, one_device(), f.reference.params, frozen.reward.params,
               f.reward.params, part, 1.0, "float32", "auto")
        for f in (frozen, small)
    )  # fmt: skip
    error = np.abs(ref - small_ref)[rollouts["mask"] > 0]
    assert 0 < error.mean() < 0.02, "nats a token, which is what enters the KL"
    assert 0 < np.abs(scores - small_scores).max() < 0.05 * np.std(scores) + 0.05


def test_scoring_attends_as_the_config_says(frozen, rollouts, monkeypatch):
    asked, choose = [], transformer.choose_backend

    def note(wanted, *rest):
        assert not jax.sharding.get_abstract_mesh().empty, "on several chips a kernel has to know how rows are split"
        asked.append(wanted)
        return choose("xla", *rest)

    monkeypatch.setattr(transformer, "choose_backend", note)
    models = frozen.reference.params, frozen.reward.params, frozen.reward.params
    part = {name: rollouts[name] for name in ("tokens", "positions", "mask")}
    config = Config(Model("random:llama", attention="cudnn"), "as asked")
    lower_score(config, frozen.reference.config, frozen.reward.config, one_device(), *models, part)
    tokens, positions = part["tokens"], part["positions"]
    lower_rewards(config, frozen.reward.config, one_device(), frozen.reward.params, tokens, positions)
    assert asked == ["cudnn"] * 4, "reference, values and scores of rollouts; scores of texts"


def live_bytes():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("override", ["lora.rank=0", "lora.rank=4", "ppo.frozen_dtype=int8"])
def test_while_it_trains_only_states_and_frozen_models_are_held(tmp_path, monkeypatch, override):
    """No sampler, no cache, no second copy of anything: with adapters, policy and reference are one model."""
    overrides = ["ppo.policy=random:llama", "ppo.reward_model=random:llama", "ppo.updates=1", override]
    config = replace(apply_overrides(load_config("tiny")[1], overrides), stages=("ppo",))
    context = prepare("tiny", config, tmp_path, False, Progress(tmp_path))
    before, during, expected = live_bytes(), [], []
    start_training = ppo.start_training

    def watched(*args):
        state, step = start_training(*args)

        def watched_step(state, batch):
            during.append(live_bytes())
            return step(state, batch)

        sizes = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for name, tree in
                 {"state": state, "base": context.base.params, "kept": args[-1]}.items()}  # fmt: skip
        expected.append(sizes)
        return state, watched_step

    monkeypatch.setattr(ppo, "start_training", watched)
    ppo.run(context, context.folder("ppo"))
    [sizes], slack = expected, 40_000
    # Two frozen models; the one with adapters is what stands under them.
    frozen = {"lora.rank=0": 2 * sizes["base"], "lora.rank=4": sizes["kept"]}.get(override, 0.65 * sizes["base"])
    assert slack < sizes["base"] / 8 and len(during) == 4
    assert max(during) - before < sizes["state"] + frozen + slack
