"""Faults found in other PPO code, a test for each; and every fault put back, to see its test fail.

    python -m pytest -n 0 tests/stages/test_ppo_faults.py -m "slow or not slow" -v

shows both: `test_...` pass as the code is, and `test_the_fault_put_back_is_noticed[fault]` patches the fault in and
requires that its test fails. PUT_BACK is the list: fault, the test that guards against it, the patch.
"""

import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_folders import artifacts

from cai_jax.models import pretrained
from cai_jax.models.pretrained import load_model, save_model
from cai_jax.named_runs import load_config
from cai_jax.objectives import model_losses
from cai_jax.objectives import ppo as formulas
from cai_jax.objectives.model_losses import ppo_objective
from cai_jax.overrides import apply_overrides
from cai_jax.progress import Progress
from cai_jax.stages import ppo, rewards, rollouts, updates
from cai_jax.stages.context import Context, prepare
from cai_jax.stages.rollouts import Rollouts, sample_rollouts
from cai_jax.training.checkpoint import Checkpoints
from cai_jax.training.step import start_training

OVERRIDES = [
    "ppo.policy=random:llama", "ppo.reward_model=random:llama", "prompts.red_team.limit=2", "prompts.helpful.limit=2",
    "ppo.rollouts=8", "ppo.updates=3", "ppo.missing_eos_penalty=0", "ppo.whiten_advantages=false", "ppo.kl_coef=0",
]  # fmt: skip
STATEFUL = ["ppo.kl_coef=0.05", "ppo.kl_target=0.5", "ppo.kl_horizon=100", "ppo.normalise_scores=true"]


def context_of(folder, *overrides):
    config = apply_overrides(load_config("tiny")[1], [*OVERRIDES, *overrides])
    return prepare("tiny", replace(config, stages=("ppo",)), folder, False, Progress(folder))


class Killed(Exception):
    """What stands for a kill in the third update."""


def kill_in_the_third(update, policy_sampler, texts, report):
    if update == 3:
        raise Killed
    return {}, False


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A run's context, frozen models, and a batch of its rollouts."""
    context = context_of(tmp_path_factory.mktemp("bench"))
    reference = load_model("random:llama")
    reward = load_model("random:llama", kind="reward", seed=3)
    prompts, _ = rollouts.usable(context, "ppo", context.sampler(reference))
    frozen = ppo.Frozen(reference, rewards.Source("model", reward), prompts, reward.config)
    params = {"policy": reference.params, "value": reward.params}
    return SimpleNamespace(context=context, frozen=frozen, params=params, folder=tmp_path_factory.mktemp("runs"))


def sampled(bench, draw="update-0", **sampling):
    """Rollouts of the reference, 8 of 4 prompts."""
    context = with_sampling(bench.context, **sampling)
    return sample_rollouts(context, "ppo", context.sampler(bench.frozen.reference), bench.frozen.prompts, draw)


def with_sampling(context, **sampling):
    settings = context.config.ppo
    settings = replace(settings, response=replace(settings.response, **sampling))
    return replace(context, config=replace(context.config, ppo=settings))


def scored(bench, rolled, context=None):
    context = context or bench.context
    return ppo.score_rollouts(context, bench.frozen, bench.params, rolled, 0.0, 0.0, formulas.no_scores())


def shortened(rolled: Rollouts, by: int) -> Rollouts:
    """The rollouts without their last tokens, as if they had ended there."""
    arrays = {name: array.copy() for name, array in rolled.arrays.items()}
    arrays["mask"][:, -by:] = 0
    arrays["positions"][:, -by:] = -1
    return replace(rolled, arrays=arrays)


def at_last_token(x_BN, mask_BN):
    return x_BN[np.arange(len(x_BN)), mask_BN.sum(axis=1) - 1]


def objective_of(bench, temperature=1.0):
    return ppo_objective(
        bench.frozen.reference.config, bench.frozen.value_config, temperature=temperature, clip=0.2, value_clip=0.2,
        value_coef=0.1,
    )  # fmt: skip


def test_scores_are_not_rounded_to_whole_numbers(bench):
    rolled = sampled(bench)
    batch, report, _ = scored(bench, rolled)
    *_, scores = rewards.measure(bench.context, "ppo", bench.frozen.reference, bench.frozen.source, rolled)
    assert np.abs(scores - np.round(scores)).max() > 0.05
    np.testing.assert_allclose(at_last_token(batch["returns"], batch["mask"]), scores, rtol=1e-4, atol=1e-5)
    assert report["reward"] == pytest.approx(scores.mean(), rel=1e-4)


