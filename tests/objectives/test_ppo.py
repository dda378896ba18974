import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.objectives import ppo

MASK_BT = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 0]])
B, T = MASK_BT.shape


def arrays(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, T)).astype(np.float32) for _ in range(count)]


# kl


def test_kl_estimators_agree_with_the_exact_divergence_on_average():
    rng = np.random.default_rng(1)
    policy, reference = (np.log(rng.dirichlet(np.ones(6))) for _ in range(2))
    exact = (np.exp(policy) * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        estimate = ppo.kl(policy[None], reference[None], estimator)
        np.testing.assert_allclose((np.exp(policy)[None] * estimate).sum(), exact, rtol=1e-5)


def test_kl_signs_and_small_differences():
    logprobs_BT, reference_BT = arrays(2)
    assert (np.asarray(ppo.kl(logprobs_BT, reference_BT, "k3")) >= 0).all()
    np.testing.assert_allclose(ppo.kl(logprobs_BT, reference_BT, "k1"), logprobs_BT - reference_BT, rtol=1e-6)
    near = jnp.float32([[1e-3]])
    np.testing.assert_allclose(ppo.kl(near, near * 0, "k3"), ppo.kl(near, near * 0, "k2"), rtol=1e-2)


def test_unknown_estimator_is_refused_by_name():
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        ppo.kl(jnp.zeros((1, 1)), jnp.zeros((1, 1)), "k4")


# rewards


def test_score_lands_on_the_last_real_token_and_nowhere_else():
    scores_B = np.arange(1, B + 1) + 0.73
    rewards_BT = np.asarray(ppo.rewards(scores_B, np.zeros((B, T)), MASK_BT, 0.1))
    want_BT = np.zeros((B, T))
    want_BT[0, 2], want_BT[1, 4], want_BT[2, 0], want_BT[4, 3] = scores_B[[0, 1, 2, 4]]  # row 3 has no token
    np.testing.assert_allclose(rewards_BT, want_BT, rtol=1e-6)


def test_kl_is_charged_on_real_tokens_only():
    (kl_BT,) = arrays(1)
    rewards_BT = ppo.rewards(np.zeros(B), kl_BT, MASK_BT, 0.1)
    np.testing.assert_allclose(rewards_BT, -0.1 * kl_BT * MASK_BT, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, jnp.float32])
def test_rewards_are_never_integers(dtype):
    rewards_BT = ppo.rewards(jnp.ones(B), jnp.zeros((B, T), dtype), jnp.asarray(MASK_BT, jnp.int32), 0.1)
    assert rewards_BT.dtype == jnp.float32
    whole_BT = ppo.rewards(jnp.ones(B, jnp.int32), jnp.ones((B, T), jnp.int32), MASK_BT, 0.25)
    assert whole_BT.dtype == jnp.float32
    np.testing.assert_array_equal(whole_BT[0], [-0.25, -0.25, 0.75, 0, 0])


# advantages


def slow_advantages(rewards_BT, values_BT, gamma, lam):
    """The defining sum, row by row: A_t = sum_l (gamma lam)^l delta_t+l over the row's real tokens."""
    advantages_BT = np.zeros((B, T))
    for row in range(B):
        real = np.flatnonzero(MASK_BT[row])
        reward, value = rewards_BT[row, real], np.append(values_BT[row, real], 0.0)
        delta = [reward[i] + gamma * value[i + 1] - value[i] for i in range(len(real))]
        for i, position in enumerate(real):
            advantages_BT[row, position] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(real)))
    return advantages_BT


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.97, 0.0), (0.5, 1.0), (0.0, 0.95)])
def test_advantages_equal_the_slow_sum(gamma, lam):
    rewards_BT, values_BT = arrays(2)
    advantages_BT, returns_BT = ppo.advantages(rewards_BT, values_BT, MASK_BT, gamma, lam)
    want_BT = slow_advantages(rewards_BT, values_BT, gamma, lam)
    np.testing.assert_allclose(advantages_BT, want_BT, atol=1e-5)
    np.testing.assert_allclose(returns_BT, want_BT + values_BT * MASK_BT, atol=1e-5)


def test_with_lambda_one_the_return_is_the_discounted_sum_of_rewards():
    rewards_BT, values_BT = arrays(2)
    _, returns_BT = ppo.advantages(rewards_BT, values_BT, MASK_BT, 0.9, 1.0)
    want = rewards_BT[1] @ 0.9 ** np.arange(T)
    np.testing.assert_allclose(returns_BT[1, 0], want, rtol=1e-5)


