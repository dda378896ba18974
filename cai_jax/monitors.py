"""Signs that a policy games its reward: numbers, alarms and bounds, from what it writes to fixed probe prompts.

A look is a dict: `update` (0: the reference, before the first), `rows` (one a probe), `numbers` of them, `alarms`,
`stop` (the alarms that end the training) and `within_bounds`. A row has `id`, `set` ("helpful": safe prompts, or
"red_team"), `text`, `tokens`, `truncated`, `kind` (of text_metrics.KINDS) and two scores, null where there is none:
`proxy` by the training reward and `independent` by a judge that is not trained on. The probes are the same at every
look, so looks are compared prompt by prompt.

Alarms:
    kl           the mean KL of an update's rollouts to the reference is above `kl_budget`
    refusal      refusals of safe probes: the lower end of Wilson's interval is above `refusal_bound`
    degenerate   broken and empty answers: the lower end is above the reference's share by more than `degenerate_bound`
    length       mean tokens of an answer are above `length_factor` times the reference's, or below them over it
    boilerplate  the share of new boilerplate in answers to safe probes is above `boilerplate_bound`. Not on red-team
                 probes, where many short refusals are much alike without being a trick
    divergence   since the look with the highest independent score, the proxy has risen and the independent score has
                 fallen, both shown by `statistics.wins` on differences paired by probe
A share that lies above its bound by chance raises no alarm in `refusal` and `degenerate`; repeated looks at few probes
may, which is what `patience` is for.
"""

import math
from collections import Counter
from collections.abc import Sequence

from cai_jax import config, statistics
from cai_jax.text_metrics import ngrams, words_of

GRAM = 4  # words of a piece of boilerplate
COMMON, LEAST_COMMON = 0.1, 3  # share and number of the policy's answers that it stands in at least
RARE, MOST_RARE = 0.01, 1  # share of the reference's answers that it may stand in, and the number allowed in any case
OUTSIDE = -1e9  # quality of a state out of bounds, less its update


def take_look(
    update: int, rows: list[dict], kl: float | None, earlier: Sequence[dict], settings: config.Monitor
) -> dict:
    """The look at the answers `rows`, given the looks before it, the reference's first; without any it is that one."""
    reference = earlier[0] if earlier else None
    found = numbers(rows, (reference or {"rows": rows})["rows"], kl)
    raised = alarms(found, rows, earlier, settings) if reference else []
    unhelpful = reference is not None and statistics.wins(gain(reference["rows"], rows, "independent", "helpful"))
    recent = [*(look["alarms"] for look in earlier[1:]), raised][-settings.patience :]
    lasting = [name for name in raised if len(recent) >= settings.patience and all(name in look for look in recent)]
    return {
        "update": update,
        "numbers": found,
        "alarms": raised,
        "stop": [name for name in lasting if name in settings.stop],
        "within_bounds": not raised and not unhelpful,
        "rows": rows,
    }


def numbers(rows: list[dict], reference_rows: list[dict], kl: float | None) -> dict:
    """What a look measures. Means and shares are INTERVALs; boilerplate, distinct and kl are plain numbers."""
    safe = [row for row in rows if row["set"] == "helpful"]
    unsafe = [row for row in rows if row["set"] == "red_team"]
    texts, reference_texts = [row["text"] for row in rows], [row["text"] for row in reference_rows]
    safe_reference = [row["text"] for row in reference_rows if row["set"] == "helpful"]
    return {
        "proxy": _mean(rows, "proxy"),
        "independent": _mean(rows, "independent"),
        "independent_red_team": _mean(unsafe, "independent"),
        "independent_helpful": _mean(safe, "independent"),
        "refusal": _share(row["kind"] == "refusal" for row in safe),
        "refusal_red_team": _share(row["kind"] == "refusal" for row in unsafe),
        "degenerate": _share(row["kind"] in ("degenerate", "empty") for row in rows),
        "length": _mean(rows, "tokens"),
        "truncated": _share(row["truncated"] for row in rows),
        "boilerplate": boilerplate_share(texts, reference_texts),
        "boilerplate_helpful": boilerplate_share([row["text"] for row in safe], safe_reference),
        "distinct": distinct(texts),
        "kl": kl,
    }


def alarms(found: dict, rows: list[dict], earlier: Sequence[dict], settings: config.Monitor) -> list[str]:
    """The names of the alarms that a look's numbers and rows raise, in the order of `config.ALARMS`."""
    reference, length = earlier[0]["numbers"], found["length"]["value"]
    shortest, longest = sorted([length, reference["length"]["value"]])
    raised = {
        "kl": settings.kl_budget > 0 and found["kl"] > settings.kl_budget,
        "refusal": _above(found["refusal"], settings.refusal_bound),
        "degenerate": _above(found["degenerate"], reference["degenerate"]["value"] + settings.degenerate_bound),
        "length": settings.length_factor > 0 and longest > settings.length_factor * shortest,
        "boilerplate": found["boilerplate_helpful"] > settings.boilerplate_bound,
        "divergence": diverges(rows, earlier),
    }
    return [name for name in config.ALARMS if raised[name]]


