"""PPO's arrays against slow, obvious loops over drawn cases: lengths, holes, gamma and lambda, extremes."""

import math

import jax
import numpy as np
import pytest

from cai_jax.objectives import grpo, ppo

CASES = range(12)


@pytest.fixture(autouse=True)
def one_shape_only():
    """Cases share their shape, so that each function is compiled once."""
    with jax.numpy_rank_promotion("allow"):
        yield


def case(seed, rows=5, width=9):
    """A mask with rows of every kind (empty, full, short, with holes, real tokens late or early) and arrays on it."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((rows, width), bool)
    for row in range(rows):
        kind = rng.integers(5)
        length = rng.integers(1, width + 1)
        if kind == 1:
            mask[row] = True
        elif kind == 2:
            mask[row, :length] = True
        elif kind == 3:
            mask[row, width - length :] = True
        elif kind == 4:
            mask[row] = rng.random(width) < 0.5
    scale = 10.0 ** rng.integers(-2, 2)
    arrays = [(scale * rng.normal(size=(rows, width))).astype(np.float32) for _ in range(5)]
    return mask, arrays, rng


def close(got, want):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", CASES)
def test_kl(seed):
    _, (logprobs, reference, *_), _ = case(seed)
    for estimator in ("k1", "k2", "k3"):
        want = np.zeros(logprobs.shape)
        for place in np.ndindex(logprobs.shape):
            r = float(reference[place]) - float(logprobs[place])
            want[place] = {"k1": -r, "k2": r * r / 2, "k3": math.exp(min(r, 700)) - 1 - r}[estimator]
        got = np.asarray(ppo.kl(logprobs, reference, estimator), np.float64)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        assert estimator == "k1" or (got >= -1e-6).all()


@pytest.mark.parametrize("kl_per", ["token", "sequence"])
@pytest.mark.parametrize("seed", CASES)
def test_rewards(seed, kl_per):
    mask, (kl, *_), rng = case(seed)
    scores, coefficient = rng.normal(size=len(mask)).astype(np.float32), rng.uniform(0, 2)
    want = np.zeros(mask.shape)
    for row in range(len(mask)):
        real = [t for t in range(mask.shape[1]) if mask[row, t]]
        for t in real:
            want[row, t if kl_per == "token" else real[-1]] -= coefficient * kl[row, t]
        if real:
            want[row, real[-1]] += scores[row]
    close(ppo.rewards(scores, kl, mask, coefficient, kl_per), want)


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.8), (1.0, 0.95), (0.5, 1.0), (1.0, 0.0), (0.0, 0.7), (0.99, 0.3)])
@pytest.mark.parametrize("seed", CASES)
def test_advantages(seed, gamma, lam):
    mask, (rewards, values, *_), _ = case(seed)
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for row in range(len(mask)):
        real = [t for t in range(mask.shape[1]) if mask[row, t]]
        for i, t in enumerate(real):
            for j in range(i, len(real)):
                following = float(values[row, real[j + 1]]) if j + 1 < len(real) else 0.0
                delta = float(rewards[row, real[j]]) + gamma * following - float(values[row, real[j]])
                advantages[row, t] += (gamma * lam) ** (j - i) * delta
            returns[row, t] = advantages[row, t] + values[row, t]
    got = ppo.advantages(rewards, values, mask, gamma, lam)
    close(got[0], advantages)
    close(got[1], returns)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("seed", CASES)
def test_whiten(seed, shift_mean):
    mask, (x, *_), _ = case(seed)
    real = [float(x[place]) for place in np.ndindex(x.shape) if mask[place]]
    if not real:
        return
    mean = sum(real) / len(real)
    variance = sum((value - mean) ** 2 for value in real) / max(len(real) - 1, 1)
    want = np.zeros(mask.shape)
    for place in np.ndindex(x.shape):
        if mask[place]:
            want[place] = (float(x[place]) - mean) / math.sqrt(variance + 1e-8) + (0 if shift_mean else mean)
    close(ppo.whiten(x, mask, shift_mean), want)


@pytest.mark.parametrize("clip", [0.2, 0.05, 1.0])
@pytest.mark.parametrize("seed", CASES)
def test_value_loss(seed, clip):
    mask, (values, old, returns, *_), _ = case(seed)
    losses, clipped = [], []
    for place in np.ndindex(mask.shape):
        if mask[place]:
            v, o, r = (float(x[place]) for x in (values, old, returns))
            near = min(max(v, o - clip), o + clip)
            losses.append(max((v - r) ** 2, (near - r) ** 2) / 2)
            clipped.append((near - r) ** 2 > (v - r) ** 2)
    loss, metrics = ppo.value_loss(values, old, returns, mask, clip)
    close(loss, np.mean(losses) if losses else 0.0)
    close(metrics["clip_fraction"], np.mean(clipped) if clipped else 0.0)


@pytest.mark.parametrize("seed", CASES)
def test_policy_loss(seed):
    mask, (new, old, advantages, *_), _ = case(seed)
    new, old = new / (1 + np.abs(new)), old / (1 + np.abs(old))  # ratios that float32 holds
    losses, kls = [], []
    for place in np.ndindex(mask.shape):
        if mask[place]:
            change = float(new[place]) - float(old[place])
            ratio, a = math.exp(change), float(advantages[place])
            losses.append(max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)))
            kls.append(change**2 / 2)
    loss, metrics = ppo.policy_loss(new, old, advantages, mask, 0.2)
    close(loss, np.mean(losses) if losses else 0.0)
    close(metrics["approx_kl"], np.mean(kls) if kls else 0.0)


# the adaptive coefficient and the moments of the scores


def test_the_adaptive_coefficient_is_that_of_ziegler_et_al():
    assert ppo.next_kl_coef(0.2, 6.0, target=6.0, horizon=10000, rows=512) == pytest.approx(0.2)
    # 0.1 of an error: 0.2 * (1 + 0.1 * 512 / 10000)
    assert ppo.next_kl_coef(0.2, 6.6, target=6.0, horizon=10000, rows=512) == pytest.approx(0.2 * 1.00512)
    assert ppo.next_kl_coef(0.2, 600.0, 6.0, 10000, 512) == pytest.approx(0.2 * (1 + 0.2 * 0.0512))
    assert ppo.next_kl_coef(0.2, -5.0, 6.0, 10000, 512) == pytest.approx(0.2 * (1 - 0.2 * 0.0512))


def test_the_adaptive_coefficient_holds_a_kl_at_its_target():
    """A policy whose KL is inversely proportional to the coefficient ends at the target from both sides."""
    for start in (0.001, 5.0):
        coefficient = start
        for _ in range(3000):
            coefficient = ppo.next_kl_coef(coefficient, 0.3 / coefficient, target=3.0, horizon=1000, rows=64)
        assert 0.3 / coefficient == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize("seed", CASES)
def test_running_moments_are_those_of_all_scores(seed):
    rng = np.random.default_rng(seed)
    sets = [rng.normal(rng.normal(0, 5), rng.uniform(0, 3), rng.integers(0, 7)) for _ in range(6)]
    moments = ppo.no_scores()
    for scores in sets:
        moments = ppo.with_scores(moments, scores)
    whole = np.concatenate(sets)
    assert float(moments.count) == len(whole)
    if len(whole):
        np.testing.assert_allclose(float(moments.mean), whole.mean(), rtol=1e-5, atol=1e-6)
        deviation = whole.std()
        np.testing.assert_allclose(moments.scale(), deviation if deviation > 1e-6 else 1.0, rtol=1e-4)


def test_equal_scores_have_no_scale_to_divide_by():
    assert ppo.with_scores(ppo.no_scores(), [3.0, 3.0, 3.0]).scale() == 1.0


# GRPO


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("seed", CASES)
def test_group_advantages(seed, scale):
    rng = np.random.default_rng(seed)
    group, scores = 4, rng.normal(size=12).astype(np.float32)
    scores[4:8] = 0.3  # a group that agrees
    real = rng.random(12) < 0.7
    want = np.zeros(12)
    for start in range(0, 12, group):
        members = [i for i in range(start, start + group) if real[i]]
        if members:
            mean = sum(float(scores[i]) for i in members) / len(members)
            variance = sum((float(scores[i]) - mean) ** 2 for i in members) / max(len(members) - 1, 1)
            for i in members:
                want[i] = (float(scores[i]) - mean) / (math.sqrt(variance) + 1e-4 if scale else 1)
    scores[~real] = np.nan  # what has no score may hold anything
    # The deviation of equal scores is rounding, over 1e-4.
    np.testing.assert_allclose(grpo.advantages(scores, real, group, scale), want, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("length_norm", ["response", "limit"])
@pytest.mark.parametrize("seed", CASES)
def test_group_loss(seed, length_norm):
    mask, (new, old, reference, junk, _), rng = case(seed)
    new, old, reference = (x / (1 + np.abs(x)) for x in (new, old, reference))
    advantages, clip, coefficient = rng.normal(size=len(mask)).astype(np.float32), 0.2, 0.3
    rows = []
    for row in range(len(mask)):
        terms = []
        for t in range(mask.shape[1]):
            if mask[row, t]:
                ratio = math.exp(float(new[row, t]) - float(old[row, t]))
                a, r = float(advantages[row]), float(reference[row, t]) - float(new[row, t])
                surrogate = min(a * ratio, a * min(max(ratio, 1 - clip), 1 + clip))
                terms.append(-(surrogate - coefficient * (math.exp(r) - 1 - r)))
        if terms:
            rows.append(sum(terms) / (len(terms) if length_norm == "response" else mask.shape[1]))
    arrays = [np.where(mask, x, junk) for x in (new, old, reference)]
    loss, _ = grpo.loss(*arrays, advantages, mask, clip, coefficient, length_norm)
    close(loss, np.mean(rows) if rows else 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_is_masked_changes_no_gradient_of_the_group_loss(value):
    mask, (new, old, reference, *_), rng = case(3)
    advantages = rng.normal(size=len(mask)).astype(np.float32)

    def gradient(outside):
        arrays = [np.where(mask, x, outside).astype(np.float32) for x in (new, old, reference)]
        return jax.grad(lambda new: grpo.loss(new, *arrays[1:], advantages, mask, 0.2, 0.04)[0])(arrays[0])

    clean, dirty = np.asarray(gradient(0.0)), np.asarray(gradient(value))
    np.testing.assert_array_equal(clean, dirty)
    assert np.abs(dirty[mask]).max() > 0 and (dirty[~mask] == 0).all()


def test_the_kl_of_the_group_loss_pulls_towards_the_reference():
    """The gradient of k3 in the loss is 1 - reference / policy: zero at the reference, upwards where it is likelier."""
    mask, new = np.ones((1, 3), bool), np.log(np.float32([[0.2, 0.5, 0.4]]))
    reference = np.log(np.float32([[0.2, 0.25, 0.8]]))
    gradient = jax.grad(lambda x: grpo.loss(x, new, reference, np.zeros(1, np.float32), mask, 0.2, 1.0)[0])(new)
    np.testing.assert_allclose(gradient * 3, [[0.0, 1 - 0.5, 1 - 2.0]], atol=1e-6)


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="response or limit"):
        grpo.per_response(np.zeros((1, 1)), np.ones((1, 1)), "tokens")
    with pytest.raises(ValueError, match="token or sequence"):
        ppo.rewards(np.zeros(1), np.zeros((1, 1)), np.ones((1, 1)), 0.1, "row")
