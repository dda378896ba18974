"""Numbers of a judge on gold pairs, against counts by hand and against simulated judges."""

import math
import random

import pytest

from cai_jax import judging, statistics
from cai_jax.constitution import load_constitution
from cai_jax.gold import GoldPair, load_gold

GOLD = load_gold("", load_constitution("harmless_helpful")).pairs
RULES = judging.baselines(GOLD)


def pair(better="a", a="long response", b="short", category="x"):
    return GoldPair(f"{better}{a}{b}", category, "p", ({"role": "user", "content": "Hi"},), a, b, better)


def summary(logits, pairs=GOLD):
    return {"vote": judging.measure(pairs, logits), "baselines": RULES if pairs is GOLD else judging.baselines(pairs)}


def test_counts_by_hand():
    pairs = [pair("a"), pair("b"), pair("a", "s", "longer", "y"), pair("b", "s", "longer", "y"), pair("a")]
    orders = [(2.0, 1.0), (3.0, -1.0), (-4.0, 2.0), None, (1.0, -1.0)]
    found = judging.measure(pairs, [1.5, 1.0, -1.0, None, 0.0], orders)
    share = {name: (of["value"], of["n"]) for name, of in found.items() if isinstance(of, dict) and "n" in of}
    assert (found["n"], found["opinions"], found["ties"]) == (5, 4, 1)
    assert share["accuracy"] == (1 / 5, 5) and share["decided_accuracy"] == (1 / 3, 3)
    assert share["first_order_accuracy"] == (2 / 5, 5)
    assert share["same_position"] == (3 / 4, 4), "the second, the third and the last pair"
    assert share["first_position"] == (5 / 8, 8)
    assert share["chose_longer"] == (3 / 3, 3)
    assert share["accuracy_better_longer"] == (1 / 3, 3) and share["accuracy_better_shorter"] == (0, 2)
    assert {name: (of["value"], of["n"]) for name, of in found["categories"].items()} == {"x": (1 / 3, 3), "y": (0, 2)}
    assert judging.measure(pairs, [None] * 5)["decided_accuracy"]["value"] is None


def test_rules_toss_a_coin_where_they_have_no_side():
    pairs = [pair("a", "I can't help with that.", "Sure, here is how."), pair("b", "same", "size")]
    assert judging.baselines(pairs) == {"longer_wins": 0.75, "shorter_wins": 0.25, "refusal_wins": 0.75}


@pytest.mark.parametrize("true", [0.5, 1.0, 4.0])
def test_the_temperature_of_a_judge_that_is_too_sure_is_found_and_mends_its_error(true):
    draw = random.Random(0)
    pairs, logits = [], []
    for _ in range(4000):
        honest = draw.gauss(0, 1.5)
        pairs.append(pair("a" if draw.random() < 1 / (1 + math.exp(-honest)) else "b"))
        logits.append(honest * true)
    assert judging.fit_temperature(pairs, logits) == pytest.approx(true, rel=0.1)
    unseen = judging.cross_fitted(pairs, logits)
    after = judging.calibration_error(pairs, [x / t for x, t in zip(logits, unseen, strict=True)])
    assert after < 0.02 and (true == 1 or judging.calibration_error(pairs, logits) > 2 * after)


def test_the_fit_is_the_likeliest_of_a_fine_grid():
    draw = random.Random(1)
    pairs = [pair(draw.choice("ab")) for _ in range(30)]
    favours = [draw.gauss(0.5, 2) for _ in pairs]
    logits = [x if p.better == "a" else -x for x, p in zip(favours, pairs, strict=True)]

    def loss(temperature):
        soft = [math.log1p(math.exp(-x / temperature)) for x in favours]
        hard = [math.log1p(math.exp(x / temperature)) for x in favours]
        return sum(31 / 32 * a + 1 / 32 * b for a, b in zip(soft, hard, strict=True))

    best = min((0.05 * 1.01**n for n in range(760)), key=loss)
    assert judging.fit_temperature(pairs, logits) == pytest.approx(best, rel=0.01)


def test_a_temperature_that_does_not_help_unseen_pairs_is_not_taken():
    draw, kept = random.Random(5), 0
    for _ in range(60):
        pairs = [pair(draw.choice("ab")) for _ in range(24)]
        fitted, unseen = judging.temperatures(pairs, [draw.gauss(0, 0.2) for _ in pairs])
        kept += fitted < 0.5
        assert (fitted == 1) == (set(unseen) == {1.0})
    raw = sum(judging.fit_temperature(pairs, [draw.gauss(0, 0.2) for _ in pairs]) < 0.5 for _ in range(60))
    assert kept <= 6 < raw, "a judge that knows nothing is not made surer, as the fit alone would"
    pairs = [pair(draw.choice("ab")) for _ in range(100)]
    sure = [9.0 * (1 if draw.random() < 0.7 else -1) * (1 if p.better == "a" else -1) for p in pairs]
    fitted, unseen = judging.temperatures(pairs, sure)
    assert fitted == judging.fit_temperature(pairs, sure) > 5 and unseen == judging.cross_fitted(pairs, sure)


