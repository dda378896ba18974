"""The parts of the DPO stage on a tiny model: log-probs of pairs, what is learnt from, what is measured."""

from types import SimpleNamespace

import numpy as np
import pytest

from cai_jax import Sampler
from cai_jax.config import Config, Dpo, Mesh, Model
from cai_jax.mesh import make_mesh
from cai_jax.models.pretrained import load_model
from cai_jax.objectives import dpo as losses
from cai_jax.stages import dpo, scoring
from cai_jax.stages.reward_model import split_by_prompt

CONFIG = Config(model=Model("random:llama"), description="DPO")


@pytest.fixture(scope="module")
def model():
    return load_model("random:llama")


@pytest.fixture(scope="module")
def context():
    return SimpleNamespace(config=CONFIG, mesh=make_mesh(Mesh()), put_rows=lambda batch: batch)


def tokens(rng, *lengths):
    return tuple(rng.integers(3, 200, length).tolist() for length in lengths)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [tokens(rng, *rng.integers(2, 40, 3)) for _ in range(19)]


def test_log_probs_of_a_pair_do_not_depend_on_the_other_pairs(context, model, texts):
    together = scoring.score_pairs(context, model.config, model.params, texts)
    for place in (7, int(np.argmin([sum(map(len, pair)) for pair in texts]))):  # the shortest is padded to less
        alone = scoring.score_pairs(context, model.config, model.params, [texts[place]])
        np.testing.assert_array_equal(alone, together[[place]])
    backwards = scoring.score_pairs(context, model.config, model.params, texts[::-1])
    np.testing.assert_array_equal(backwards[::-1], together)
    swapped = scoring.score_pairs(context, model.config, model.params, [(p, b, a) for p, a, b in texts])
    np.testing.assert_allclose(swapped[:, ::-1], together, atol=1e-4)


def test_log_probs_of_a_pair_do_not_depend_on_padding(context, model, texts, monkeypatch):
    narrow = scoring.score_pairs(context, model.config, model.params, texts)
    monkeypatch.setattr(scoring, "SMALLEST_BUCKET", 256)
    np.testing.assert_allclose(scoring.score_pairs(context, model.config, model.params, texts), narrow, atol=1e-4)


def test_log_probs_of_a_pair_are_those_of_the_sampler(context, model):
    """As of any text: the responses to a conversation, each scored on its own behind it."""
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    sampler = Sampler(model, max_length=128, rows=2)
    answers = tokens(np.random.default_rng(1), 5, 9)
    pair = (sampler._encode(chat), *answers)
    theirs = sampler.score([chat], [[list(answer) for answer in answers]])
    ours = scoring.score_pairs(context, model.config, model.params, [pair])
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def labelled(prompt, probability, a=(7, 8), b=(9,)):
    return {"id": prompt, "prompt_id": prompt, "tokens": ((1, 2), a, b), "probability": probability}


def test_the_chosen_response_stands_first_with_its_probability():
    a, b, tie = dpo._usable(Dpo(soft_labels=True), [labelled("p", 0.8), labelled("q", 0.3), labelled("r", 0.5)])
    assert (a["chosen"], a["tokens"], a["probability"]) == ("a", ((1, 2), (7, 8), (9,)), 0.8)
    assert (b["chosen"], b["tokens"], b["probability"]) == ("b", ((1, 2), (9,), (7, 8)), 0.7)
    assert tie["probability"] == 0.5
    np.testing.assert_allclose(dpo._smoothing(Dpo(soft_labels=True), [a, b, tie]), [0.2, 0.3, 0.5], rtol=1e-6)


def test_a_tie_is_no_hard_label():
    pairs = [labelled("p", 0.8), labelled("q", 0.5004), labelled("r", 0.4996)]
    assert [pair["id"] for pair in dpo._usable(Dpo(), pairs)] == ["p"]
    assert dpo._smoothing(Dpo(smoothing=0.1), pairs) == 0.1