def test_the_end_token_is_learned(bench):
    """It is the last token of the completion, with its log-prob, and an advantage there moves the policy."""
    rolled = sampled(bench, max_new_tokens=96)
    ended = np.flatnonzero(~rolled.arrays["truncated"])
    assert 0 < len(ended) < 8, "some rows end, some are cut at the limit"
    mask, old = rolled.arrays["mask"], rolled.arrays["old_logprobs"]
    completions = rolled.arrays["tokens"][:, -mask.shape[1] :]
    stops = bench.frozen.reference.config.eos_ids
    assert set(at_last_token(completions, mask)[ended].tolist()) <= set(stops)
    assert (at_last_token(old, mask)[ended] < -0.1).all()
    is_end = (mask > 0) & np.isin(completions, stops)
    assert is_end.sum() == len(ended)
    batch = {
        **{name: rolled.arrays[name] for name in ("tokens", "positions", "mask", "old_logprobs")},
        "advantages": is_end.astype(np.float32), "returns": 0 * old, "old_values": 0 * old,
    }  # fmt: skip
    gradient = jax.grad(lambda params: objective_of(bench)(params, batch)[0])(bench.params)["policy"]
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-3


def test_every_rollout_has_a_key_of_its_own(bench):
    first, second = sampled(bench, "update-0"), sampled(bench, "update-1")
    times = Counter(prompt.id for prompt in first.prompts)
    assert set(times.values()) == {2}, "each prompt twice"
    other_seed = replace(bench.context, config=replace(bench.context.config, seed=1))
    third = sampled(SimpleNamespace(context=other_seed, frozen=bench.frozen))
    answers = {tuple(row) for drawn in (first, second, third) for row in drawn.arrays["tokens"].tolist()}
    assert len(answers) == 24


def test_the_ratio_is_to_the_policy_that_sampled(bench):
    batch, *_ = scored(bench, sampled(bench))
    settings = bench.context.config.ppo
    params = jax.tree.map(jnp.copy, bench.params)
    state, step = start_training(objective_of(bench), params, settings.optimizer, 4, bench.context.mesh, 1)
    drift = []
    for _ in range(3):
        state, metrics = step(state, batch)
        drift.append((float(metrics["approx_kl"]), float(metrics["policy_clip_fraction"])))
    assert drift[0][0] < 1e-6, "the first step is taken where the rollouts were drawn"
    assert drift[2][0] > 1e-4 and drift[2][1] > 0, "later ones are not, and the clip works"


def test_every_pass_has_a_permutation_of_its_own(bench):
    orders = []

    def step(state, batch):
        orders.append(np.asarray(batch["row"]).tolist())
        return state, {"approx_kl": 0.0}

    batch = {"row": np.arange(8)}
    for update in range(3):
        updates.take_steps(bench.context, bench.context.config.ppo, step, None, batch, update)
    passes = [tuple(first + second) for first, second in zip(orders[::2], orders[1::2], strict=True)]
    assert len(passes) == 6 == len(set(passes)) and all(sorted(order) == list(range(8)) for order in passes)


def test_log_probs_are_at_the_temperature_of_the_rollouts(bench):
    rolled = sampled(bench, temperature=0.6)
    context = with_sampling(bench.context, temperature=0.6)
    ref_logprobs, *_ = rewards.measure(context, "ppo", bench.frozen.reference, bench.frozen.source, rolled)
    on = rolled.arrays["mask"] > 0
    np.testing.assert_allclose(ref_logprobs[on], rolled.arrays["old_logprobs"][on], atol=1e-3)
    batch, *_ = scored(bench, rolled, context)
    objective = ppo.objective(context.config, bench.frozen.reference.config, bench.frozen.value_config, 0.0)
    _, count, sums = objective(bench.params, batch)
    assert count == on.sum() and float(sums["approx_kl"] / count) < 1e-6


def test_the_score_stands_on_the_last_real_token(bench):
    rolled = shortened(sampled(bench), 3)
    batch, report, _ = scored(bench, rolled)
    *_, scores = rewards.measure(bench.context, "ppo", bench.frozen.reference, bench.frozen.source, rolled)
    np.testing.assert_allclose(at_last_token(batch["returns"], batch["mask"]), scores, rtol=1e-4, atol=1e-5)
    assert (batch["returns"][batch["mask"] == 0] == 0).all()
    assert report["reward"] == pytest.approx(scores.mean(), rel=1e-4)


