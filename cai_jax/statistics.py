"""Estimates with their uncertainty: 95% intervals for shares, means and separation, and calibration.

An interval is {"value", "low", "high", "n"}; what cannot be known from the data at hand is None. Missing entries
(None or NaN) are left out, and n counts what remains.
"""

import math

import numpy as np

Z = 1.959963984540054  # 97.5% quantile of the normal distribution


def wilson_interval(successes: int, n: int) -> dict:
    """Share of successes with Wilson's score interval, which stays within 0..1 and never collapses (Wilson 1927)."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n} trials")
    if n == 0:
        return _interval(None, None, None, 0)
    share = successes / n
    return _interval(share, *_wilson_bounds(share, n), n)


def _wilson_bounds(share: float, n: float) -> tuple[float, float]:
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def grouped_share(hits, groups) -> dict:
    """Share of cases that hit, with Wilson's interval for as many independent cases as they are worth.

    Cases of one group (pairs of a prompt share responses) say less than as many independent ones. Their number is
    divided by the design effect, the variance of the share between groups over that of independent cases (Kish 1965;
    Korn and Graubard 1998); where all cases agree that is unknown, and a group counts as one case.

    Args:
      hits: whether each case hit. groups: to which group each case belongs.
    """
    hits = np.asarray(hits, float)
    n, (names, group_of) = len(hits), np.unique([str(group) for group in groups], return_inverse=True)
    if len(names) == n:
        return wilson_interval(int(hits.sum()), n)
    share = float(hits.mean())
    binomial = share * (1 - share) / n
    between = float(np.sum(np.bincount(group_of, hits - share) ** 2)) / n**2
    worth = n / max(1.0, between / binomial) if binomial else float(len(names))
    return _interval(share, *_wilson_bounds(share, worth), n)


def mean_interval(values) -> dict:
    """Mean with Student's t interval; one value alone has a mean and no bounds."""
    values = _present(values)
    n = len(values)
    if n == 0:
        return _interval(None, None, None, 0)
    mean = float(values.mean())
    if n == 1:
        return _interval(mean, None, None, 1)
    half = _t_quantile(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return _interval(mean, mean - half, mean + half, n)


def paired_gain(gains, groups, seed: int = 0, resamples: int = 2000) -> dict:
    """Mean of paired differences with a bootstrap interval over groups, and the p value of a sign test over them.

    Differences of one group (the pairs of a prompt) are drawn together, for they are no independent evidence. The
    percentile interval of few groups is too narrow, and has no width where they all agree; the exact two-sided sign
    test of the groups' sums is sound for any number, so `wins` wants both.

    Args:
      gains: differences, one a case: 1 where ours alone is right, -1 where the other's is, 0 where they agree.
      groups: the group of each case.

    Returns:
      {"value", "low", "high", "n", "p_value"}, None without data. The same seed draws the same samples.
    """
    gains, groups = np.asarray(gains, np.float64), np.asarray(groups)
    if len(gains) == 0:
        return _interval(None, None, None, 0) | {"p_value": None}
    names, which = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(which, gains), np.bincount(which)
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    more, decided = int((sums > 0).sum()), int((sums != 0).sum())
    tail = sum(math.comb(decided, k) for k in range(min(more, decided - more) + 1)) / 2**decided
    return _interval(float(gains.mean()), float(low), float(high), len(gains)) | {"p_value": min(1.0, 2 * tail)}


def wins(gain: dict) -> bool:
    """Whether a `paired_gain` is shown to be above 0: by its interval and by the sign test, each at 5%."""
    return gain["low"] is not None and gain["low"] > 0 and gain["p_value"] < 0.05


def auroc(scores_positive, scores_negative) -> dict:
    """Chance that a positive scores above a negative, ties counting half; n is the number of scores.

    The bounds are those areas whose distance to the estimate is 1.96 of their own standard errors, with the
    standard error of Hanley and McNeil 1982, so that perfect separation of a few scores is not taken for certain
    (Newcombe 2006, Statistics in Medicine 25:559, proposes the same inversion). None without both classes.
    """
    positive, negative = _present(scores_positive), np.sort(_present(scores_negative))
    n = len(positive) + len(negative)
    if not len(positive) or not len(negative):
        return _interval(None, None, None, n)
    below = np.searchsorted(negative, positive, side="left").sum()
    not_above = np.searchsorted(negative, positive, side="right").sum()
    area = float(below + not_above) / 2 / (len(positive) * len(negative))
    low = _area_bound(area, 0.0, len(positive), len(negative))
    high = _area_bound(area, 1.0, len(positive), len(negative))
    return _interval(area, low, high, n)


def calibration(predicted_p, observed_p, bins: int = 10) -> tuple[float | None, list[dict]]:
    """Expected calibration error over equal bins of the prediction, and the bins themselves.

    Args:
      predicted_p: probabilities that a model gives, 0..1.
      observed_p: what happened, 0 or 1, or a probability where the target itself is soft.
      bins: how many; the last one holds 1.0.

    Returns:
      The error, sum over bins of n / N |mean predicted - mean observed| (None without data), and for each bin
      {"low", "high", "n", "predicted", "observed"}, the means None where the bin is empty.
    """
    predicted_p, observed_p = _present_pairs(predicted_p, observed_p)
    if np.any((predicted_p < 0) | (predicted_p > 1)):
        raise ValueError("predicted probabilities must lie in 0..1")
    edges = np.arange(bins + 1) / bins
    which = np.clip(np.searchsorted(edges, predicted_p, side="right") - 1, 0, bins - 1)
    table, error = [], 0.0
    for index in range(bins):
        inside = which == index
        n = int(inside.sum())
        predicted = float(predicted_p[inside].mean()) if n else None
        observed = float(observed_p[inside].mean()) if n else None
        if n:
            error += n / len(predicted_p) * abs(predicted - observed)
        low, high = float(edges[index]), float(edges[index + 1])
        table.append({"low": low, "high": high, "n": n, "predicted": predicted, "observed": observed})
    return (error if len(predicted_p) else None), table


def correlation(x, y) -> float | None:
    """Pearson's correlation over the pairs that are there; None for fewer than two, or where x or y is constant."""
    x, y = _present_pairs(x, y)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1, 1))


