"""Conversations in, samples out: a row's text is its own, whatever shares its batch."""

import numpy as np
import pytest

from cai_jax import Sampler, Sampling, load_model
from cai_jax.chat import encode_text

QUESTIONS = [
    "Hi",
    "What is a tide?",
    "Name a colour that is not blue, please, and say why you chose it over all the others.",
    "Why?",
    "Tell me of rivers.",
]
CONVERSATIONS = [[{"role": "user", "content": text}] for text in QUESTIONS]
SEEDS = [11, 22, 33, 44, 2**63 + 5]
PREFIX = [{"role": "user", "content": "Be brief."}, {"role": "assistant", "content": "I will."}]


@pytest.fixture(scope="module")
def sampler():
    return Sampler(load_model("random:llama"), max_length=512, rows=3)


@pytest.fixture(scope="module")
def samples(sampler):
    return sampler.generate(CONVERSATIONS, Sampling(max_new_tokens=12), row_seeds=SEEDS)


def test_order_and_company_change_no_text(sampler, samples):
    order = [4, 2, 0, 3, 1]
    shuffled = sampler.generate(
        [CONVERSATIONS[i] for i in order], Sampling(max_new_tokens=12), row_seeds=[SEEDS[i] for i in order]
    )
    assert [shuffled[order.index(i)] for i in range(5)] == samples
    for i in range(5):
        assert sampler.generate([CONVERSATIONS[i]], Sampling(max_new_tokens=12), row_seeds=[SEEDS[i]]) == [samples[i]]


def test_settings_of_one_row_do_not_touch_another(sampler, samples):
    greedy, narrow = Sampling(temperature=0.0, max_new_tokens=9), Sampling(top_k=2, max_new_tokens=11)
    mixed = [Sampling(max_new_tokens=12), greedy, narrow]
    out = sampler.generate([CONVERSATIONS[0]] * 3, mixed, row_seeds=[SEEDS[0]] * 3)
    assert out[0] == samples[0]
    assert [len(sample.tokens) <= sampling.max_new_tokens for sample, sampling in zip(out, mixed, strict=True)]
    assert out[1].tokens != out[0].tokens


def test_seeds_make_the_text_and_equal_seeds_make_equal_text(sampler):
    few = Sampling(max_new_tokens=12)
    seeded = [sampler.generate(CONVERSATIONS[:2], few, seed=seed) for seed in (0, 0, 1)]
    assert seeded[0] == seeded[1] != seeded[2]
    twice = sampler.generate([CONVERSATIONS[0]] * 2, few, seed=0)
    assert twice[0].tokens != twice[1].tokens


def test_a_row_without_a_stop_token_is_truncated_and_one_with_it_keeps_it(sampler):
    stops = set(sampler.model.config.eos_ids)
    out = sampler.generate(CONVERSATIONS * 8, Sampling(temperature=3.0, max_new_tokens=48))
    assert {sample.truncated for sample in out} == {True, False}
    for sample in out:
        assert len(sample.tokens) == len(sample.logprobs)
        assert sample.truncated == (sample.tokens[-1] not in stops)
        assert not stops & set(sample.tokens[:-1])
        assert len(sample.tokens) == 48 or not sample.truncated


def test_a_prefix_is_reused_and_changes_nothing(sampler):
    greedy = Sampling(temperature=0.0, max_new_tokens=10)
    whole = sampler.generate([[*PREFIX, *conversation] for conversation in CONVERSATIONS], greedy, row_seeds=SEEDS)
    before = sampler.counts.reused
    reused = sampler.generate(CONVERSATIONS, greedy, row_seeds=SEEDS, prefix=PREFIX)
    assert sampler.counts.reused - before >= len(CONVERSATIONS) * len(sampler._prefix_tokens(PREFIX))
    assert [sample.tokens for sample in reused] == [sample.tokens for sample in whole]


def test_a_conversation_with_a_system_turn_does_not_fit_the_prefix_and_is_run_whole(sampler):
    system = [{"role": "system", "content": "You are terse."}, *CONVERSATIONS[0]]
    whole = sampler.generate([system], Sampling(temperature=0.0, max_new_tokens=10))
    assert whole[0].tokens


def test_scores_are_the_log_probs_of_the_options(sampler):
    options = ["Yes", "No, never.", encode_text(sampler.model.tokenizer, "Perhaps")]
    together = sampler.score(CONVERSATIONS, options)
    with_prefix = sampler.score(CONVERSATIONS, options, prefix=PREFIX)
    one_by_one = [[sampler.score([c], [option])[0][0] for option in options] for c in CONVERSATIONS[:2]]
    np.testing.assert_allclose(together[:2], one_by_one, atol=1e-4)
    whole = sampler.score([[*PREFIX, *conversation] for conversation in CONVERSATIONS], options)
    np.testing.assert_allclose(with_prefix, whole, atol=1e-4)


def test_scoring_a_sample_gives_back_its_log_probs(sampler, samples):
    scored = sampler.score_tokens(CONVERSATIONS, [[sample.tokens] for sample in samples])
    for sample, (logprobs,) in zip(samples, scored, strict=True):
        np.testing.assert_allclose(logprobs, sample.logprobs, atol=1e-4)


def test_a_score_continues_an_open_assistant_turn(sampler):
    opened = [*CONVERSATIONS[0], {"role": "assistant", "content": "The answer is ("}]
    ((got,),) = sampler.score([opened], ["A"])
    ((whole,),) = sampler.score_tokens([CONVERSATIONS[0]], [encode_text(sampler.model.tokenizer, "The answer is (A")])
    np.testing.assert_allclose(got, whole[-1], atol=1e-4)


def test_a_conversation_that_does_not_fit_is_refused(sampler):
    long = [{"role": "user", "content": "word " * 300}]
    assert not sampler.fits(long, 8)
    with pytest.raises(ValueError, match="max_length is 512"):
        sampler.generate([CONVERSATIONS[0], long], Sampling(max_new_tokens=8))