def test_prompts_are_held_out_as_the_reward_model_holds_them_out():
    """Ties are left out after the split, so that they do not move a prompt to the other side."""
    with_ties = [labelled(f"p{i}", 0.5 if i % 3 else 0.9) for i in range(30)]
    held = {pair["id"] for pair in split_by_prompt(with_ties, 0.3)[1]}
    ours = dpo._usable(Dpo(), split_by_prompt(with_ties, 0.3)[1])
    assert {pair["id"] for pair in ours} == {name for name in held if int(name[1:]) % 3 == 0}


@pytest.mark.parametrize("settings", [
    Dpo(), Dpo(kind="ipo", beta=0.3), Dpo(kind="hinge"), Dpo(kind="robust", smoothing=0.2), Dpo(soft_labels=True),
    Dpo(nll_coef=0.5), Dpo(kind="ipo", nll_coef=0.5),
], ids=lambda settings: settings.kind)  # fmt: skip
def test_held_out_numbers_agree_with_a_slow_count(settings):
    rng = np.random.default_rng(3)
    pairs = [
        labelled(f"p{i}", p, tokens(rng, 1 + i % 4)[0], tokens(rng, 3)[0])
        for i, p in enumerate([0.9, 0.7, 0.2, 0.65, 0.5])
    ]
    pairs = dpo._usable(settings, pairs)
    for pair in pairs:
        pair["reference"] = rng.normal(-20, 5, 2).astype(np.float32)
    policy = np.asarray([pair["reference"] for pair in pairs]) + rng.normal(0, 2, (len(pairs), 2)).astype(np.float32)
    found = dpo.held_out_metrics(settings, pairs, policy)
    terms, margins, right, kls = [], [], [], []
    for pair, (chosen, rejected) in zip(pairs, policy, strict=True):
        scale = [len(response) if settings.kind == "ipo" else 1 for response in pair["tokens"][1:]]
        ref = pair["reference"] / scale
        own = np.asarray([chosen, rejected]) / scale
        smoothing = 1 - pair["probability"] if settings.soft_labels else settings.smoothing
        term = float(losses.loss(*own[:, None], *ref[:, None], settings.beta, settings.kind, smoothing))
        terms.append(term - settings.nll_coef * chosen / len(pair["tokens"][1]))
        margins.append(settings.beta * ((own - ref)[0] - (own - ref)[1]))
        if abs(pair["probability"] - 0.5) > 0.01:
            right.append(margins[-1] > 0)
        kls.append((pair["reference"].sum() - chosen - rejected) / 2)
    assert found["loss"]["value"] == pytest.approx(np.mean(terms), rel=1e-4)
    assert found["margin"]["value"] == pytest.approx(np.mean(margins), rel=1e-4)
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (pytest.approx(np.mean(right)), len(right))
    assert found["kl"]["value"] == pytest.approx(np.mean(kls), rel=1e-4)
    assert (found["n"], found["ties"]) == (len(pairs), len(pairs) - len(right))


def test_kl_is_that_of_the_policy_from_the_reference():
    """On plain draws of a reference with known chances the mean log-ratio is KL(reference || policy)."""
    rng = np.random.default_rng(0)
    reference, policy = np.asarray([0.7, 0.2, 0.1]), np.asarray([0.3, 0.3, 0.4])
    draws = rng.choice(3, (40_000, 2), p=reference)
    pairs = [labelled(str(i), 0.9) | {"reference": row} for i, row in enumerate(np.log(reference)[draws])]
    found = dpo.held_out_metrics(Dpo(), pairs, np.log(policy)[draws])["kl"]
    exact = float(np.sum(reference * np.log(reference / policy)))
    assert found["low"] < exact < found["high"] and found["high"] - found["low"] < 0.05


def test_nothing_held_out_is_no_number():
    found = dpo.held_out_metrics(Dpo(), [], np.zeros((0, 2), np.float32))
    assert found["n"] == 0 and found["accuracy"]["value"] is None and found["loss"]["value"] is None
