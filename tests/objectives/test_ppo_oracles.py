"""PPO arrays against recorded ones. They put the score one position past the end (mask_p1 is one position longer),
so recorded rewards are fed as given; our own placement is tested in test_ppo.py."""

import contextlib

import jax
import numpy as np
import pytest

from cai_jax.objectives import ppo

CLIP, VALUE_COEF = 0.2, 0.1


@pytest.mark.parametrize("name, atol", [("ppo_syn_a_f32", 1e-5), ("ppo_syn_a_f64", 1e-10)])
def test_synthetic_arrays(oracle, name, atol):
    want = oracle(name)
    mask, value_mask = want["mask"], want["mask_p1"]
    gamma, lam, kl_coef = (float(want[key]) for key in ("gamma", "lam", "kl_coef"))
    close = lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=atol, atol=atol)  # noqa: E731
    with jax.enable_x64(True) if atol < 1e-6 else contextlib.nullcontext():
        for estimator in ("k1", "k2", "k3"):
            close(ppo.kl(want["logprobs"], want["ref_logprobs"], estimator), want[estimator])
        kl = ppo.kl(want["logprobs"], want["ref_logprobs"], str(want["estimator"]))
        close(kl, want["kl"])

        past_the_end = value_mask & ~mask
        ours = np.asarray(ppo.rewards(want["scores"], kl, mask, kl_coef))
        assert ours.dtype == want["rewards"].dtype
        before_the_end = mask & ~is_last(mask)
        close(ours[before_the_end], want["rewards"][before_the_end])
        close(ours.sum(1), want["rewards"].sum(1))
        assert past_the_end.any() and (ours[past_the_end] == 0).all()

        advantages, returns = ppo.advantages(want["rewards"], want["values"], value_mask, gamma, lam)
        close(advantages, want["raw_advantages"])
        close(returns, want["returns"])
        whitened = ppo.whiten(advantages, mask)
        close(whitened, want["advantages"])

        policy, metrics = ppo.policy_loss(want["new_logprobs"], want["logprobs"], whitened, mask, CLIP)
        value, value_metrics = ppo.value_loss(want["vpred"], want["values"], returns, value_mask, CLIP)
        close(policy, want["pg_loss"])
        close(value, want["vf_loss"])
        close(policy + VALUE_COEF * value, want["loss"])
        close(metrics["clip_fraction"], want["pg_clipfrac"])
        close(metrics["ratio_mean"], want["ratio"][mask].mean())
        # The recorded mean runs over padding too, where the difference is 0.
        close(metrics["approx_kl"] * mask.sum() / mask.size, want["approxkl"])
        np.testing.assert_allclose(value_metrics["clip_fraction"], want["vf_clipfrac"], rtol=1e-6)


def is_last(mask):
    return np.arange(mask.shape[1])[None, :] == (mask.sum(1) - 1)[:, None]


def test_rollout_arrays_of_a_whole_update(oracle):
    want = oracle("ppo_run_k1")
    mask, value_mask = ~want["padding_mask"], ~want["padding_mask_p1"]
    kl = ppo.kl(want["logprobs"], want["ref_logprobs"], "k1")
    np.testing.assert_allclose(kl, want["kl"], atol=1e-5)
    penalty = ppo.rewards(np.zeros(8), kl, mask, float(want["kl_coef"]))
    np.testing.assert_allclose(penalty, want["non_score_reward"], atol=1e-5)
    rewards = ppo.rewards(want["scores"], kl, mask, float(want["kl_coef"]))
    np.testing.assert_allclose(rewards.sum(1), want["rewards"].sum(1), atol=1e-5)
    advantages, returns = ppo.advantages(
        want["rewards"], want["values"], value_mask, float(want["gamma"]), float(want["lam"])
    )
    np.testing.assert_allclose(advantages, want["raw_advantages"], atol=1e-5)
    np.testing.assert_allclose(returns, want["returns"], atol=1e-5)
    np.testing.assert_allclose(ppo.whiten(advantages, mask), want["advantages"], atol=1e-5)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_losses_of_each_epoch(oracle, epoch):
    want = oracle("ppo_run_k1")
    now = {key.removeprefix(f"ep{epoch}_"): x for key, x in want.items() if key.startswith(f"ep{epoch}_")}
    rows = now["micro_batch_inds"]
    mask, value_mask = ~want["padding_mask"][rows], ~want["padding_mask_p1"][rows]
    clip, value_clip = float(want["cliprange"]), float(want["cliprange_value"])

    policy_arrays = now["new_logprobs"], want["logprobs"][rows], want["advantages"][rows], mask, clip
    policy, policy_metrics = ppo.policy_loss(*policy_arrays)
    np.testing.assert_allclose(policy, now["pg_loss"], atol=1e-5)
    terms, term_metrics = ppo.policy_terms(*policy_arrays)
    worst = np.maximum(now["pg_losses"], now["pg_losses2"])
    np.testing.assert_allclose(np.asarray(terms)[mask], worst[mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(term_metrics["ratio_mean"])[mask], now["ratio"][mask], rtol=1e-5)
    clipped = (now["pg_losses2"] > now["pg_losses"])[mask]
    np.testing.assert_allclose(policy_metrics["clip_fraction"], clipped.mean(), atol=1e-6)

    value_arrays = now["vpred"], want["values"][rows], want["returns"][rows], value_mask, value_clip
    value, value_metrics = ppo.value_loss(*value_arrays)
    np.testing.assert_allclose(value, now["vf_loss"], atol=1e-5)
    value_terms, _ = ppo.value_terms(*value_arrays)
    worst = np.maximum(now["vf_losses1"], now["vf_losses2"]) / 2
    np.testing.assert_allclose(np.asarray(value_terms)[value_mask], worst[value_mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value_metrics["clip_fraction"], now["vf_clipfrac"], atol=1e-6)
    np.testing.assert_allclose(policy + float(want["vf_coef"]) * value, now["loss"], atol=1e-5)
