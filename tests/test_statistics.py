import json
import math

import numpy as np
import pytest

from cai_jax import statistics
from cai_jax.statistics import auroc, calibration, correlation, mean_interval, wilson_interval

NOTHING = {"value": None, "low": None, "high": None, "n": 0}


def bounds(interval):
    return interval["low"], interval["high"]


# shares


@pytest.mark.parametrize(
    "successes, n, low, high",  # the last two: Newcombe 1998, Statistics in Medicine 17:857, table I
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_known_values(successes, n, low, high):
    interval = wilson_interval(successes, n)
    np.testing.assert_allclose(bounds(interval), (low, high), atol=6e-5)
    assert (interval["value"], interval["n"]) == (successes / n, n)


def test_wilson_bounds_solve_the_score_equation():
    for successes, n in [(1, 3), (7, 19), (40, 48)]:
        share = successes / n
        for bound in bounds(wilson_interval(successes, n)):
            assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), rel=1e-6)


def test_wilson_covers_about_95_percent():
    rng, p, n = np.random.default_rng(0), 0.12, 40
    draws = rng.binomial(n, p, size=4000)
    low, high = np.array([bounds(wilson_interval(int(k), n)) for k in range(n + 1)]).T
    assert 0.92 < ((low[draws] <= p) & (p <= high[draws])).mean() < 0.98


def test_wilson_of_nothing_and_of_nonsense():
    assert wilson_interval(0, 0) == NOTHING
    for successes, n in [(3, 2), (-1, 2), (1, 0)]:
        with pytest.raises(ValueError, match="out of"):
            wilson_interval(successes, n)


# means


@pytest.mark.parametrize(
    "n, quantile",  # two-sided 95% quantiles of Student's t, n - 1 degrees of freedom, from printed tables
    [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (6, 2.571), (11, 2.228), (31, 2.042), (121, 1.980)],
)
def test_mean_interval_is_students(n, quantile):
    values = np.random.default_rng(n).normal(3, 2, size=n)
    interval = mean_interval(values)
    half = quantile * values.std(ddof=1) / math.sqrt(n)
    assert interval["value"] == pytest.approx(values.mean())
    np.testing.assert_allclose(np.array(bounds(interval)) - values.mean(), (-half, half), rtol=2e-3)


def test_mean_of_little():
    assert mean_interval([]) == NOTHING
    assert mean_interval([None, math.nan]) == NOTHING
    assert mean_interval([2.5]) == {"value": 2.5, "low": None, "high": None, "n": 1}
    assert mean_interval([4, 4, 4]) == {"value": 4.0, "low": 4.0, "high": 4.0, "n": 3}


def test_missing_entries_are_left_out_and_not_counted():
    assert mean_interval([1, None, 2, math.nan, 6]) == mean_interval([1, 2, 6])
    assert mean_interval(x for x in (1, 2, 6)) == mean_interval([1, 2, 6])


# separation


def slow_auroc(positive, negative):
    wins = sum((p > q) + 0.5 * (p == q) for p in positive for q in negative)
    return wins / (len(positive) * len(negative))


def test_auroc_equals_the_count_over_all_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        positive = rng.integers(0, 6, size=rng.integers(1, 12)).tolist()  # many ties
        negative = rng.integers(0, 6, size=rng.integers(1, 12)).tolist()
        interval = auroc(positive, negative)
        assert interval["value"] == pytest.approx(slow_auroc(positive, negative))
        assert 0 <= interval["low"] <= interval["value"] <= interval["high"] <= 1
        assert interval["n"] == len(positive) + len(negative)


def test_auroc_is_symmetric_under_exchange_of_classes():
    rng = np.random.default_rng(1)
    positive, negative = rng.normal(1, 1, 20), rng.normal(0, 1, 30)
    there, back = auroc(positive, negative), auroc(negative, positive)
    assert there["value"] == pytest.approx(1 - back["value"])
    assert there["low"] == pytest.approx(1 - back["high"])


def test_perfect_separation_of_few_is_not_certain_and_of_many_nearly_is():
    few, many = auroc([2, 3, 4], [0, 1]), auroc(np.arange(500, 1000), np.arange(500))
    assert few["value"] == many["value"] == few["high"] == 1.0
    assert few["low"] < 0.6 and 0.97 < many["low"] < 1


def test_auroc_bounds_lie_196_hanley_mcneil_errors_away():
    positive, negative = np.arange(30) + 7.5, np.arange(40)
    interval = auroc(positive, negative)
    for bound in bounds(interval):
        one, two = bound / (2 - bound), 2 * bound**2 / (1 + bound)
        variance = bound * (1 - bound) + 29 * (one - bound**2) + 39 * (two - bound**2)
        distance = abs(interval["value"] - bound)
        assert distance == pytest.approx(1.959964 * math.sqrt(variance / 1200), rel=1e-5)


