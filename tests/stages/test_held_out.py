"""What is said of a reward model on held-out pairs: rules beside it, parts of it, and what its heads know."""

from types import SimpleNamespace

import numpy as np
import pytest

from cai_jax import load_model, reward_heads, statistics
from cai_jax.config import Config, Mesh, Model
from cai_jax.mesh import make_mesh, put_rows
from cai_jax.provenance import row_seed
from cai_jax.report import verdicts
from cai_jax.stages.held_out import held_out_metrics
from cai_jax.stages.reward_model import bootstrap_weights
from cai_jax.stages.scoring import score_heads, score_texts


def pairs_of(n: int, accuracy: float, rule: str = "", per_prompt: int = 1, heads: int = 1, seed: int = 0):
    """Pairs whose labels follow a rule always and whose scores agree with the label at a rate."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        first = bool(rng.integers(2))
        right = rng.random() < accuracy
        gap = (1.0 if first == right else -1.0) * rng.uniform(0.5, 1)
        longer = first if rule == "longer" else bool(rng.integers(2))
        refuses = (first, not first) if rule == "refusal" else (False, False)
        noise = rng.normal(0, 0.05 if right else 1.0, heads)
        pairs.append({
            "prompt_id": f"p{i // per_prompt}", "category": "ab"[i % 2], "principles": ["x", "y"] if i % 3 else ["x"],
            "refusals": refuses, "probability": 0.9 if first else 0.1,
            "tokens": ([1], [2] * (5 if longer else 3), [2] * (3 if longer else 5)),
            "scores": np.stack([gap + noise - noise.mean(), np.zeros(heads)]),
        })  # fmt: skip
    return pairs


@pytest.mark.parametrize("rule", ["longer", "refusal"])
def test_a_model_that_knows_no_more_than_a_rule_is_not_said_to_beat_it(rule):
    found = held_out_metrics(pairs_of(60, accuracy=1.0, rule=rule))
    assert found["best_rule"] == {"rule": f"{rule}_wins", "accuracy": 1.0}
    assert found["gain_over_best_rule"]["value"] == 0 and not found["beats_best_rule"]
    assert "does not beat" in verdicts.reward_model(found)


def test_a_model_that_knows_more_beats_the_rules_and_a_guessing_one_does_not():
    good, guess = (held_out_metrics(pairs_of(80, accuracy)) for accuracy in (0.95, 0.55))
    assert good["beats_best_rule"] and "beats the simple rule" in verdicts.reward_model(good)
    assert not guess["beats_best_rule"]
    assert "not shown to beat" in verdicts.reward_model(guess) or "does not beat" in verdicts.reward_model(guess)


def test_pairs_of_one_prompt_are_one_piece_of_evidence():
    """Sixty pairs of five prompts: five cases, and a sign test of five cases cannot reach 5%."""
    apart, together = (held_out_metrics(pairs_of(60, 1.0, per_prompt=n)) for n in (1, 12))
    assert apart["beats_best_rule"] and not together["beats_best_rule"]
    assert together["gain_over_best_rule"]["p_value"] >= 1 / 16


def test_a_rule_that_is_silent_tosses_a_coin_in_the_comparison_and_is_not_in_its_own_accuracy():
    pairs = pairs_of(8, 1.0)
    for pair in pairs:
        pair["tokens"] = ([1], [2, 2], [3, 3])
    right = int(pairs[0]["probability"] > 0.5)
    pairs[0]["refusals"] = (bool(right), not right)
    found = held_out_metrics(pairs)
    assert found["refusal_wins_accuracy"]["n"] == 1 and found["shorter_wins_accuracy"]["n"] == 0
    assert found["best_rule"] == {"rule": "refusal_wins", "accuracy": (1 + 7 * 0.5) / 8}


def test_accuracy_by_principle_and_category_against_counting():
    pairs = pairs_of(40, 0.7) + [pair | {"probability": 0.5} for pair in pairs_of(3, 1.0)]
    found = held_out_metrics(pairs)
    for key, wanted in (("categories", lambda p, name: p["category"] == name),
                        ("principles", lambda p, name: name in p["principles"])):  # fmt: skip
        for name, share in found[key].items():
            own = [p for p in pairs[:40] if wanted(p, name)]
            right = sum((p["scores"][0, 0] > p["scores"][1, 0]) == (p["probability"] > 0.5) for p in own)
            assert share == statistics.wilson_interval(right, len(own))
    assert set(found["principles"]) == {"x", "y"} and found["principles"]["x"]["n"] == 40
    assert found["ties"] == 3


def test_heads_that_part_where_the_model_errs_have_an_area_above_one_half():
    found = held_out_metrics(pairs_of(60, 0.7, heads=4))
    assert found["uncertainty"] > 0 and found["uncertainty_auroc"]["low"] > 0.5
    alone = held_out_metrics(pairs_of(60, 0.7))
    assert alone["uncertainty"] is None and alone["uncertainty_auroc"]["value"] is None
    same = pairs_of(60, 0.7)
    for pair in same:
        pair["scores"] = np.repeat(pair["scores"], 2, axis=1)
    assert held_out_metrics(same)["uncertainty_auroc"]["value"] == 0.5


def test_ties_alone_leave_nothing_known_and_nothing_claimed():
    pairs = [pair | {"probability": 0.5} for pair in pairs_of(4, 1.0, heads=2)]
    found = held_out_metrics(pairs)
    assert found["accuracy"]["value"] is None and found["gain_over_best_rule"]["value"] is None
    assert not found["beats_best_rule"] and found["principles"] == {} and verdicts.reward_model(found) == ""


# statistics


def test_the_paired_gain_is_seeded_and_finds_a_gain_that_is_there():
    rng = np.random.default_rng(3)
    gains = rng.choice([1, 0, -1], 200, p=[0.3, 0.6, 0.1])
    gain = statistics.paired_gain(gains, np.arange(200), seed=1)
    assert gain == statistics.paired_gain(gains, np.arange(200), seed=1)
    assert gain["value"] == pytest.approx(gains.mean()) and gain["low"] < gain["value"] < gain["high"]
    normal = 1.96 * gains.std() / np.sqrt(200)
    assert gain["high"] - gain["low"] == pytest.approx(2 * normal, rel=0.1)
    more, less = (gains > 0).sum(), (gains < 0).sum()
    from scipy.stats import binomtest

    assert gain["p_value"] == pytest.approx(binomtest(int(more), int(more + less)).pvalue)
    assert statistics.wins(gain) and not statistics.wins(statistics.paired_gain(-gains, np.arange(200)))


def test_a_gain_of_nothing_is_rarely_said_to_win():
    rng = np.random.default_rng(0)
    said = [
        statistics.wins(statistics.paired_gain(rng.choice([1, -1, 0], n), np.arange(n), resamples=200))
        for n in (4, 8, 15, 30)
        for _ in range(100)
    ]
    assert np.mean(said) < 0.05


# heads


def test_a_score_of_each_head_does_not_depend_on_what_is_scored_with_it():
    model = load_model("random:llama", kind="reward", heads=3)
    mesh = make_mesh(Mesh())
    context = SimpleNamespace(
        mesh=mesh, config=Config(model=Model("random:llama"), description="scores"),
        put_rows=lambda batch: put_rows(mesh, batch),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 200, n).tolist() for n in (5, 60, 70, 9)]
    together = score_heads(context, model.config, model.params, texts)
    assert together.shape == (4, 3)
    np.testing.assert_allclose(score_heads(context, model.config, model.params, texts[::-1]), together[::-1], atol=1e-5)
    one = reward_heads(model.config, model.params, [texts[1]])
    np.testing.assert_allclose(together[1], one[0], atol=2e-5)
    means = score_texts(context, model.config, model.params, texts)
    np.testing.assert_allclose(means, together.mean(axis=1), atol=1e-6)


def test_the_sample_of_a_head_is_a_poisson_bootstrap_that_the_pair_alone_decides():
    context = SimpleNamespace(row_seed=lambda *parts: row_seed(7, *parts))
    pairs = [{"id": f"p{i}"} for i in range(1500)]
    weights = bootstrap_weights(context, pairs, 4)
    np.testing.assert_array_equal(bootstrap_weights(context, pairs[::-1], 4)[::-1], weights)
    np.testing.assert_array_equal(bootstrap_weights(context, pairs, 2), weights[:, :2])
    assert np.abs(weights.mean(axis=0) - 1).max() < 0.1 and np.abs(weights.var(axis=0) - 1).max() < 0.2
    assert np.abs(np.corrcoef(weights.T) - np.eye(4)).max() < 0.1