def _interval(value, low, high, n) -> dict:
    return {"value": value, "low": low, "high": high, "n": int(n)}


def _array(values) -> np.ndarray:
    if not isinstance(values, np.ndarray):
        values = list(values)
    return np.array(values, dtype=np.float64).reshape(-1)  # None becomes NaN


def _present(values) -> np.ndarray:
    values = _array(values)
    return values[~np.isnan(values)]


def _present_pairs(x, y) -> tuple[np.ndarray, np.ndarray]:
    x, y = _array(x), _array(y)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values cannot be paired with {len(y)}")
    present = ~(np.isnan(x) | np.isnan(y))
    return x[present], y[present]


def _t_quantile(freedom: int) -> float:
    """97.5% quantile of Student's t: exact for 1 and 2 degrees of freedom, else the expansion in 1 / freedom of
    Abramowitz and Stegun 26.7.5, off by less than 0.005 at 3 and by less than 0.001 from 4 on."""
    if freedom <= 2:
        return {1: 12.706204736432095, 2: 4.302652729911275}[freedom]
    terms = (
        Z,
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def _area_bound(area: float, end: float, positives: int, negatives: int) -> float:
    """The area between the estimate and an end (0 or 1) that lies 1.96 of its own standard errors away."""

    def too_far(candidate):
        spread = 1 + (positives - 1) * (1 - candidate) / (2 - candidate) + (negatives - 1) * candidate / (1 + candidate)
        variance = candidate * (1 - candidate) / (positives * negatives) * spread
        return (candidate - area) ** 2 > Z**2 * variance

    near, far = area, end
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (near, middle) if too_far(middle) else (middle, far)
    return near
