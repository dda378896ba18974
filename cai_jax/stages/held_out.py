"""What a reward model is worth on pairs that it was not trained on, beside rules that know nothing of what is said."""

import numpy as np

from cai_jax import statistics
from cai_jax.filters import TIE

RULES = ("shorter_wins", "longer_wins", "refusal_wins", "coin")


def held_out_metrics(pairs, seed: int = 0) -> dict:
    """Accuracy as a whole, by principle and by category; rules beside it; calibration, length, uncertainty.

    A pair counts as right when the response with the higher score is the one with probability above 1/2; a label within
    TIE of 1/2 decides nothing: such pairs are counted as `ties` and left out of every accuracy.

    Args:
      pairs: dicts with `prompt_id`, `category`, `principles`; `tokens`: prompt and both responses; `refusals`: whether
        each response is one; `probability` that the first is better; `scores` `[2]`, or `[2, K]` of several heads.
      seed: of the bootstrap.
    """
    scores = np.stack([np.reshape(pair["scores"], (2, -1)) for pair in pairs])  # [pairs, 2, K]
    gaps = scores[:, 0] - scores[:, 1]
    predicted = 1 / (1 + np.exp(-gaps.mean(axis=1)))
    observed = np.asarray([pair["probability"] for pair in pairs])
    decided = np.abs(observed - 0.5) >= TIE
    right = ((gaps.mean(axis=1) > 0) == (observed > 0.5))[decided]
    error, bins = statistics.calibration(predicted, observed)
    judged = [pair for pair, counts in zip(pairs, decided, strict=True) if counts]
    lengths = [len(response) for pair in pairs for response in pair["tokens"][1:]]
    return {
        "n": len(pairs),
        "ties": int((~decided).sum()),
        "accuracy": _share(right, judged),
        "calibration_error": error,
        "calibration_bins": bins,
        "length_correlation": statistics.correlation(lengths, scores.mean(axis=2).ravel()),
        **_rules(judged, right, observed[decided] > 0.5, seed),
        "principles": _by([pair["principles"] for pair in judged], right, judged),
        "categories": _by([[pair["category"]] for pair in judged], right, judged),
        **_uncertainty(gaps, right, decided),
    }


def _rules(pairs, right, first_better, seed: int) -> dict:
    """How often each rule agrees with the label where it says something, and what the reward model has over the best.

    For that comparison a rule that says nothing of a pair tosses a coin: it is half right there.
    """
    longer = np.asarray([np.sign(len(pair["tokens"][1]) - len(pair["tokens"][2])) for pair in pairs])
    refuses = np.asarray([int(pair["refusals"][0]) - int(pair["refusals"][1]) for pair in pairs])
    says = dict(zip(RULES, (-longer, longer, refuses, np.zeros(len(pairs))), strict=True))
    outcomes = {name: np.where(said == 0, 0.5, (said > 0) == first_better) for name, said in says.items()}
    best = max(RULES, key=lambda name: outcomes[name].sum())
    groups = [pair["prompt_id"] for pair in pairs]
    gain = statistics.paired_gain(right - outcomes[best], groups, seed)
    spoken = {}
    for name in ("shorter_wins", "longer_wins", "refusal_wins"):
        said = says[name] != 0
        spoken[f"{name}_accuracy"] = _share(outcomes[name][said] > 0.5, _where(said, pairs))
    return {
        **spoken,
        "best_rule": {"rule": best, "accuracy": float(outcomes[best].mean()) if len(pairs) else None},
        "gain_over_best_rule": gain,
        "beats_best_rule": statistics.wins(gain),
    }


def _uncertainty(gaps, right, decided) -> dict:
    """The heads' deviation of a pair's gap: its mean, and whether it is larger where the model is wrong.

    None and without an area where there is one head: it is always of its own opinion.
    """
    several = gaps.shape[1] > 1
    deviation = gaps.std(axis=1)
    wrong, correct = deviation[decided][~right], deviation[decided][right]
    return {
        "uncertainty": float(deviation.mean()) if several else None,
        "uncertainty_auroc": statistics.auroc(wrong, correct) if several else statistics.auroc([], []),
    }


def _by(names, right, pairs) -> dict:
    """Accuracy over the pairs under each name; a pair counts under each of its names."""
    under = {name: np.asarray([name in own for own in names]) for name in sorted({n for own in names for n in own})}
    return {name: _share(right[held], _where(held, pairs)) for name, held in under.items()}


def _where(held, pairs) -> list[dict]:
    return [pair for pair, yes in zip(pairs, held, strict=True) if yes]


def _share(right, pairs) -> dict:
    """The share of pairs that are right; those of a prompt are not independent."""
    return statistics.grouped_share(right, [pair["prompt_id"] for pair in pairs])