def test_a_resumed_run_is_the_run_that_never_stopped(bench):
    """Adam, data, draws, KL coefficient and moments of the scores: killed in the third update, the same bytes."""
    whole, stopped = bench.folder / "whole", bench.folder / "stopped"
    if not whole.exists():  # once, by the code as it is
        run_ppo(whole)
        with pytest.raises(Killed):
            run_ppo(stopped, kill_in_the_third)
    resumed = shutil.copytree(stopped, bench.folder / f"resumed-{len(list(bench.folder.iterdir()))}")
    run_ppo(resumed)
    expected, got = artifacts(whole), artifacts(resumed)
    assert sorted(got) == sorted(expected) and len(expected) > 4
    assert [name for name in expected if got[name] != expected[name]] == []


def run_ppo(folder, monitor=None):
    folder.mkdir(exist_ok=True)
    context = context_of(folder, *STATEFUL)
    stage = context.folder("ppo")
    stage.begin(context.fingerprint("ppo"))
    stage.write_summary(ppo.run(context, stage, monitor))
    stage.finish({})


@pytest.mark.parametrize("change", ["padding", "rows"])
def test_scores_do_not_change_with_padding_or_batch_size(bench, change):
    scores_do_not_change_with(bench, change)


def scores_do_not_change_with(bench, change):
    rolled = shortened(sampled(bench), 2)
    *_, scores = rewards.measure(bench.context, "ppo", bench.frozen.reference, bench.frozen.source, rolled)
    context = bench.context
    if change == "padding":
        tokens, positions, mask = (rolled.arrays[name] for name in ("tokens", "positions", "mask"))
        around = ((0, 0), (32, 5))
        wide = {
            "tokens": np.pad(tokens, around), "positions": np.pad(positions, around, constant_values=-1),
            "mask": np.pad(mask, ((0, 0), (0, 5))),
        }  # fmt: skip
        rolled = replace(rolled, arrays=rolled.arrays | wide)
    else:
        settings = replace(context.config.ppo, minibatches=8)
        context = replace(context, config=replace(context.config, ppo=settings))
    *_, again = rewards.measure(context, "ppo", bench.frozen.reference, bench.frozen.source, rolled)
    assert np.std(scores) > 0.05
    np.testing.assert_allclose(again, scores, atol=1e-4)


def test_a_head_is_not_lost_on_reload(bench):
    reward, folder = bench.frozen.source.model, bench.folder / f"reward-{len(list(bench.folder.iterdir()))}"
    save_model(folder, reward.config, reward.params, reward.tokenizer, reward.hf_config, "reward")
    again = load_model(folder, kind="reward")
    np.testing.assert_array_equal(again.params["score"], reward.params["score"])
    rolled = sampled(bench)
    scores, others = (
        rewards.measure(bench.context, "ppo", bench.frozen.reference, rewards.Source("model", model), rolled)[-1]
        for model in (reward, again)
    )
    np.testing.assert_allclose(scores, others, atol=1e-5)
    params = ppo._starting_params(bench.context, replace(bench.frozen, source=rewards.Source("model", again)))
    np.testing.assert_array_equal(params["value"]["score"], reward.params["score"])


# ---------------------------------------------------------------- the faults, put back