def test_holes_in_a_row_are_stepped_over():
    rewards_BT, values_BT = arrays(2)
    holed, closed = np.array([[1, 0, 1, 0, 1]]), np.array([[1, 1, 1]])
    got, _ = ppo.advantages(rewards_BT[:1], values_BT[:1], holed, 0.9, 0.8)
    want, _ = ppo.advantages(rewards_BT[:1, ::2], values_BT[:1, ::2], closed, 0.9, 0.8)
    np.testing.assert_allclose(got[:, ::2], want, rtol=1e-6)


# whitening


def test_whitening_has_mean_zero_and_unbiased_variance_one_over_real_tokens():
    (x_BT,) = arrays(1)
    real = MASK_BT.astype(bool)
    whitened_BT = np.asarray(ppo.whiten(3 * x_BT + 5, MASK_BT))
    assert abs(whitened_BT[real].mean()) < 1e-5
    assert abs(whitened_BT[real].std(ddof=1) - 1) < 1e-5
    assert (whitened_BT[~real] == 0).all()
    kept_BT = np.asarray(ppo.whiten(3 * x_BT + 5, MASK_BT, shift_mean=False))
    np.testing.assert_allclose(kept_BT[real].mean(), (3 * x_BT + 5)[real].mean(), rtol=1e-5)
    np.testing.assert_allclose(kept_BT[real].std(ddof=1), 1, rtol=1e-5)
    assert (kept_BT[~real] == 0).all()


@pytest.mark.parametrize("marked", [0, 1])
def test_whitening_without_spread_is_finite(marked):
    mask_BT = np.zeros((2, 3))
    mask_BT[0, :marked] = 1
    whitened_BT, gradient_BT = jax.value_and_grad(lambda x: ppo.whiten(x, mask_BT).sum())(jnp.full((2, 3), 4.0))
    assert float(whitened_BT) == 0.0 and np.isfinite(gradient_BT).all()


# losses


