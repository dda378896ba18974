"""Several samples of a prompt share its keys; the best of them is the one that is rated highest."""

import itertools
import math

import numpy as np
import pytest

from cai_jax import Sampler, Sampling, load_model
from cai_jax.errors import UserError
from cai_jax.sampler import best_of_n, expected_best, kl_bound, memory, several

CHATS = [[{"role": "user", "content": text}] for text in ("Hi", "What is a tide?", "Why?")]
FEW = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def sampler():
    return Sampler(load_model("random:llama"), max_length=256, rows=8)


def test_samples_of_a_prompt_are_those_of_their_seeds_and_run_it_once(sampler):
    alone = [sampler.generate(CHATS[1:2], FEW, row_seeds=[seed])[0] for seed in (5, 6, 7)]
    before = sampler.counts.prefilled
    (together,) = sampler.run([several(CHATS[1], FEW, (5, 6, 7))])
    assert [sample.tokens for sample in together] == [sample.tokens for sample in alone]
    assert sampler.counts.prefilled - before < len(sampler._encode(CHATS[1]))


def test_the_best_of_n_is_rated_highest_and_its_n_are_drawn_apart(sampler):
    out = best_of_n(sampler, lambda chat, sample: sum(sample.tokens), CHATS, 4, FEW, seed=3)
    assert len(out) == 3
    for sample, ratings in out:
        assert len(set(ratings)) > 1 and sum(sample.tokens) == max(ratings)
    assert best_of_n(sampler, lambda chat, sample: sum(sample.tokens), CHATS, 4, FEW, seed=3) == out


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_the_expected_best_is_the_mean_over_all_choices(k):
    ratings = [0.3, -1.0, 2.5, 0.3, 7.0, -2.0]
    slowly = np.mean([max(choice) for choice in itertools.combinations(ratings, k)])
    assert expected_best(ratings, k) == pytest.approx(slowly)


def test_the_expected_best_of_many_draws_stays_a_number():
    assert expected_best(range(3000), 1500) == pytest.approx(2998, abs=1.1)


def kl_of_best(probabilities, n):
    """Exact: outcome i, rated i, is the best of n with the chance that all are at most i less that all are below."""
    up_to = np.cumsum(probabilities)
    best = up_to**n - (up_to - probabilities) ** n
    return float(np.sum(best * np.log(best / probabilities)))


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_kl_of_the_best_is_below_its_bound_and_reaches_it(n):
    rng = np.random.default_rng(0)
    assert kl_of_best(rng.dirichlet(np.ones(6)), n) < kl_bound(n)
    assert kl_of_best(np.full(100_000, 1e-5), n) == pytest.approx(kl_bound(n), abs=1e-3)
    assert kl_bound(1) == 0 and kl_bound(n) == math.log(n) - 1 + 1 / n


def test_a_cache_that_does_not_fit_is_refused_with_what_fits(sampler, monkeypatch):
    config = sampler.model.config
    row = memory.cache_bytes(config, 1, 1024, 0, "float32")
    monkeypatch.setattr(memory, "free_bytes", lambda mesh=None: 5 * row + row // 2)
    memory.check_cache_fits(config, 5, 1024, 0, "float32")
    with pytest.raises(UserError, match="set sampler.rows to at most 5"):
        memory.check_cache_fits(config, 6, 1024, 0, "float32")