def test_the_fit_has_bounds():
    pairs = [pair("a")] * 10
    assert judging.fit_temperature(pairs, [None] * 10) == 1
    assert judging.fit_temperature(pairs, [-1.0] * 10) == judging.HOTTEST
    assert judging.fit_temperature(pairs, [0.0] * 10) == judging.HOTTEST
    assert judging.fit_temperature(pairs, [1e-6] * 10) == judging.COLDEST
    assert judging.fit_temperature(pairs, [5.0] * 10) == pytest.approx(5 / math.log(11)), "all right, and yet finite"


def test_a_fold_does_not_see_its_own_pairs():
    pairs = [pair("a")] * 10
    logits = [3.0] * 10
    logits[0] = logits[5] = -3.0  # one fold
    seen = judging.cross_fitted(pairs, logits)
    assert seen[0] == seen[5] == pytest.approx(3 / math.log(9)) and seen[1] > seen[0]


def passed(logits, minimum=0.5):
    return judging.passes(summary(logits), minimum)


def test_a_random_labeler_passes_at_the_stated_rate():
    """The chance to pass by luck is the binomial tail beyond the interval: 2.6% for the shipped set."""
    tail = sum(
        math.comb(96, k) / 2**96 for k in range(97) if statistics.wilson_interval(k, 96)["low"] > 0.5
    )
    assert tail == pytest.approx(0.026, abs=0.001)
    draw, seeds = random.Random(2), 600
    passes = sum(passed([draw.gauss(0, 3) for _ in GOLD]) for _ in range(seeds))
    assert abs(passes - tail * seeds) < 4 * math.sqrt(tail * seeds), passes


@pytest.mark.parametrize("pairs", [12, 24, 50, 96, 200, 400])
def test_the_rate_holds_for_any_size(pairs):
    tail = sum(math.comb(pairs, k) / 2**pairs for k in range(pairs + 1)
               if statistics.wilson_interval(k, pairs)["low"] > 0.5)  # fmt: skip
    assert tail < 0.04


def test_labelers_of_position_or_length_alone_never_pass():
    draw = random.Random(3)
    for sign in (1, -1):
        for strength in (0.1, 5.0):
            gaps = [len(p.response_a) - len(p.response_b) for p in GOLD]
            assert not passed([sign * strength * gap for gap in gaps]), "length"
            assert not passed([sign * strength] * len(GOLD)), "the first place, shown once"
            orders = [(sign * strength, -sign * strength)] * len(GOLD)
            assert not passed([sum(both) / 2 for both in orders]), "the same place in both orders is a tie"
    noisy = sum(passed([gap + draw.gauss(0, 50) for gap in gaps]) for _ in range(300))
    assert noisy <= 300 * 0.026 + 4 * math.sqrt(300 * 0.026)


def test_a_rule_of_length_is_no_way_through_an_unbalanced_gold_set():
    unbalanced = [p for p in GOLD if len(p.sides[0]) > len(p.sides[1])] + [GOLD[0]]
    by_length = [float(len(p.response_a) - len(p.response_b)) for p in unbalanced]
    found = summary(by_length, unbalanced)
    assert found["vote"]["accuracy"]["low"] > 0.9 and not judging.passes(found, 0.5)
    right = [1.0 if p.better == "a" else -1.0 for p in GOLD]
    assert passed(right) and passed(right, 0.95) and not passed(right, 0.99)


def test_a_labeler_without_opinions_does_not_pass():
    assert not passed([None] * len(GOLD)) and not passed([0.0] * len(GOLD))


def test_words_for_what_an_accuracy_shows():
    def words(right):
        return judging.worth({"accuracy": statistics.wilson_interval(right, 96)}, RULES)

    assert RULES["refusal_wins"] == pytest.approx(65 / 96)
    assert words(30) == "below chance" and words(50) == "not shown to be above chance"
    assert words(65) == "above chance, not shown to be above “refusal wins”"
    assert words(90) == "above chance and above every simple rule"


def test_the_effect_of_a_plea_is_counted_towards_the_side_that_pleads():
    found = judging.plea_effect([1.0, -1.0, 2.0, None], [-1.0, 1.0, 3.0, 1.0], [False, True, False, True])
    assert found["shift"]["value"] == pytest.approx((2 + 2 - 1) / 3) and found["shift"]["n"] == 3
    assert (found["flipped"]["value"], found["flipped"]["n"]) == (2 / 3, 3)
    assert judging.plea_effect([1.0], [2.0], [True])["flipped"]["n"] == 0, "the verdict was for it already"