def test_policy_loss_clips_the_pessimistic_side_only():
    ratio = np.array([[1.5, 0.5, 1.5, 0.5, 1.1]])
    advantage = np.array([[1.0, 1.0, -1.0, -1.0, 2.0]])
    want = [-1.2, -0.5, 1.5, 0.8, -2.2]  # the gain is capped, the loss never
    mask = np.ones((1, 5))
    loss, metrics = ppo.policy_loss(np.log(ratio), np.zeros((1, 5)), advantage, mask, 0.2)
    np.testing.assert_allclose(loss, np.mean(want), rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_fraction"], 2 / 5)
    np.testing.assert_allclose(metrics["approx_kl"], 0.5 * np.mean(np.log(ratio) ** 2), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_mean"], ratio.mean(), rtol=1e-5)
    slope = jax.grad(lambda x: ppo.policy_loss(x, np.zeros((1, 5)), advantage, mask, 0.2)[0])(
        jnp.log(jnp.float32(ratio))
    )
    np.testing.assert_array_equal(np.asarray(slope)[0] == 0, [True, False, False, True, False])


def test_first_step_on_the_sampling_policy_is_the_plain_policy_gradient():
    logprobs_BT, advantages_BT = arrays(2)
    loss = lambda x: ppo.policy_loss(x, logprobs_BT, advantages_BT, MASK_BT, 0.2)  # noqa: E731
    gradient_BT, metrics = jax.grad(loss, has_aux=True)(jnp.asarray(logprobs_BT))
    np.testing.assert_allclose(gradient_BT, -advantages_BT * MASK_BT / MASK_BT.sum(), rtol=1e-5)
    assert float(metrics["ratio_mean"]) == 1.0 and float(metrics["clip_fraction"]) == 0.0


def test_value_loss_takes_the_larger_error():
    values, old, returns = np.array([[1.0, 0.1, 1.0]]), np.zeros((1, 3)), np.array([[1.0, 1.0, -1.0]])
    want = [0.8**2 / 2, 0.9**2 / 2, 2.0**2 / 2]
    loss, metrics = ppo.value_loss(values, old, returns, np.ones((1, 3)), 0.2)
    np.testing.assert_allclose(loss, np.mean(want), rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_fraction"], 1 / 3)


def test_terms_sum_to_the_losses_over_any_split():
    new, old, advantages, values = arrays(4)
    for terms, loss in ((ppo.policy_terms, ppo.policy_loss), (ppo.value_terms, ppo.value_loss)):
        want, want_metrics = loss(new, old, advantages + values, MASK_BT, 0.2)
        parts = [terms(new[i], old[i], (advantages + values)[i], MASK_BT[i], 0.2) for i in ([0, 3], [1, 2, 4])]
        real = MASK_BT.sum()
        np.testing.assert_allclose(sum(float(x.sum()) for x, _ in parts) / real, want, rtol=1e-5)
        for name, value in want_metrics.items():
            np.testing.assert_allclose(sum(float(m[name].sum()) for _, m in parts) / real, value, rtol=1e-5)


# padding


def junk(x_BT, value):
    return jnp.where(MASK_BT.astype(bool), x_BT, value)


@jax.jit
def whole_update(logprobs, old_logprobs, reference, old_values, values):
    """Every function of the module in a row, as an update uses them."""
    scores_B = np.linspace(-1, 1, B)
    penalty = jax.lax.stop_gradient(ppo.kl(old_logprobs, reference, "k3"))  # it has no mask of its own
    rewards = ppo.rewards(scores_B, penalty, MASK_BT, 0.1)
    advantages, returns = ppo.advantages(rewards, old_values, MASK_BT, 0.99, 0.9)
    advantages = ppo.whiten(advantages, MASK_BT)
    policy, policy_metrics = ppo.policy_loss(logprobs, old_logprobs, advantages, MASK_BT, 0.2)
    value, value_metrics = ppo.value_loss(values, old_values, returns, MASK_BT, 0.2)
    return policy + 0.1 * value, (policy_metrics, value_metrics, rewards, advantages, returns)


@pytest.mark.parametrize("value", [7.0, 1e30, -np.inf, np.nan])
def test_what_is_masked_changes_no_value_and_no_gradient(value):
    inputs = arrays(5)
    run = jax.jit(jax.value_and_grad(whole_update, argnums=tuple(range(5)), has_aux=True))
    clean, clean_gradients = run(*(junk(x, 0.0) for x in inputs))
    dirty, dirty_gradients = run(*(junk(x, value) for x in inputs))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(clean_gradients, dirty_gradients, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(b).all() and (np.asarray(b)[MASK_BT == 0] == 0).all()


def test_more_padding_changes_nothing():
    inputs = arrays(5)
    loss, (policy_metrics, *_, returns) = whole_update(*inputs)
    wide = [np.pad(x, ((0, 0), (2, 3))) for x in (MASK_BT, *inputs)]
    mask, logprobs, old_logprobs, reference, old_values, values = wide
    rewards = ppo.rewards(np.linspace(-1, 1, B), ppo.kl(old_logprobs, reference, "k3"), mask, 0.1)
    advantages, wide_returns = ppo.advantages(rewards, old_values, mask, 0.99, 0.9)
    policy, metrics = ppo.policy_loss(logprobs, old_logprobs, ppo.whiten(advantages, mask), mask, 0.2)
    value, _ = ppo.value_loss(values, old_values, wide_returns, mask, 0.2)
    np.testing.assert_allclose(policy + 0.1 * value, loss, rtol=1e-5)
    np.testing.assert_allclose(wide_returns[:, 2:-3], returns, rtol=1e-5)
    for name, want in policy_metrics.items():
        np.testing.assert_allclose(metrics[name], want, rtol=1e-5)


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_masks_may_be_bool_or_numbers(dtype):
    new, old, advantages = arrays(3)
    want, _ = ppo.policy_loss(new, old, advantages, MASK_BT.astype(bool), 0.2)
    got, _ = ppo.policy_loss(new, old, advantages, MASK_BT.astype(dtype), 0.2)
    assert float(got) == float(want)


# shapes


def test_arrays_that_would_broadcast_are_refused():
    """A score a token, a value a row or transposed rewards would give a number, of something else."""
    x_BT, y_BT = arrays(2)
    wrong = [
        lambda: ppo.kl(x_BT, y_BT[:, :1], "k1"),
        lambda: ppo.rewards(x_BT[:, :1], y_BT, MASK_BT, 0.1),
        lambda: ppo.advantages(x_BT, y_BT[:1], MASK_BT, 1.0, 0.95),
        lambda: ppo.policy_loss(x_BT, y_BT, y_BT[:1], MASK_BT, 0.2),
        lambda: ppo.value_loss(x_BT, y_BT, y_BT[0], MASK_BT, 0.2),
    ]
    for call in wrong:
        with pytest.raises(AssertionError):
            call()
