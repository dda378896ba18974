"""The decisions of the stages, one by one and without a model."""

from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest

from cai_jax.config import Ppo
from cai_jax.constitution import load_constitution
from cai_jax.labelers.judge import opinion_of
from cai_jax.provenance import row_seed
from cai_jax.stages.critique_revision import draw_principle
from cai_jax.stages.labelling import label
from cai_jax.stages.reward_model import held_out_metrics, split_by_prompt
from cai_jax.stages.rollouts import draw_prompts
from cai_jax.stages.updates import minibatches


def label_from_logprobs(logprobs_ab, logprobs_ba):
    """The label by one labeler that has these log-probs of (A) and (B) in each order."""
    opinion = opinion_of([[logprobs_ab[0] - logprobs_ab[1]], [logprobs_ba[1] - logprobs_ba[0]]])
    return label([SimpleNamespace(name="options", hash="h")], [opinion], [1.0])


def test_a_label_averages_both_orders_and_a_fixed_place_cancels():
    prefers_a = label_from_logprobs([-0.1, -2.5], [-2.5, -0.1])  # the same text wins in both orders
    assert prefers_a["consistent"] and prefers_a["probability_a"] == pytest.approx(1 / (1 + np.exp(-2.4)))
    place_only = label_from_logprobs([-0.1, -2.5], [-0.1, -2.5])  # (A) wins whatever stands there
    assert not place_only["consistent"] and place_only["tie"]
    assert place_only["probability_a"] == pytest.approx(0.5)


def test_swapping_the_responses_turns_the_label_round():
    label = label_from_logprobs([-1.0, -1.7], [-3.0, -0.4])
    swapped = label_from_logprobs([-3.0, -0.4], [-1.0, -1.7])
    assert label["probability_a"] == pytest.approx(1 - swapped["probability_a"])


def test_extreme_log_probs_do_not_overflow():
    label = label_from_logprobs([0.0, -2000.0], [-2000.0, 0.0])
    assert label["probability_a"] == 1.0 and label["consistent"]


def test_principles_are_drawn_evenly_and_by_the_key_of_the_row():
    context = SimpleNamespace(
        constitution=load_constitution("harmless_helpful"), row_seed=lambda *parts: row_seed(7, *parts)
    )
    drawn = [draw_principle(context, "critique_revision", f"rt-{i}", 1).id for i in range(2400)]
    counts = np.unique(drawn, return_counts=True)[1]
    assert len(counts) == len(context.constitution.principles)
    assert counts.min() > 50 and counts.max() < 160  # 100 expected of 24 principles
    assert drawn[:50] == [draw_principle(context, "critique_revision", f"rt-{i}", 1).id for i in range(50)]
    assert drawn[:50] != [draw_principle(context, "critique_revision", f"rt-{i}", 2).id for i in range(50)]


def test_every_update_and_pass_has_a_permutation_of_its_own():
    """The same permutation key every update is a known fault."""
    settings = Ppo(rollouts=8, epochs=2, minibatches=2)
    updates = [[rows.tolist() for rows in minibatches(settings, seed=0, update=update)] for update in range(2)]
    passes = [sum(steps[i : i + 2], []) for steps in updates for i in (0, 2)]
    assert all(sorted(order) == list(range(8)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4
    again = [rows.tolist() for rows in minibatches(settings, seed=0, update=1)]
    assert again == updates[1]


def draw_context(share: float, unsafe=()):
    rows = [SimpleNamespace(id=prompt) for prompt in unsafe]
    return SimpleNamespace(
        row_seed=lambda *parts: row_seed(0, *parts),
        config=SimpleNamespace(ppo=Ppo(red_team_share=share)),
        prompts={"red_team": SimpleNamespace(rows=rows)},
    )


@pytest.mark.parametrize(("share", "unsafe"), [(0.25, 2), (0.4, 3), (1.0, 8)])
def test_an_update_has_the_share_of_red_team_prompts_that_is_asked_for(share, unsafe):
    prompts = [SimpleNamespace(id=f"{name}{i}") for name in ("unsafe", "safe") for i in range(20)]
    context = draw_context(share, [f"unsafe{i}" for i in range(20)])
    draws = [[p.id for p in draw_prompts(context, "ppo", prompts, 8, f"update-{n}")] for n in range(4)]
    assert all(sum(prompt.startswith("unsafe") for prompt in drawn) == unsafe for drawn in draws)
    assert all(len(set(drawn)) == 8 for drawn in draws) and len(set(map(tuple, draws))) == 4
    many = [p.id for p in draw_prompts(context, "ppo", prompts, 80, "update-0")]
    times = [many.count(f"unsafe{i}") for i in range(20)]
    assert max(times) - min(times) <= 1 and sum(times) == round(share * 80), "all before one comes again"


def test_rollouts_use_every_prompt_before_one_comes_again():
    context = draw_context(0.0)
    prompts = [f"p{i}" for i in range(5)]
    drawn = draw_prompts(context, "ppo", prompts, 10, "update-0")
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == prompts
    assert drawn != draw_prompts(context, "ppo", prompts, 10, "update-1")


def test_all_pairs_of_a_prompt_fall_on_one_side():
    pairs = [{"prompt_id": f"p{i % 10}", "n": i} for i in range(40)]
    train, held = split_by_prompt(pairs, 0.3)
    assert len(held) == 12 and len(train) == 28
    assert not {pair["prompt_id"] for pair in train} & {pair["prompt_id"] for pair in held}
    assert split_by_prompt(list(reversed(pairs)), 0.3)[1] == list(reversed(held))


NUMBERS = count()


def pair(score_a, score_b, probability, length_a=3, length_b=3):
    tokens = [1], [2] * length_a, [3] * length_b
    return {
        "prompt_id": f"p{next(NUMBERS)}", "category": "", "principles": ["p"], "refusals": (False, False),
        "scores": (score_a, score_b), "probability": probability, "tokens": tokens,
    }  # fmt: skip


def test_held_out_metrics_tell_a_good_model_from_a_rule_about_length():
    pairs = [pair(2, 0, 0.9, 5, 3), pair(0, 2, 0.1, 3, 5), pair(1, 0, 0.2, 4, 2), pair(3, 1, 0.8, 2, 6)]
    metrics = held_out_metrics(pairs)
    assert metrics["n"] == 4
    assert metrics["accuracy"]["value"] == 0.75
    assert metrics["longer_wins_accuracy"]["value"] == 0.5
    assert metrics["shorter_wins_accuracy"]["value"] == 0.5
    assert metrics["ties"] == 0
    equal = held_out_metrics([pair(1, 0, 0.9)])
    assert equal["longer_wins_accuracy"]["n"] == 0 and equal["longer_wins_accuracy"]["value"] is None


def test_ties_decide_nothing_on_held_out_pairs():
    """A label of 1/2 would count for whatever scores the second response higher."""
    pairs = [pair(0, 1, 0.5, 2, 5), pair(1, 0, 0.5, 2, 5), pair(0, 1, 0.5004, 5, 2), pair(2, 0, 0.9, 5, 2)]
    metrics = held_out_metrics(pairs)
    assert metrics["n"] == 4 and metrics["ties"] == 3
    found = [metrics[name] for name in ("accuracy", "longer_wins_accuracy", "shorter_wins_accuracy")]
    assert [(interval["value"], interval["n"]) for interval in found] == [(1, 1), (1, 1), (0, 1)]
    nothing = held_out_metrics(pairs[:3])
    assert nothing["accuracy"]["value"] is None and nothing["ties"] == 3