def test_auroc_covers_about_95_percent():
    rng = np.random.default_rng(2)
    true_area = 0.5 * (1 + math.erf(0.5))  # normals one standard deviation apart
    hits = 0
    for _ in range(600):
        low, high = bounds(auroc(rng.normal(1, 1, 25), rng.normal(0, 1, 25)))
        hits += low <= true_area <= high
    assert 0.91 < hits / 600 < 0.985


def test_auroc_without_both_classes():
    assert auroc([], []) == NOTHING
    assert auroc([1, 2], [None]) == NOTHING | {"n": 2}
    assert auroc([1.0, None, 2.0], [0.5]) == auroc([1.0, 2.0], [0.5])


# calibration


def slow_calibration_error(predicted, observed, bins):
    error = 0.0
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = [(p, o) for p, o in zip(predicted, observed, strict=True) if low <= p < high or p == high == 1]
        if inside:
            p, o = np.mean(inside, axis=0)
            error += len(inside) / len(predicted) * abs(p - o)
    return error


@pytest.mark.parametrize("bins", [1, 3, 10])
def test_calibration_equals_the_slow_sum_with_soft_targets(bins):
    rng = np.random.default_rng(bins)
    predicted = np.append(rng.random(60).round(1), [0.0, 0.3, 0.7, 1.0])  # many on the edges
    observed = rng.random(64)
    error, table = calibration(predicted, observed, bins)
    assert error == pytest.approx(slow_calibration_error(predicted, observed, bins))
    assert len(table) == bins and sum(row["n"] for row in table) == 64
    assert (table[0]["low"], table[-1]["high"]) == (0.0, 1.0)
    for row in table:
        if row["n"]:
            assert row["low"] - 1e-12 <= row["predicted"] <= row["high"] + 1e-12


def test_calibrated_confident_and_overconfident():
    rng = np.random.default_rng(3)
    predicted = rng.random(20_000)
    happened = rng.random(20_000) < predicted
    assert calibration(predicted, happened)[0] < 0.02
    assert calibration(predicted, predicted)[0] == pytest.approx(0)
    assert calibration(np.full(10, 0.9), np.full(10, 0.5))[0] == pytest.approx(0.4)


def test_empty_bins_have_no_means():
    error, table = calibration([0.05, 0.95], [0, 1])
    assert error == pytest.approx(0.05)
    assert [row["n"] for row in table] == [1] + 8 * [0] + [1]
    assert table[4] == {"low": 0.4, "high": 0.5, "n": 0, "predicted": None, "observed": None}
    assert calibration([], [])[0] is None


def test_calibration_refuses_what_is_no_probability_or_no_pair():
    with pytest.raises(ValueError, match="0..1"):
        calibration([1.2], [1])
    with pytest.raises(ValueError, match="paired"):
        calibration([0.2, 0.3], [1])


# correlation


def test_correlation():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=50), rng.normal(size=50)
    assert correlation(x, 3 * x + 2) == pytest.approx(1)
    assert correlation(x, -x) == pytest.approx(-1)
    assert correlation(x, x + y) == pytest.approx(np.corrcoef(x, x + y)[0, 1])
    assert correlation([1, 2, None, 4], [2, 4, 100, math.nan]) == pytest.approx(1)


@pytest.mark.parametrize("x, y", [([], []), ([1], [2]), ([1, 1, 1], [1, 2, 3]), ([1, None], [None, 2])])
def test_correlation_that_does_not_exist(x, y):
    assert correlation(x, y) is None


def test_everything_is_plain_json():
    results = [
        wilson_interval(np.int64(3), np.int64(7)),
        mean_interval(np.float32([1, 2])),
        auroc(np.float32([1]), np.float32([0])),
        calibration(np.float32([0.1]), np.array([True])),
        correlation(np.float32([1, 2]), np.float32([2, 1])),
    ]
    json.dumps(results, allow_nan=False)


def test_a_grouped_share_is_wilsons_where_each_case_is_its_own_group():
    hits = [True] * 17 + [False] * 3
    assert statistics.grouped_share(hits, range(20)) == pytest.approx(statistics.wilson_interval(17, 20))
    assert statistics.grouped_share([], []) == statistics.wilson_interval(0, 0)


def test_a_grouped_share_counts_copies_as_what_they_are():
    """Each case ten times over is no more evidence than once, and where all agree a group is a case."""
    hits = [True] * 17 + [False] * 3
    once = statistics.wilson_interval(17, 20)
    copied = statistics.grouped_share(np.repeat(hits, 10), np.repeat(np.arange(20), 10))
    assert copied == pytest.approx(once | {"n": 200})
    agreed = statistics.grouped_share([True] * 200, np.repeat(np.arange(20), 10))
    assert agreed == pytest.approx(statistics.wilson_interval(20, 20) | {"n": 200})


def test_the_grouped_interval_holds_the_truth_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        of_group = rng.beta(4, 1, size=40)  # mean 0.8, and cases of a group are much alike
        groups = np.repeat(np.arange(40), 6)
        found = statistics.grouped_share(rng.random(240) < of_group[groups], groups)
        held += found["low"] <= 0.8 <= found["high"]
    assert 0.91 <= held / 400 <= 0.99