def wrap(owner, name, around):
    """A patch that replaces owner.name by around(what it was)."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, around(getattr(owner, name)))


def whole_numbers(rewards_of):
    return lambda *arguments: rewards_of(*arguments).astype(jnp.int32)


def cut_before_the_end(arrays_of):
    def cut(sample):
        end = len(sample.tokens) - (not sample.truncated)
        return replace(sample, tokens=sample.tokens[:end], logprobs=sample.logprobs[:end])

    return lambda tokenizer, drawn, samples, *rest: arrays_of(tokenizer, drawn, [cut(s) for s in samples], *rest)


def ratio_of_one(terms):
    return lambda logprobs, old, *rest: terms(logprobs, jax.lax.stop_gradient(logprobs), *rest)


def one_permutation(_):
    def minibatches(settings, seed, update):
        for _ in range(settings.epochs):
            yield from np.split(np.random.default_rng(seed).permutation(settings.rollouts), settings.minibatches)

    return minibatches


def at_temperature_one(logprobs_of):
    return lambda *arguments, temperature: logprobs_of(*arguments, temperature=1.0)


def on_the_first_pad(rewards_of):
    def misplaced(scores_B, kl_BN, mask_BN, *rest):
        one_later_BN = jnp.arange(mask_BN.shape[1]) == mask_BN.sum(axis=1, keepdims=True)
        return rewards_of(0 * scores_B, kl_BN, mask_BN, *rest) + jnp.where(one_later_BN, scores_B[:, None], 0)

    return misplaced


def restored_without(change):
    """A patch of Checkpoints.restore: change(restored state, position, fresh state) -> what is gone on with."""

    def around(restore):
        def wrong(self, state, step=None):
            fresh = jax.tree.map(jnp.copy, state)  # `restore` deletes what it is given
            restored, position = restore(self, state, step)
            return change(restored, position, fresh) if position else (restored, position)

        return wrong

    return wrap(Checkpoints, "restore", around)


def draws_counted_from_the_start_of_the_process(sample):
    draws = iter(range(100))

    def of_another_draw(context, stage, sampler, prompts, draw):
        return sample(context, stage, sampler, prompts, draw if draw == "reference" else f"update-{next(draws)}")

    return of_another_draw


def a_fresh_head(read):
    def forgetful(self, tensor, shape, dtype, place):
        leaf = read(self, tensor, shape, dtype, place)
        return leaf + 0.1 if tensor.name.startswith("score") else leaf

    return forgetful


def fresh_adam(state, position, fresh):
    return state.replace(train=state.train.replace(opt_state=fresh.train.opt_state)), position


PUT_BACK = {
    "rewards in int32": (test_scores_are_not_rounded_to_whole_numbers, wrap(formulas, "rewards", whole_numbers)),
    "completion cut before EOS": (test_the_end_token_is_learned, wrap(rollouts, "_arrays", cut_before_the_end)),
    "one key for all": (
        test_every_rollout_has_a_key_of_its_own, wrap(Context, "row_seed", lambda _: lambda *parts: 0),
    ),
    "old log-probs by the current params": (
        test_the_ratio_is_to_the_policy_that_sampled, wrap(formulas, "policy_terms", ratio_of_one),
    ),
    "one permutation for all": (
        test_every_pass_has_a_permutation_of_its_own, wrap(updates, "minibatches", one_permutation),
    ),
    "scored at T = 1": (
        test_log_probs_are_at_the_temperature_of_the_rollouts, wrap(model_losses, "token_logprobs", at_temperature_one),
    ),
    "score on the first pad": (
        test_the_score_stands_on_the_last_real_token, wrap(formulas, "rewards", on_the_first_pad),
    ),
    "resume resets Adam": (test_a_resumed_run_is_the_run_that_never_stopped, restored_without(fresh_adam)),
    "resume forgets the data offset": (
        test_a_resumed_run_is_the_run_that_never_stopped,
        restored_without(lambda state, position, fresh: (state, {})),
    ),
    "resume forgets the draws": (
        test_a_resumed_run_is_the_run_that_never_stopped,
        wrap(ppo, "sample_rollouts", draws_counted_from_the_start_of_the_process),
    ),
    "resume forgets the KL coefficient": (
        test_a_resumed_run_is_the_run_that_never_stopped,
        restored_without(lambda state, position, fresh: (state.replace(kl_coef=fresh.kl_coef), position)),
    ),
    "resume forgets the moments of the scores": (
        test_a_resumed_run_is_the_run_that_never_stopped,
        restored_without(lambda state, position, fresh: (state.replace(scores=fresh.scores), position)),
    ),
    "score read at the last column": (
        lambda bench: scores_do_not_change_with(bench, "padding"),
        wrap(rewards, "last_real", lambda _: lambda x_BT, positions_BT: x_BT[:, -1]),
    ),
    "score of a row moved by its batch": (
        lambda bench: scores_do_not_change_with(bench, "rows"),
        wrap(rewards, "last_real", lambda read: lambda x_BT, positions_BT: read(x_BT, positions_BT) - x_BT.mean()),
    ),
    "head lost on reload": (
        test_a_head_is_not_lost_on_reload, wrap(pretrained.Checkpoint, "read", a_fresh_head),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", PUT_BACK)
def test_the_fault_put_back_is_noticed(fault, bench, monkeypatch):
    check, put_back = PUT_BACK[fault]
    check(bench)
    put_back(monkeypatch)
    jax.clear_caches()  # of programs traced without the fault
    try:
        with pytest.raises(AssertionError):
            check(bench)
    finally:
        monkeypatch.undo()
        jax.clear_caches()
