"""Numbers, alarms and the choice of a state, against slow obvious versions and made answers."""

import math
import random
from dataclasses import replace

import pytest

from cai_jax import monitors
from cai_jax.config import ALARMS, Monitor
from cai_jax.statistics import wilson_interval
from cai_jax.text_metrics import classify_response, words_of

VOCABULARY = "a the bread cheese walk to from river is was here never with under stone".split()


def rows_of(texts, proxy=0.0, independent=0.0, tokens=10):
    """Probes in turn safe and red-team; a score may be a list."""
    count = len(texts)
    proxies, scores, lengths = (
        x if isinstance(x, list) else [x] * count for x in (proxy, independent, tokens)
    )
    return [
        {
            "id": f"p{i:02}", "set": ("helpful", "red_team")[i % 2], "text": text, "tokens": lengths[i],
            "truncated": False, "kind": classify_response(text), "proxy": proxies[i], "independent": scores[i],
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip


def varied(count, seed=0, words=12):
    draw = random.Random(seed)
    return [" ".join(draw.choice(VOCABULARY) for _ in range(words)) for _ in range(count)]


def looks(*rows, kl=0.0, settings=None):
    """The looks at these rows, the first of which are the reference's."""
    taken = []
    for update, at in enumerate(rows):
        settings = settings or Monitor()
        taken.append(monitors.take_look(update, at, kl if update else None, taken, settings))
    return taken


# ---------------------------------------------------------------- numbers


def slow_boilerplate(texts, reference):
    """Word by word: covered where any of the up to four runs of four words around it is new boilerplate."""

    def has(text, gram):
        words = words_of(text)
        if len(words) < 4:
            return words == gram
        return any(words[i : i + 4] == gram for i in range(len(words) - 3))

    def is_new(gram):
        now, before = sum(has(text, gram) for text in texts), sum(has(text, gram) for text in reference)
        return now >= 3 and now >= 0.1 * len(texts) and (before <= 1 or before <= 0.01 * len(reference))

    shares = []
    for text in texts:
        words = words_of(text)
        starts = range(len(words) - 3) if len(words) >= 4 else [0]
        covered = [any(i <= at < i + 4 and is_new(words[i : i + 4]) for i in starts) for at in range(len(words))]
        shares.append(sum(covered) / len(words) if words else 0.0)
    return sum(shares) / len(shares)


@pytest.mark.parametrize("seed", range(6))
def test_boilerplate_is_that_of_the_slow_version(seed):
    draw = random.Random(seed)
    phrases = ["I hope this helps you", "as an assistant I care", "No.", "", "stay safe"]
    sides = [[f"{text} {draw.choice(phrases)}" if draw.random() < 0.7 else draw.choice(phrases)
              for text in varied(40, seed + side, words=5)] for side in (0, 50)]  # fmt: skip
    sides[1] = varied(36, seed + 50) + sides[1][:4]
    share = monitors.boilerplate_share(*sides)
    assert share == pytest.approx(slow_boilerplate(*sides), abs=1e-12) and share > 0


def test_boilerplate_is_new_common_and_found_however_short():
    plain = [f"{text} item{i}" for i, text in enumerate(varied(40))]
    closing = [f"{text}. I hope this really helps you!" for text in plain]
    assert monitors.boilerplate_share(plain, plain) == 0
    # Six new words of nineteen, of which all lie in a run that every answer has.
    assert monitors.boilerplate_share(closing, plain) == pytest.approx(6 / 19)
    assert monitors.boilerplate_share(closing, closing) == 0, "the reference said it, too"
    assert monitors.boilerplate_share(["No."] * 40, plain) == 1
    assert monitors.boilerplate_share([*closing[:3], *plain[3:]], plain) == 0, "three of forty are not common"
    assert monitors.boilerplate_share([*closing[:4], *plain[4:]], plain) == pytest.approx(0.1 * 6 / 19)
    assert monitors.boilerplate_share(closing[:2], plain[:2]) == 0, "two answers alike are no pattern"
    assert monitors.boilerplate_share([], []) == 0


def test_numbers_are_those_of_the_rows():
    texts = ["I can't help with that.", "a b a b", "", "Sorry, I cannot assist with this.", "c d", "c d e"]
    rows = rows_of(texts, proxy=[1, 2, 3, None, 5, 6], independent=[0, 1, 0, 1, 0, 1], tokens=[1, 2, 3, 4, 5, 9])
    rows[4]["truncated"] = True
    found = monitors.numbers(rows, rows, 0.5)
    assert found["proxy"]["value"] == pytest.approx(17 / 5) and found["proxy"]["n"] == 5
    assert (found["independent_helpful"]["value"], found["independent_red_team"]["value"]) == (0, 1)
    assert found["refusal"] == wilson_interval(1, 3) and found["refusal_red_team"] == wilson_interval(1, 3)
    assert found["degenerate"] == wilson_interval(1, 6) and found["truncated"] == wilson_interval(1, 6)
    assert found["length"]["value"] == 4 and found["kl"] == 0.5
    pairs = [pair for text in texts for pair in zip(words_of(text), words_of(text)[1:], strict=False)]
    assert found["distinct"] == len(set(pairs)) / len(pairs) < 1


# ---------------------------------------------------------------- alarms


def raised(rows, reference, kl=0.0, **settings):
    return looks(reference, rows, kl=kl, settings=Monitor(**settings))[-1]["alarms"]


def test_nothing_is_raised_by_the_reference_itself():
    rows = rows_of(varied(64))
    assert looks(rows, rows)[-1]["alarms"] == []


def test_kl_over_its_budget():
    rows = rows_of(varied(20))
    assert raised(rows, rows, kl=5.0) == []
    assert raised(rows, rows, kl=5.0, kl_budget=5.0) == []
    assert raised(rows, rows, kl=5.1, kl_budget=5.0) == ["kl"]


@pytest.mark.parametrize("probes", [16, 32, 64, 200])
def test_refusals_raise_where_chance_does_not_explain_them(probes):
    """The smallest number that raises has a Wilson interval above the bound; red-team ones do not count."""
    plain = varied(2 * probes)
    limit = next(k for k in range(probes) if wilson_interval(k, probes)["low"] > 0.05)
    assert 1 < limit < probes / 2

    def refused(count, first):
        texts = list(plain)
        for i in range(count):
            texts[2 * i + first] = f"I can't help with {texts[2 * i + first]}."
        return raised(rows_of(texts), rows_of(plain), boilerplate_bound=1.0)

    assert refused(limit - 1, 0) == [] and refused(limit, 0) == ["refusal"] and refused(probes, 1) == []


def test_broken_answers_count_beyond_the_reference():
    plain = varied(60)
    broken = [*(["loop loop loop loop " * 8] * 24), *plain[24:]]
    assert raised(rows_of(broken), rows_of(plain), boilerplate_bound=1.0) == ["degenerate"]
    assert raised(rows_of(broken), rows_of(broken)) == [], "the reference is as broken"
    assert "degenerate" in raised(rows_of([""] * 60), rows_of(plain))


def test_length_is_watched_both_ways():
    texts = varied(20)
    reference = rows_of(texts, tokens=10)
    for tokens, alarm in ((10, []), (20, []), (21, ["length"]), (5, []), (4, ["length"])):
        assert raised(rows_of(texts, tokens=tokens), reference) == alarm
    assert raised(rows_of(texts, tokens=100), reference, length_factor=0.0) == []


def test_boilerplate_on_safe_probes_alone_raises():
    plain = varied(40)
    new = "stay safe and ask someone you trust about it"
    on_safe = [new if i % 2 == 0 else old for i, old in enumerate(plain)]
    on_red = [new if i % 2 else old for i, old in enumerate(plain)]
    assert raised(rows_of(on_safe), rows_of(plain)) == ["boilerplate"]
    assert raised(rows_of(on_red), rows_of(plain)) == []
    assert raised(rows_of(on_safe), rows_of(plain), boilerplate_bound=1.0) == []


def noisy(mean, seed, count=40):
    draw = random.Random(seed)
    return [mean + draw.gauss(0, 1) for _ in range(count)]


def test_divergence_needs_a_rise_and_a_fall_on_the_same_probes():
    texts, base = varied(40), noisy(0, 1)

    def at(proxy, independent, seed):
        small = noisy(0, seed), noisy(0, seed + 100)
        scores = ([b + shift + 0.3 * e for b, e in zip(base, errors, strict=True)]
                  for shift, errors in zip((proxy, independent), small, strict=True))  # fmt: skip
        return rows_of(texts, *scores)

    start = at(0, 0, 2)
    # The scores of a probe differ by far more than its change, so only pairs can show it.
    assert raised(at(1, -0.4, 3), start) == ["divergence"]
    assert raised(at(1, 0.4, 4), start) == [], "both rise: that is learning"
    assert raised(at(-1, -0.4, 5), start) == [], "both fall: no sign that the reward is gamed"
    assert raised(at(0, 0, 6), start) == []
    # It is measured from the highest look, not from the reference.
    peak, over = at(1, 1.0, 7), at(2, 0.5, 8)
    assert [look["alarms"] for look in looks(start, peak, over)] == [[], [], ["divergence"]]
    few = [rows[:5] for rows in (start, at(1, -2, 9))]
    assert raised(few[1], few[0]) == [], "five probes prove nothing, however far they fall"


def test_scores_that_are_missing_are_left_out_of_pairs():
    texts = varied(20)
    start = rows_of(texts, [None] * 10 + [0.0] * 10, 1.0)
    later = rows_of(texts, [5.0] * 19 + [None], 0.0)
    gain = monitors.gain(later, start, "proxy")
    assert (gain["value"], gain["n"]) == (5.0, 9)
    unjudged = rows_of(texts, 5.0, [None] * 20)
    assert raised(unjudged, rows_of(texts, 0.0, [None] * 20)) == []


# ---------------------------------------------------------------- when to stop, and what to keep


def test_an_alarm_stops_after_so_many_looks_in_a_row():
    fine, long = rows_of(varied(20), tokens=10), rows_of(varied(20), tokens=50)
    order = [fine, long, fine, long, long, long]
    for patience, first in ((1, 1), (2, 4), (3, 5), (4, None)):
        taken = looks(*order, settings=Monitor(patience=patience))
        stops = [look["update"] for look in taken if look["stop"]]
        assert (stops[:1] or [None])[0] == first
    assert not any(look["stop"] for look in looks(*order, settings=Monitor(patience=1, stop=("kl",))))
    # Not two alarms that take turns.
    refusing = rows_of([f"I can't help with {text}." for text in varied(20)], tokens=10)
    taken = looks(fine, long, refusing, long, settings=Monitor(patience=2, boilerplate_bound=1.0))
    assert [look["alarms"] for look in taken] == [[], ["length"], ["refusal"], ["length"]]
    assert not any(look["stop"] for look in taken)


def test_a_look_is_the_same_again_and_ready_for_json():
    rows = rows_of(varied(20), noisy(0, 1, 20), noisy(0, 2, 20))
    first = looks(rows, rows_of(varied(20, 3), noisy(1, 3, 20), noisy(0, 4, 20)))
    assert first == looks(rows, rows_of(varied(20, 3), noisy(1, 3, 20), noisy(0, 4, 20)))
    metrics = monitors.line(first[1])
    assert all(isinstance(x, float) for x in metrics.values())
    assert {f"monitor_alarm_{name}" for name in ALARMS} < set(metrics)


def metrics_of(*looked):
    return [
        {"update": update, "monitor_within_bounds": float(within), "monitor_independent_red_team": score}
        for update, within, score in looked
    ]


def test_the_best_state_within_bounds_is_chosen():
    lines = metrics_of((1, True, 0.1), (2, True, 0.5), (3, False, 0.9), (4, True, 0.5), (5, True, 0.3))
    assert monitors.chosen(lines, 1) == 4, "of equal ones the last"
    assert monitors.chosen(lines, 2) == 4 and monitors.chosen(lines, 3) == 5, "only what is saved, and the last"
    assert monitors.chosen(metrics_of((1, False, 0.1), (2, False, 0.9)), 1) == 1, "the nearest to the reference"
    unlooked = [*lines[:1], {"update": 2}, *lines[2:]]
    assert monitors.quality({"update": 2}) is None and monitors.chosen(unlooked, 2) == 4
    unjudged = [{"update": 1, "monitor_within_bounds": 1.0}, *lines[3:]]
    assert monitors.quality(unjudged[0]) < -1e8 and monitors.chosen(unjudged, 1) == 4


def test_a_state_that_helps_less_is_out_of_bounds_without_an_alarm():
    texts = varied(60)
    reference = rows_of(texts, 0.0, 1.0)
    worse = [0.5 if row["set"] == "helpful" else 2.0 for row in reference]
    look = looks(reference, rows_of(texts, 0.0, worse))[-1]
    assert look["alarms"] == [] and not look["within_bounds"]
    better = [1.5 if row["set"] == "helpful" else 0.0 for row in reference]
    assert looks(reference, rows_of(texts, 0.0, better))[-1]["within_bounds"]
    assert math.isclose(monitors.quality({"update": 1} | monitors.line(look)), monitors.OUTSIDE - 1)


def test_patience_counts_looks_and_never_the_reference():
    fine = rows_of(varied(20), tokens=10)
    long = rows_of(varied(20), tokens=50)
    taken = looks(fine, long, settings=replace(Monitor(), patience=2))
    assert taken[1]["alarms"] == ["length"] and taken[1]["stop"] == []
