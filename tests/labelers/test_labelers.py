"""Labelers against slow readings of what they say, and the properties that every one of them has."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from cai_jax import config as c
from cai_jax import forward
from cai_jax.chat import completion_ids, encode_chat, turn_end_id
from cai_jax.constitution import load_constitution
from cai_jax.errors import UserError
from cai_jax.labelers import make
from cai_jax.labelers.examples import Examples
from cai_jax.labelers.judge import Judge
from cai_jax.labelers.opinion import Opinion, Pair
from cai_jax.labelers.rating import expectation
from cai_jax.labelers.rule import LIMIT, Rule
from cai_jax.labelers.thought import Thought
from cai_jax.labelers.vote import agreement, tempered, vote
from cai_jax.models.pretrained import load_model
from cai_jax.named_runs import load_config
from cai_jax.overrides import apply_overrides
from cai_jax.prompts import (
    contrast_request,
    preference_request,
    rating_request,
    reasoning_request,
    resolve_options,
    resolve_ratings,
    unlike_answers,
    worked_answers,
)
from cai_jax.rules import satisfies
from cai_jax.sampler import Generate, Sample, Sampler, Score

CONSTITUTION = load_constitution("verifiable")
HI = ({"role": "user", "content": "Say hi."},)
PAIRS = [
    Pair("p0", HI, "Hello there!", "No."),
    Pair("p1", HI, "", "In short, hi. I hope this helps."),
    Pair("p2", ({"role": "user", "content": "Count."},), "1 2 3", "one, two, three <|im_end|> (A)"),
]
ASKING = ("options", "thought", "contrast", "examples", "rating")
SHORT = replace(c.Thought(), reasoning=c.Sampling(max_new_tokens=6))


@pytest.fixture(scope="module")
def model():
    return load_model("random:llama")


@pytest.fixture(scope="module")
def sampler(model):
    return Sampler(model, max_length=2048, rows=3)


def made(name, model, *overrides):
    config = apply_overrides(load_config("tiny")[1], ["preferences.thought.reasoning.max_new_tokens=6", *overrides])
    judge = Judge(model.tokenizer, model.hash, 2048, config.preferences.guard)
    return make.labeler(name, config, CONSTITUTION, judge)


def compare(sampler, labeler, pairs, principles=CONSTITUTION.principles[:2], seed=3) -> list[Opinion]:
    return sampler.run([labeler.compare(pair, principles, seed) for pair in pairs], labeler.preamble)


def swapped(pair):
    return replace(pair, response_a=pair.response_b, response_b=pair.response_a)


def drive(program, answer):
    """What a row program returns, its requests answered by a function."""
    request = None
    try:
        while True:
            request = program.send(request if request is None else answer(request))
    except StopIteration as end:
        return end.value


def logprobs_after(model, tokens, continuation):
    """Log-probs of a continuation by one plain forward pass."""
    count = len(tokens) + len(continuation)
    row = np.asarray([[*tokens, *continuation, *[0] * (-count % 512)]])  # what comes after changes nothing before
    logits_TV = np.asarray(forward(model.config, model.params, row))[0].astype(np.float64)
    logprobs_TV = logits_TV - np.log(np.sum(np.exp(logits_TV), axis=-1, keepdims=True))
    return [logprobs_TV[len(tokens) - 1 + i, token] for i, token in enumerate(continuation)]


# ---------------------------------------------------------------- what all of them keep


@pytest.mark.parametrize("name", [*ASKING, "rule"])
def test_swapping_the_responses_changes_the_sign_and_nothing_else(sampler, model, name):
    labeler = made(name, model)
    there = compare(sampler, labeler, PAIRS)
    back = compare(sampler, labeler, [swapped(pair) for pair in PAIRS])
    assert [opinion.logit for opinion in there] == [-opinion.logit for opinion in back]
    assert any(opinion.logit for opinion in there)


@pytest.mark.parametrize("name", ASKING)
def test_an_opinion_does_not_depend_on_batch_or_slot(sampler, model, name):
    labeler = made(name, model)
    together = compare(sampler, labeler, PAIRS)
    alone = [compare(sampler, labeler, [pair])[0] for pair in reversed(PAIRS)]
    assert together == alone[::-1]


@pytest.mark.parametrize("name", ASKING)
def test_several_principles_are_averaged_in_logit_space(sampler, model, name):
    labeler, principles = made(name, model), CONSTITUTION.principles[:3]
    together = compare(sampler, labeler, PAIRS, principles)
    each = np.mean([[o.logit for o in compare(sampler, labeler, PAIRS, [p])] for p in principles], axis=0)
    np.testing.assert_allclose([opinion.logit for opinion in together], each, atol=1e-6)
    assert len({opinion.logit for opinion in together}) > 1


@pytest.mark.parametrize("name", ASKING)
def test_a_pair_without_room_is_a_named_failure_and_asks_nothing(model, name):
    labeler = made(name, model)
    endless = replace(PAIRS[0], response_a="y" * 3000)
    opinion = drive(labeler.compare(endless, CONSTITUTION.principles[:1], 0), lambda request: pytest.fail("asked"))
    assert (opinion.logit, opinion.failure) == (None, "too_long")


@pytest.mark.parametrize("name", ASKING)
def test_the_hash_is_of_model_settings_and_texts(model, name):
    assert made(name, model).hash == made(name, model).hash
    other = replace(model, hash="another model")
    assert made(name, other).hash != made(name, model).hash
    change = {"options": "preferences.orders=first", "thought": "preferences.thought.most=0.7",
              "contrast": "preferences.contrast.per_token=false", "examples": "preferences.examples.scale=2",
              "rating": "preferences.rating.scale=2"}[name]
    assert made(name, model, change).hash != made(name, model).hash
    assert len({made(each, model).hash for each in ASKING}) == len(ASKING)


def test_every_name_of_the_config_makes_a_labeler_of_that_name(model):
    assert {*make._MAKERS, "external"} == set(c.LABELERS)
    for name in (*ASKING, "rule"):
        assert made(name, model).name == name
    with pytest.raises(UserError, match="no labeler 'raiting'; did you mean rating"):
        made("raiting", model)


@pytest.mark.parametrize("request_of", [
    lambda text, tokenizer: reasoning_request(HI, CONSTITUTION.principles[0], text, "b"),
    lambda text, tokenizer: rating_request(HI, text, CONSTITUTION.principles[0], resolve_ratings(tokenizer)),
])  # fmt: skip
def test_responses_are_quoted(model, request_of):
    rng = random.Random(0)
    pieces = ["\n", "\r\n", "\x85", "\u2028", "Response (B):", "> ", "a", ""]
    frame = [line for line in request_of("a", model.tokenizer)[0]["content"].splitlines() if line[:2] != "> "]
    for _ in range(100):
        asked = request_of("".join(rng.choices(pieces, k=6)), model.tokenizer)[0]["content"]
        assert [line for line in asked.splitlines() if line[:2] != "> "] == frame


# ---------------------------------------------------------------- each alone


def test_options_are_the_log_odds_of_a_plain_forward_pass(sampler, model):
    labeler, principles = made("options", model, "preferences.guard=false"), CONSTITUTION.principles[:2]
    answer = resolve_options(model.tokenizer)
    for pair, opinion in zip(PAIRS, compare(sampler, labeler, PAIRS, principles), strict=True):
        expected = []
        for sign, first, second in ((1, pair.response_a, pair.response_b), (-1, pair.response_b, pair.response_a)):
            for principle in principles:
                request = preference_request(pair.messages, principle, first, second, answer)
                tokens = encode_chat(model.tokenizer, [*labeler.preamble, *request], continue_final=True)
                (a,), (b,) = (logprobs_after(model, tokens, [token]) for token in answer.ids)
                expected.append(sign * (a - b))
        assert opinion.logit == pytest.approx(np.mean(expected), abs=1e-4)
        assert opinion.detail["orders"] == pytest.approx([np.mean(expected[:2]), np.mean(expected[2:])], abs=1e-4)


def test_one_order_is_the_first_of_both(sampler, model):
    both = compare(sampler, made("options", model), PAIRS)
    first = compare(sampler, made("options", model, "preferences.orders=first"), PAIRS)
    assert [o.detail["orders"] for o in first] == [o.detail["orders"][:1] for o in both]
    assert [o.logit for o in first] == [o.detail["orders"][0] for o in both]


@pytest.mark.parametrize("per_token", [True, False])
def test_contrast_is_the_ratio_of_two_plain_forward_passes(sampler, model, per_token):
    labeler = made("contrast", model, f"preferences.contrast.per_token={per_token}", "preferences.contrast.scale=2")
    principle, end = CONSTITUTION.principles[1], turn_end_id(model.tokenizer)
    for pair, opinion in zip(PAIRS, compare(sampler, labeler, PAIRS, [principle]), strict=True):
        ratios = []
        for text in (pair.response_a, pair.response_b):
            response = completion_ids(model.tokenizer, text, end)
            keep, broken = (
                np.asarray(logprobs_after(model, encode_chat(
                    model.tokenizer, contrast_request(pair.messages, principle, kept)), response))
                for kept in (True, False)
            )
            ratios.append((np.mean if per_token else np.sum)(keep - broken))
        assert opinion.logit == pytest.approx(2 * (ratios[0] - ratios[1]), abs=2e-4)


@pytest.mark.parametrize("per_token", [True, False])
def test_examples_are_the_ratio_with_and_without_the_worked_answers(sampler, model, per_token):
    labeler = made("examples", model, f"preferences.examples.per_token={per_token}", "preferences.examples.scale=2")
    worked, end = worked_answers(CONSTITUTION), turn_end_id(model.tokenizer)
    assert [turn["content"] for turn in worked[1::2]] == [shot.revision for shot in CONSTITUTION.critique_few_shots]
    for pair, opinion in zip(PAIRS, compare(sampler, labeler, PAIRS, CONSTITUTION.principles[:1]), strict=True):
        ratios = []
        for text in (pair.response_a, pair.response_b):
            response = completion_ids(model.tokenizer, text, end)
            after, without = (
                np.asarray(logprobs_after(model, encode_chat(model.tokenizer, [*shown, *pair.messages]), response))
                for shown in (worked, ())
            )
            ratios.append((np.mean if per_token else np.sum)(after - without))
        assert opinion.logit == pytest.approx(2 * (ratios[0] - ratios[1]), abs=2e-4)


@pytest.mark.parametrize("aim", ["harmless", "helpful"])
def test_examples_of_two_aims_are_the_ratio_of_one_to_the_other(sampler, model, aim):
    constitution = load_constitution("harmless_helpful", ("no_lecture", "no_scams"))  # one worked critique each
    principle = next(each for each in constitution.principles if each.aim == aim)
    labeler = Examples(Judge(model.tokenizer, "", sampler.max_length), c.Examples(), constitution)
    own, other = worked_answers(constitution, [principle]), unlike_answers(constitution, [principle])
    assert own and other and labeler.starts([[principle]]) == [own, other] and not labeler.own_principles
    for pair, opinion in zip(PAIRS, compare(sampler, labeler, PAIRS, [principle]), strict=True):
        ratios = []
        for text in (pair.response_a, pair.response_b):
            response = completion_ids(model.tokenizer, text, turn_end_id(model.tokenizer))
            after, against = (
                np.asarray(logprobs_after(model, encode_chat(model.tokenizer, [*shown, *pair.messages]), response))
                for shown in (own, other)
            )
            ratios.append(np.sum(after - against))
        assert opinion.logit == pytest.approx(ratios[0] - ratios[1], abs=4e-4)


def test_the_hash_of_examples_tells_which_answers_are_of_which_aim(model):
    whole = load_constitution("harmless_helpful")
    moved = [replace(shot, principle="no_lecture") if shot.principle == "no_scams" else shot
             for shot in whole.critique_few_shots]  # fmt: skip
    judge = Judge(model.tokenizer, "", 1024)
    hashes = {Examples(judge, c.Examples(), each).hash
              for each in (whole, replace(whole, critique_few_shots=tuple(moved)))}  # fmt: skip
    assert len(hashes) == 2


def test_an_opposite_of_ones_own_takes_the_place_of_ours():
    principle = CONSTITUTION.principles[0]
    own = replace(principle, opposite="Ramble on and on.")
    assert contrast_request(HI, own, True) == contrast_request(HI, principle, True)
    assert "Ramble on and on." in contrast_request(HI, own, False)[-1]["content"]
    assert principle.title in contrast_request(HI, principle, False)[-1]["content"]
    with_before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *HI]
    assert contrast_request(with_before, own, False)[:2] == with_before[:2]


def reading_of_all_texts(tokens_of, next_logprob, longest, vocabulary):
    """The expected number by going through every text of `longest` tokens and reading the longest number it begins."""
    weights = dict.fromkeys(range(1, len(tokens_of) + 1), 0.0)
    for text in itertools.product(vocabulary, repeat=longest):
        probability = math.exp(sum(next_logprob(text[:i], text[i]) for i in range(longest)))
        read = [n for n, tokens in enumerate(tokens_of, start=1) if text[: len(tokens)] == tuple(tokens)]
        if read:
            weights[max(read, key=lambda n: len(tokens_of[n - 1]))] += probability
    return sum(n * w for n, w in weights.items()) / sum(weights.values())


@pytest.mark.parametrize("ten", [(1, 0), (10,), (1, 0, 11)])
def test_an_expected_rating_is_that_of_all_texts(ten):
    """1 and 10 may begin with the same token: a text that goes on to 10 does not say 1."""
    rng, vocabulary = np.random.default_rng(0), range(12)
    table = {}

    def next_logprob(before, token):
        if before not in table:
            table[before] = np.log(rng.dirichlet(np.full(12, 0.4)) + 1e-9)
            table[before] -= np.log(np.exp(table[before]).sum())
        return table[before][token]

    ids = (*((n,) for n in range(1, 10)), ten)
    logprobs = [[next_logprob(tokens[:i], tokens[i]) for i in range(len(tokens))] for tokens in ids]
    expected = reading_of_all_texts(ids, next_logprob, len(ten), vocabulary)
    assert expectation(ids, logprobs) == pytest.approx(expected, rel=1e-9)


def test_ratings_stay_on_their_scale_and_rank_the_responses(model):
    labeler = made("rating", model)
    ids = labeler.form.ids

    def sure_of(number):
        return [np.full(len(tokens), -0.01 if n == number else -30.0) for n, tokens in enumerate(ids, start=1)]

    def answer(request):
        return sure_of(7 if "> good" in request.conversation[0]["content"] else 2)

    pair = Pair("p", HI, "good", "bad")
    opinion = drive(labeler.compare(pair, CONSTITUTION.principles[:2], 0), answer)
    assert opinion.detail["ratings"] == pytest.approx([7, 2], abs=1e-6) and opinion.logit == pytest.approx(5, abs=1e-5)
    rated = drive(labeler.rate(HI, "good", CONSTITUTION.principles[:2]), answer)
    assert rated == pytest.approx(7, abs=1e-6)
    assert drive(labeler.rate(HI, "y" * 3000, CONSTITUTION.principles[:1]), answer) is None


def thoughts(text, truncated, logit):
    def answer(request):
        if isinstance(request, Generate):
            return Sample(text, [1], [0.0], truncated)
        assert isinstance(request, Score) and request.conversation[-3] == {"role": "assistant", "content": text}
        shown = request.conversation[0]["content"]
        first_is_a = shown.index("> one") < shown.index("> two")
        return [np.asarray([logit if first_is_a else 0.0]), np.asarray([0.0 if first_is_a else logit])]

    return answer


@pytest.mark.parametrize("text, truncated", [("It is kinder.", False), ("", False), ("It is", True)])
def test_a_thought_is_clamped_and_its_faults_are_flags(model, text, truncated):
    labeler = Thought(Judge(model.tokenizer, "", 2048), resolve_options(model.tokenizer), SHORT)
    opinion = drive(labeler.compare(Pair("p", HI, "one", "two"), CONSTITUTION.principles[:2], 0),
                    thoughts(text, truncated, 5.0))
    assert opinion.logit == pytest.approx(5) and opinion.failure == ""
    assert opinion.detail["flags"] == {
        "reasoning_truncated": truncated, "reasoning_empty": not text, "guarded": False}
    assert opinion.detail["reasoning"] == [text] * 4
    for temperature in (0.1, 1.0, 4.0):
        assert 1 / (1 + math.exp(-tempered(opinion, temperature))) == pytest.approx(0.6)
    assert tempered(replace(opinion, logit=-5.0), 1.0) == pytest.approx(-math.log(1.5))
    assert tempered(opinion, 50.0) == pytest.approx(0.1)
    free = replace(labeler, settings=replace(SHORT, most=1.0))
    unclamped = drive(free.compare(Pair("p", HI, "one", "two"), CONSTITUTION.principles[:1], 0),
                      thoughts(text, truncated, 5.0))
    assert tempered(unclamped, 1.0) == pytest.approx(5)


def test_a_reasoning_that_leaves_no_room_for_its_verdict_is_a_failure(model):
    """Its text may have more tokens than were drawn."""
    labeler = Thought(Judge(model.tokenizer, "", 1000), resolve_options(model.tokenizer), SHORT)
    opinion = drive(labeler.compare(PAIRS[0], CONSTITUTION.principles[:1], 0),
                    lambda request: Sample("y" * 900, [1], [0.0], False))
    assert (opinion.logit, opinion.failure) == (None, "too_long")


TEXTS = ["Hi!", "In short, 3 things.", "word " * 25, "", "- a\n- b", "In short, fine. I hope this helps."]


def test_rules_are_right_about_every_pair_of_texts():
    for a, b in itertools.product(TEXTS, repeat=2):
        for principle in CONSTITUTION.principles:
            opinion = drive(Rule().compare(Pair("p", HI, a, b), [principle], 0), None)
            kept = [satisfies(principle.check, text) for text in (a, b)]
            assert opinion.logit == (LIMIT if kept == [True, False] else -LIMIT if kept == [False, True] else 0)
            assert opinion.detail["flags"]["tie"] == (kept[0] == kept[1])


def test_several_rules_count_by_the_share_that_is_kept():
    brief, closing, opening, *_ = CONSTITUTION.principles
    pair = Pair("p", HI, "In short, fine.", "word " * 25)  # keeps brief and opening; keeps none
    opinion = drive(Rule().compare(pair, [brief, closing, opening], 0), None)
    assert opinion.detail["kept"] == [2 / 3, 0] and opinion.logit == pytest.approx(LIMIT * 2 / 3)
    without = [brief, replace(closing, check=None)]
    assert drive(Rule().compare(pair, without, 0), None).logit == LIMIT
    nobody = drive(Rule().compare(pair, without[1:], 0), None)
    assert (nobody.logit, nobody.failure) == (None, "no_check")
    nearly = drive(Rule(c.Rule(0.9)).compare(pair, [brief], 0), None)
    assert 1 / (1 + math.exp(-nearly.logit)) == pytest.approx(0.9)


# ---------------------------------------------------------------- votes


def test_a_vote_is_the_mean_of_those_that_have_an_opinion():
    assert vote([1.0, None, -3.0]) == -1.0
    assert vote([None, None]) is None


def test_agreement_is_that_of_a_contingency_table():
    rng = np.random.default_rng(1)
    one = [None if x > 1.5 else 0.0 if abs(x) < 0.2 else float(x) for x in rng.normal(size=300)]
    other = [None if y < -1.8 else float(y + (x or 0)) for x, y in zip(one, rng.normal(size=300), strict=True)]
    (found,) = agreement({"one": one, "other": other})
    both = [(x, y) for x, y in zip(one, other, strict=True) if x is not None and y is not None and x != 0 and y != 0]
    table = np.zeros((2, 2))
    for x, y in both:
        table[int(x > 0), int(y > 0)] += 1
    share = np.trace(table) / table.sum()
    chance = (table.sum(0) / table.sum()) @ (table.sum(1) / table.sum())
    assert found["labelers"] == ["one", "other"] and found["same"]["n"] == len(both) < 300
    assert found["same"]["value"] == pytest.approx(share) and found["same"]["low"] < share < found["same"]["high"]
    assert found["kappa"] == pytest.approx((share - chance) / (1 - chance)) and 0.1 < found["kappa"] < 0.9


def test_agreement_of_those_who_always_say_the_same_has_no_kappa():
    assert agreement({"one": [1.0, 2.0], "other": [3.0, 1.0]})[0]["kappa"] is None
    assert agreement({"one": [None], "other": [3.0]})[0]["same"]["value"] is None
    assert [a["kappa"] for a in agreement({"x": [1, -1], "y": [1, -1], "z": [-1, 1]})] == [1, -1, -1]
