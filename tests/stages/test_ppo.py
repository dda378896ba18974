"""The arrays of PPO on a tiny model: the bias of the reward model stands in no advantage, and the policy learns."""

import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cai_jax import Sampler
from cai_jax.config import Config, Mesh, Model, Ppo, Sampling
from cai_jax.errors import UserError
from cai_jax.mesh import make_mesh
from cai_jax.models import transformer
from cai_jax.models.pretrained import fresh_head, load_model
from cai_jax.named_runs import load_config
from cai_jax.objectives import ppo as formulas
from cai_jax.objectives.model_losses import completion_logprobs, completion_values, ppo_objective
from cai_jax.objectives.ppo import no_scores, with_scores
from cai_jax.overrides import apply_overrides
from cai_jax.progress import Progress
from cai_jax.provenance import row_seed
from cai_jax.stages import ppo
from cai_jax.stages.context import prepare
from cai_jax.stages.ppo import Frozen, _reward_bias, score_rollouts
from cai_jax.stages.rewards import Source, _score, lower_score, measure
from cai_jax.stages.rollouts import Prompts, Rollouts, sample_rollouts
from cai_jax.stages.scoring import lower_rewards
from cai_jax.stages.updates import take_steps

PROMPT, ROOM, ROWS = 8, 6, 4


@pytest.fixture(scope="module")
def frozen():
    reward = load_model("random:llama", kind="reward", seed=3)
    return Frozen(load_model("random:llama"), Source("model", reward), Prompts([], PROMPT), reward.config)


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


def scored(frozen, rollouts, bias, moments=None, **settings):
    settings = Ppo(**{"rollouts": ROWS, "minibatches": 2, "whiten_advantages": False, "kl_coef": 0.0} | settings)
    config = Config(model=Model("random:llama"), description="one update", ppo=settings)
    context = SimpleNamespace(config=config, mesh=one_device(), put_rows=lambda batch: batch)
    params = {"policy": frozen.reference.params, "value": frozen.source.model.params}
    asked = Rollouts("update-0", [], [], rollouts)
    return score_rollouts(context, frozen, params, asked, bias, settings.kl_coef, moments or no_scores())


def test_the_bias_of_the_reward_model_stands_in_no_advantage(frozen, rollouts):
    """Values that keep the bias while scores lose it would carry -bias * lam^(T-t) into every advantage."""
    plain, *_ = scored(frozen, rollouts, 0.0)
    shifted, report, _ = scored(frozen, rollouts, 7.0)
    np.testing.assert_allclose(shifted["advantages"], plain["advantages"], atol=1e-4)
    np.testing.assert_allclose(shifted["old_values"], plain["old_values"] - 7, atol=1e-5)
    assert abs(float(report["value_mean"]) - float(report["score"])) < 3  # 7 apart, were only one of them shifted


def test_the_value_loss_is_of_the_value_without_the_bias(frozen, rollouts):
    batch, *_ = scored(frozen, rollouts, 7.0)
    objective = ppo_objective(
        frozen.reference.config, frozen.value_config, temperature=1.0, clip=0.2, value_clip=0.2, value_coef=0.1,
        value_offset=7.0,
    )  # fmt: skip
    _, count, sums = objective({"policy": frozen.reference.params, "value": frozen.source.model.params}, batch)
    raw = completion_values(
        frozen.value_config, frozen.source.model.params, batch["tokens"], batch["positions"], batch["mask"]
    )
    errors = np.square(np.asarray(raw) - 7 - batch["returns"])[batch["mask"] > 0]
    assert float(sums["value_clip_fraction"]) == 0, "nothing has moved yet, so nothing is clipped"
    assert float(sums["value_loss"]) / float(count) == pytest.approx(errors.mean() / 2, rel=1e-4)


def test_disagreement_of_an_ensemble_is_taken_off_the_score(frozen, rollouts):
    ensemble = replace(frozen, source=Source("model", load_model("random:llama", kind="reward", seed=3, heads=3)))
    (_, free, _), (_, paid, _) = (scored(ensemble, rollouts, 0.0, uncertainty_penalty=p) for p in (0.0, 2.0))
    assert float(free["uncertainty"]) > 0.1
    assert float(free["score"]) - float(paid["score"]) == pytest.approx(2 * float(free["uncertainty"]), rel=1e-4)
    (_, alone, _), (_, plain, _) = (scored(frozen, rollouts, 0.0, uncertainty_penalty=p) for p in (2.0, 0.0))
    assert float(alone["uncertainty"]) == 0 and float(alone["score"]) == float(plain["score"])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_makes_what_has_advantage_likelier(frozen, rollouts, sign):
    batch, *_ = scored(frozen, rollouts, 0.0)
    config, params = frozen.reference.config, frozen.reference.params
    rng = np.random.default_rng(1)
    batch = batch | {"advantages": (sign * rng.normal(size=batch["mask"].shape) * batch["mask"]).astype(np.float32)}
    objective = ppo_objective(
        config, frozen.value_config, temperature=1.0, clip=0.2, value_clip=0.2, value_coef=0.0
    )
    both = {"policy": params, "value": frozen.source.model.params}
    grads = jax.jit(jax.grad(lambda both: objective(both, batch)[0]))(both)["policy"]
    moved = jax.tree.map(lambda leaf, grad: leaf - 1e-3 * grad, params, grads)
    after, _ = completion_logprobs(config, moved, batch["tokens"], batch["positions"], batch["mask"])
    gain = ((np.asarray(after) - batch["old_logprobs"]) * batch["advantages"])[batch["mask"] > 0].sum()
    assert gain > 1e-4


