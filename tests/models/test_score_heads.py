"""Several score heads on one decoder: each a reward model of its own, their mean the score, kept in the folder."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import AutoConfig

from cai_jax import load_model, reward, reward_heads, save_model
from cai_jax.errors import UserError
from cai_jax.models.heads import cautious, values, with_one_head
from cai_jax.models.transformer import positions_from_mask

ORACLES = Path(__file__).parents[1] / "oracles"
quick = {fn: jax.jit(fn, static_argnums=0) for fn in (reward, reward_heads, values)}


@pytest.fixture(scope="module")
def ensemble():
    return load_model(ORACLES / "mistral_swa", kind="reward", new_head=True, heads=3)


def texts(rows=4, length=12):
    rng = np.random.default_rng(0)
    return [rng.integers(3, 90, rng.integers(4, length + 1)).tolist() for _ in range(rows)]


def padded(rows, length, left=False):
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for row, own in enumerate(rows):
        place = slice(length - len(own), length) if left else slice(0, len(own))
        tokens[row, place], mask[row, place] = own, 1
    return tokens, mask


def test_each_head_is_the_reward_model_that_it_would_be_alone(ensemble):
    tokens, mask = padded(texts(), 12)
    together = np.asarray(quick[reward_heads](ensemble.config, ensemble.params, tokens, mask))
    assert together.shape == (4, 3) and together.dtype == np.float32
    config = replace(ensemble.config, score_heads=1)
    for head in range(3):
        alone = {**ensemble.params, "score": ensemble.params["score"][:, head : head + 1]}
        np.testing.assert_allclose(quick[reward](config, alone, tokens, mask), together[:, head], atol=1e-5)
    mean = quick[reward](ensemble.config, ensemble.params, tokens, mask)
    np.testing.assert_allclose(mean, together.mean(axis=1), atol=1e-6)
    assert np.ptp(together, axis=1).min() > 1e-3, "heads that start apart"


def test_scores_do_not_depend_on_padding_its_side_or_the_other_rows(ensemble):
    rows = texts()
    expected = np.asarray(quick[reward_heads](ensemble.config, ensemble.params, *padded(rows, 12)))
    for length, left in ((12, True), (29, False), (29, True)):
        got = quick[reward_heads](ensemble.config, ensemble.params, *padded(rows, length, left))
        np.testing.assert_allclose(got, expected, atol=2e-5)
    for row, own in enumerate(rows):
        got = quick[reward_heads](ensemble.config, ensemble.params, *padded([own], 16))
        np.testing.assert_allclose(got[0], expected[row], atol=2e-5)


def test_a_folder_keeps_its_heads_and_says_what_they_are(ensemble, tmp_path):
    save_model(tmp_path / "m", ensemble.config, ensemble.params, None, ensemble.hf_config, "reward")
    again = load_model(tmp_path / "m")
    assert again.kind == "reward" and again.config.score_heads == 3
    np.testing.assert_array_equal(again.params["score"], ensemble.params["score"])
    theirs = AutoConfig.from_pretrained(tmp_path / "m")
    assert theirs.num_labels == 3 and theirs.problem_type == "regression"
    kept = load_model(tmp_path / "m", kind="reward", new_head=True, heads=3, seed=9)
    np.testing.assert_array_equal(kept.params["score"], ensemble.params["score"])
    with pytest.raises(UserError, match="3 score head.*not the 1 asked for"):
        load_model(tmp_path / "m", kind="reward", new_head=True)


def test_a_classifier_is_no_ensemble(ensemble, tmp_path):
    save_model(tmp_path / "m", ensemble.config, ensemble.params, None, ensemble.hf_config, "reward")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["problem_type"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="3 outputs.*not a classifier") as refused:
        load_model(tmp_path / "m")
    assert "\n" not in str(refused.value)


def test_one_head_is_the_head_and_the_folder_that_it_was(tmp_path):
    one = load_model(ORACLES / "mistral_swa", kind="reward", new_head=True)
    three = load_model(ORACLES / "mistral_swa", kind="reward", new_head=True, heads=3)
    np.testing.assert_array_equal(one.params["score"][:, 0], three.params["score"][:, 0])
    assert one.hash != three.hash
    save_model(tmp_path / "m", one.config, one.params, None, one.hf_config, "reward")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0"} and "problem_type" not in config


def test_a_value_model_of_one_head_starts_as_the_mean(ensemble):
    tokens, mask = padded(texts(), 12)
    positions = positions_from_mask(tokens, mask)
    started = with_one_head(ensemble.params)
    assert started["score"].shape == (64, 1)
    one = quick[values](replace(ensemble.config, score_heads=1), started, tokens, positions)
    many = quick[values](ensemble.config, ensemble.params, tokens, positions)
    np.testing.assert_allclose(np.where(mask, one, 0), np.where(mask, many, 0), atol=1e-5)


def test_a_cautious_score_pays_for_disagreement():
    scores = np.asarray([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]], np.float32)
    np.testing.assert_allclose(cautious(scores, 0.0), [1, 1])
    np.testing.assert_allclose(cautious(scores, 0.5), [1, 1 - 0.5 * np.sqrt(2 / 3)], rtol=1e-6)
    np.testing.assert_array_equal(cautious(scores[:, :1], 5.0), [1, 0])
