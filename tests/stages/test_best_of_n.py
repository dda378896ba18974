"""The parts of best-of-n: which answer is chosen, and what is said of the scores."""

from types import SimpleNamespace

import pytest

from cai_jax.sampler import Sample
from cai_jax.stages import best_of_n, evaluate


def sample(text, truncated=False):
    return Sample(text, list(range(len(text))), [0.0] * len(text), truncated)


def row(scores, texts="abcd", **prompt):
    prompt = SimpleNamespace(id="p", category="c", messages=[{"role": "user", "content": "Hi"}], **prompt)
    samples = [sample(text * (place + 1), place == 1) for place, text in enumerate(texts)]
    return best_of_n._row(prompt, samples, list(scores), {})


def test_the_highest_score_is_chosen_and_the_first_of_equal_ones():
    assert row([0.1, 3.0, -1.0, 3.0])["chosen"] == 1
    assert row([0.1, 3.0, -1.0, 3.0])["flags"] == {
        "chosen_truncated": True, "chosen_empty": False, "all_alike": False,
    }  # fmt: skip
    assert row([1.0, 0.0], ["  ", "b"])["flags"]["chosen_empty"]


def test_answers_that_are_all_alike_are_flagged():
    prompt = SimpleNamespace(id="p", category="c", messages=[])
    assert best_of_n._row(prompt, [sample("same")] * 3, [1.0, 1.0, 1.0], {})["flags"]["all_alike"]


def test_the_summary_says_what_choosing_wins_and_what_it_does_to_lengths():
    found = best_of_n._summary([row([0.0, 1.0, 2.0, 3.0]), row([3.0, 2.0, 1.0, 0.0])])
    assert (found["prompts"], found["n"]) == (2, 4)
    assert (found["first"]["value"], found["best"]["value"], found["gain"]["value"]) == (1.5, 3.0, 1.5)
    assert [point["n"] for point in found["curve"]] == [1, 2, 4]
    assert [point["score"]["value"] for point in found["curve"]] == pytest.approx([1.5, 14 / 6, 3.0])
    assert (found["length"]["value"], found["chosen_length"]["value"]) == (2.5, 2.5)
    assert found["counters"] == {"chosen_truncated": 0, "chosen_empty": 0, "all_alike": 0}


@pytest.mark.parametrize("n, steps", [(2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])])
def test_the_curve_goes_up_in_powers_of_two_to_n(n, steps):
    assert best_of_n.ladder(n) == steps


def test_the_draws_of_an_evaluation_have_keys_of_their_own_and_the_first_is_everybodys():
    keys = [("p", "response", *draw) for draw in evaluate._draws(4)]
    assert keys[0] == ("p", "response") and len(set(keys)) == 4