@pytest.mark.parametrize("content", ["[]", "{}", '{"score_mean": null}', '{"score_mean": "1"}', "7"])
def test_an_altered_reference_is_one_line_to_the_user(tmp_path, content):
    (tmp_path / "reference.json").write_text(content)
    with pytest.raises(UserError, match="reference.json.*--fresh") as refused:
        _reward_bias(None, SimpleNamespace(path=tmp_path), None, None, None)
    assert "\n" not in str(refused.value)


def test_the_recorded_reference_is_taken_as_it_is(tmp_path):
    (tmp_path / "reference.json").write_text('{"score_mean": -1.5, "samples": 4}')
    assert _reward_bias(None, SimpleNamespace(path=tmp_path), None, None, None) == -1.5


def test_more_rollouts_than_slots_are_the_same_rollouts(frozen):
    settings = Ppo(rollouts=6, response=Sampling(max_new_tokens=ROOM))
    context = SimpleNamespace(
        config=Config(model=Model("random:llama"), description="rollouts", ppo=settings),
        row_seed=lambda *parts: row_seed(0, *parts),
    )
    prompts = [SimpleNamespace(id=n, messages=[{"role": "user", "content": n * 3}]) for n in "abcd"]
    asked = Prompts(prompts, 64)
    wide, narrow = (
        sample_rollouts(context, "ppo", Sampler(frozen.reference, max_length=128, rows=rows), asked, "update-0").arrays
        for rows in (6, 2)
    )
    assert wide["mask"].shape == (6, ROOM)
    for name, array in wide.items():
        np.testing.assert_array_equal(array, narrow[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_smaller_frozen_models_stay_close(frozen, rollouts, dtype):
    reward = load_model("random:llama", dtype, "reward", seed=3)
    small = replace(frozen, reference=load_model("random:llama", dtype), source=Source("model", reward))
    part = {name: rollouts[name] for name in ("tokens", "positions", "mask")}
    (ref, _, scores), (small_ref, _, small_scores) = (
        _score(f.reference.config, f.value_config, f.source.model.config, one_device(), f.reference.params,
               frozen.source.model.params, f.source.model.params, part, 1.0, "float32", "auto")
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
    reward = frozen.source.model
    models = frozen.reference.params, reward.params, reward.params
    part = {name: rollouts[name] for name in ("tokens", "positions", "mask")}
    config = Config(Model("random:llama", attention="cudnn"), "as asked")
    lower_score(config, "ppo", frozen.reference.config, reward.config, reward.config, one_device(), *models, part)
    tokens, positions = part["tokens"], part["positions"]
    lower_rewards(config, reward.config, one_device(), reward.params, tokens, positions)
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


# choices of PPO


def test_normalised_scores_make_advantages_that_do_not_know_the_unit_of_the_reward(frozen, rollouts):
    """A reward model in other units, and the value model with it: same advantages, returns in those units."""
    settings = {"normalise_scores": True, "kl_coef": 0.1, "missing_eos_penalty": 0.0}
    plain, report, moments = scored(frozen, rollouts, 0.0, **settings)
    reward = frozen.source.model
    tenfold = replace(reward, params=reward.params | {"score": 10 * reward.params["score"]})
    ten, _, ten_moments = scored(replace(frozen, source=Source("model", tenfold)), rollouts, 0.0, **settings)
    np.testing.assert_allclose(ten["advantages"], plain["advantages"], atol=1e-4)
    np.testing.assert_allclose(ten["old_values"], 10 * plain["old_values"], rtol=1e-4)
    np.testing.assert_allclose(ten["returns"], 10 * plain["returns"], rtol=1e-3, atol=1e-3)
    assert ten_moments.scale() == pytest.approx(10 * moments.scale(), rel=1e-4)
    unscaled, _, untouched = scored(frozen, rollouts, 0.0, kl_coef=0.1, missing_eos_penalty=0.0)
    assert float(untouched.count) == 0 and report["score_scale"] == pytest.approx(moments.scale())
    assert np.abs(unscaled["advantages"] - plain["advantages"]).max() > 0.1


def test_normalised_arrays_are_those_of_normalised_scores_and_values(frozen, rollouts):
    """Against arrays of scores and values that were normalised by hand, with the scores of earlier updates."""
    earlier = with_scores(no_scores(), [1.0, -2.0, 4.0])
    batch, _, moments = scored(frozen, rollouts, 0.5, earlier, normalise_scores=True)
    asked = Rollouts("update-0", [], [], rollouts)
    config = Config(Model("random:llama"), "by hand", ppo=Ppo(rollouts=ROWS, minibatches=2))
    context = SimpleNamespace(config=config, mesh=one_device(), put_rows=lambda batch: batch)
    value = frozen.value_config, frozen.source.model.params
    _, values, _, scores = measure(context, "ppo", frozen.reference, frozen.source, asked, value)
    whole = np.concatenate([[1.0, -2.0, 4.0], scores - 0.5])
    assert float(moments.mean) == pytest.approx(whole.mean(), rel=1e-5)
    mean, deviation, mask = whole.mean(), whole.std(), rollouts["mask"]
    rewards_BN = formulas.rewards((scores - 0.5 - mean) / deviation, np.zeros(mask.shape), mask, 0.0)
    advantages, returns = formulas.advantages(rewards_BN, (values - 0.5 - mean) / deviation, mask, 1.0, 0.95)
    np.testing.assert_allclose(batch["advantages"], advantages, atol=1e-4)
    np.testing.assert_allclose(batch["returns"], (returns * deviation + mean) * mask, atol=1e-4)


def test_scores_are_clipped_before_the_penalty_for_a_missing_end(frozen, rollouts):
    cut = rollouts | {"truncated": np.array([True, False, False, False])}
    exact = {"lam": 1.0, "missing_eos_penalty": 3.0}
    free, *_ = scored(frozen, cut, 0.0, **exact)
    clipped, report, _ = scored(frozen, cut, 0.0, score_clip=0.05, **exact)
    last = rollouts["mask"].sum(axis=1) - 1
    got, plain = (batch["returns"][np.arange(ROWS), last] for batch in (clipped, free))
    penalty = 3.0 * cut["truncated"]
    np.testing.assert_allclose(got, np.clip(plain + penalty, -0.05, 0.05) - penalty, atol=1e-5)
    assert report["score"] == pytest.approx(np.mean(plain + penalty), abs=1e-5), "what is shown is not clipped"


def test_a_kl_of_the_sequence_is_charged_at_its_end(frozen, rollouts):
    moved = rollouts | {"old_logprobs": rollouts["old_logprobs"] + 0.3 * rollouts["mask"]}
    exact = {"lam": 1.0, "kl_coef": 0.5}
    token, token_report, _ = scored(frozen, moved, 0.0, **exact)
    sequence, report, _ = scored(frozen, moved, 0.0, kl_per="sequence", **exact)
    np.testing.assert_allclose(sequence["returns"][:, 0], token["returns"][:, 0], atol=1e-4)
    assert report["reward"] == pytest.approx(float(token_report["reward"]), abs=1e-4)
    later = (rollouts["mask"][:, 1:] > 0)
    # The second token and those after it no longer owe what was charged before them; at the end they owe it all.
    owed = 0.5 * 0.3 * np.arange(1, ROOM)
    np.testing.assert_allclose((token["returns"] - sequence["returns"])[:, 1:][later], (owed * later)[later], atol=1e-3)


def test_an_update_ends_once_it_has_moved_too_far():
    kls = [0.0, 0.02, 0.2, 0.3]
    config = Config(Model("random:llama"), "steps")
    context = SimpleNamespace(config=config, mesh=one_device(), put_rows=lambda batch: batch)

    def steps(bound):
        left = iter(kls)

        def step(state, batch):
            return state + 1, {"approx_kl": np.float32(next(left)), "loss": 0.0, "weight": 1.0}

        settings = Ppo(rollouts=4, epochs=2, minibatches=2, max_update_kl=bound)
        return take_steps(context, settings, step, 0, {"row": np.arange(4)}, 0)

    assert steps(0.0) == (4, {"approx_kl": pytest.approx(0.13), "steps": 4})
    assert steps(0.1) == (3, {"approx_kl": pytest.approx(0.22 / 3), "steps": 3}), "the step that shows it is taken"
    assert steps(0.01) == (2, {"approx_kl": pytest.approx(0.01), "steps": 2})


def shared_params(frozen):
    policy = frozen.reference
    return {"policy": policy.params | {"score": fresh_head(policy.config, 0)}}


def test_a_shared_trunk_computes_what_two_passes_compute(frozen, rollouts):
    batch, *_ = scored(frozen, rollouts, 0.0)
    params, config = shared_params(frozen), frozen.reference.config
    settings = dict(temperature=1.0, clip=0.2, value_clip=0.2, value_coef=0.5)
    shared = ppo_objective(config, None, **settings)(params, batch)
    apart = ppo_objective(config, config, **settings)(params | {"value": params["policy"]}, batch)
    for one, other in zip(jax.tree.leaves(shared), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_both_losses_move_a_shared_trunk(frozen, rollouts):
    batch, *_ = scored(frozen, rollouts, 0.0)
    params, config = shared_params(frozen), frozen.reference.config

    def gradient(value_coef, advantages):
        objective = ppo_objective(config, None, temperature=1.0, clip=0.2, value_clip=0.2, value_coef=value_coef)
        found = jax.jit(jax.grad(lambda params: objective(params, batch | {"advantages": advantages})[0]))(params)
        leaves = {**found["policy"]["layers"], "score": found["policy"]["score"]}
        return {name: float(np.abs(leaves[name]).max()) for name in ("q", "down", "score")}

    none = np.zeros_like(batch["advantages"])
    by_value, by_policy = gradient(0.5, none), gradient(0.0, batch["advantages"])
    assert min(by_value.values()) > 1e-4, "the value loss reaches head and trunk"
    assert by_policy["score"] == 0 and min(by_policy["q"], by_policy["down"]) > 1e-4
    assert gradient(1.0, none)["q"] == pytest.approx(2 * by_value["q"], rel=1e-3), "as much as its coefficient says"


def run_ppo(folder, *overrides, monitor=None):
    folder.mkdir(exist_ok=True)
    asked = ["ppo.policy=random:llama", "ppo.reward_model=random:llama", *overrides]
    config = replace(apply_overrides(load_config("tiny")[1], asked), stages=("ppo",))
    context = prepare("tiny", config, folder, False, Progress(folder))
    stage = context.folder("ppo")
    stage.begin(context.fingerprint("ppo"))
    summary = ppo.run(context, stage, monitor)
    stage.write_summary(summary)
    stage.finish({})
    return summary


@pytest.mark.parametrize("overrides", [
    ("ppo.value_trunk=shared",), ("ppo.value_trunk=shared", "lora.rank=2"), ("ppo.reward=rule", "lora.rank=2"),
    ("ppo.reward=rule", "ppo.frozen_dtype=int8", "ppo.max_update_kl=1e-6"),
])  # fmt: skip
def test_every_value_model_trains_and_leaves_a_plain_policy(tmp_path, monkeypatch, overrides):
    sizes, start_training = [], ppo.start_training

    def watched(*args):
        state, step = start_training(*args)
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        return state, step

    monkeypatch.setattr(ppo, "start_training", watched)
    summary = run_ppo(tmp_path / "run", *overrides)
    exported = load_model(tmp_path / "run" / "ppo" / "model")
    assert exported.kind == "policy" and "score" not in exported.params
    assert summary["last"]["kl_k3"] > 1e-6 and np.isfinite(list(summary["last"].values())).all()
    start = load_model("random:llama").params
    assert np.abs(exported.params["layers"]["q"] - start["layers"]["q"]).max() > 1e-5
    if overrides == ("ppo.value_trunk=shared",):
        assert sizes[0] < 1.01 * 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(start)), "one model and its moments"
    if "ppo.max_update_kl=1e-6" in overrides:
        assert summary["counters"]["updates_ended_early"] == 2 and summary["last"]["steps"] == 2


def test_a_monitor_stops_ppo_after_its_update(tmp_path):
    summary = run_ppo(tmp_path / "run", "ppo.updates=4", monitor=lambda update, *_: ({"drift": 0.5}, update == 1))
    assert summary["updates"] == 1 and summary["last"]["drift"] == 0.5
    assert summary["stopped"] == "the monitor asked to stop after update 1 of 4"
    assert (tmp_path / "run" / "ppo" / "model").is_dir()


def test_an_adaptive_coefficient_moves_towards_its_target(tmp_path):
    flags = ["ppo.kl_target=0.001", "ppo.kl_horizon=10", "ppo.kl_coef=0.1", "ppo.updates=3"]
    run_ppo(tmp_path / "run", *flags)
    lines = [json.loads(line) for line in open(tmp_path / "run" / "ppo" / "metrics.jsonl")]
    coefficient = 0.1
    for line in lines:
        assert line["kl_coef"] == pytest.approx(coefficient, rel=1e-5)
        coefficient = formulas.next_kl_coef(coefficient, line["kl"], 0.001, 10, 4)
    assert lines[2]["kl_coef"] > lines[1]["kl_coef"], "a policy that has gone further than it should pays more"