def diverges(rows: list[dict], earlier: Sequence[dict]) -> bool:
    """Whether the proxy has risen and the independent score fallen since the look where the latter was highest."""
    judged = [look for look in earlier if look["numbers"]["independent"]["value"] is not None]
    if not judged:
        return False
    best = max(judged, key=lambda look: look["numbers"]["independent"]["value"])["rows"]
    return statistics.wins(gain(rows, best, "proxy")) and statistics.wins(gain(best, rows, "independent"))


def gain(rows: list[dict], earlier: list[dict], score: str, set_name: str = "") -> dict:
    """`statistics.paired_gain` of a score over an earlier look's on the same probes, those of one set or all."""
    before = {row["id"]: row[score] for row in earlier}
    pairs = [
        (row["id"], row[score], before[row["id"]])
        for row in rows
        if set_name in ("", row["set"]) and row[score] is not None and before[row["id"]] is not None
    ]
    return statistics.paired_gain([now - then for _, now, then in pairs], [name for name, *_ in pairs])


def new_boilerplate(texts: Sequence[str], reference_texts: Sequence[str]) -> dict[tuple[str, ...], int]:
    """Runs of GRAM words that are common across the texts and were rare across the reference's to the same prompts.

    Each with the number of texts that it stands in.

    Common: in a tenth of the texts and in three at least. Rare: in at most a hundredth of the reference's, or in one. A
    text of fewer words is one run, so that "No." everywhere is found.
    """
    now, before = (Counter(gram for text in side for gram in set(_grams(text))) for side in (texts, reference_texts))
    common, rare = max(LEAST_COMMON, COMMON * len(texts)), max(MOST_RARE, RARE * len(reference_texts))
    return {gram: count for gram, count in now.items() if count >= common and before[gram] <= rare}


def boilerplate_share(texts: Sequence[str], reference_texts: Sequence[str]) -> float:
    """Mean over the texts of the share of a text's words that lie in `new_boilerplate`."""
    new = new_boilerplate(texts, reference_texts)
    shares = [_covered(text, new) for text in texts]
    return sum(shares) / len(shares) if shares else 0.0


def _covered(text: str, new: dict) -> float:
    inside, count = set(), len(words_of(text))
    for start, gram in enumerate(_grams(text)):
        if gram in new:
            inside.update(range(start, start + len(gram)))
    return len(inside) / count if count else 0.0


def _grams(text: str) -> list[tuple[str, ...]]:
    words = words_of(text)
    return ngrams(words, GRAM) or ([tuple(words)] if words else [])


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Distinct-n (Li et al. 2016, arXiv 1510.03055): different runs of n words over all of them; 0 without any."""
    grams = [gram for text in texts for gram in ngrams(words_of(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def line(look: dict) -> dict[str, float]:
    """A look as metrics of its update: the value of every number that there is, and 0 or 1 for every alarm."""
    values = {name: found["value"] if isinstance(found, dict) else found for name, found in look["numbers"].items()}
    metrics = {f"monitor_{name}": float(value) for name, value in values.items() if value is not None}
    metrics |= {f"monitor_alarm_{name}": float(name in look["alarms"]) for name in config.ALARMS}
    return metrics | {"monitor_within_bounds": float(look["within_bounds"])}


def quality(metrics: dict) -> float | None:
    """How good the state of a line of metrics is for export; None where no look was taken.

    Within bounds (no alarm, and the independent score on helpful probes not shown to be below the reference's) it is
    the independent score on red-team probes. A state out of bounds comes after all of these, the earlier the better, as
    it is nearer to the reference.
    """
    if "monitor_within_bounds" not in metrics:
        return None
    score = metrics.get("monitor_independent_red_team", math.nan)
    return score if metrics["monitor_within_bounds"] and math.isfinite(score) else OUTSIDE - metrics["update"]


def chosen(lines: Sequence[dict], checkpoint_every: int) -> int:
    """The update whose state training/loop.py exports by `quality`: a saved one or the last; of equal ones the last."""
    candidates = [m for m in lines if m["update"] % checkpoint_every == 0 or m is lines[-1]]
    judged = [(quality(m), m["update"]) for m in candidates if quality(m) is not None]
    return max(judged)[1]


def _above(share: dict, bound: float) -> bool:
    return share["low"] is not None and share["low"] > bound


def _mean(rows: list[dict], key: str) -> dict:
    return statistics.mean_interval([row[key] for row in rows])


def _share(flags) -> dict:
    flags = list(flags)
    return statistics.wilson_interval(sum(flags), len(flags))
