"""Losses through a small model: value and gradient as recorded from other libraries."""

import jax
import numpy as np
import pytest

from cai_jax import load_model
from cai_jax.models.heads import reward
from cai_jax.models.transformer import positions_from_mask
from cai_jax.objectives import dpo, pairwise
from cai_jax.objectives.logprobs import masked_fill
from cai_jax.objectives.model_losses import completion_logprobs, sft_objective


@pytest.fixture(autouse=True)
def strict_ranks():
    """In place of the fixture of this name: the decoder leans on rank promotion, the losses do not."""


def norm(tree):
    return np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree)))


def test_sft_loss_and_gradient(oracle, oracles):
    want = oracle("sft_nll")
    model = load_model(oracles / "llama_tied")
    positions_BT = positions_from_mask(want["input_ids"], want["attention_mask"])
    batch = {
        "tokens": want["input_ids"],
        "positions": positions_BT,
        "segments": want["attention_mask"],
        "targets": (want["labels"] != -100).astype(np.int32),
    }
    objective = sft_objective(model.config)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        loss, count, _ = objective(params, batch)
        return loss / count

    loss, gradient = mean_loss(model.params)
    np.testing.assert_allclose(loss, want["loss"], atol=1e-5)
    np.testing.assert_allclose(gradient["embed"], want["grad_embed"], atol=1e-5)
    np.testing.assert_allclose(norm(gradient), want["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("name", ["bt_plain", "bt_margin"])
def test_reward_loss_and_gradient(oracle, oracles, name):
    want = oracle(name)
    model = load_model(oracles / "llama_tied_reward")

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        scores_B = reward(model.config, params, want["input_ids"], want["attention_mask"])
        return pairwise.bradley_terry(*scores_B.reshape(2, -1), margin_B=want["margin"])

    value, gradient = loss(model.params)
    np.testing.assert_allclose(value, want["loss"], atol=1e-5)
    np.testing.assert_allclose(np.reshape(gradient["score"], (1, -1)), want["grad_score"], atol=1e-4)


def test_dpo_loss_and_gradient(oracle, oracles):
    want = oracle("dpo_sigmoid")
    tokens_BT, mask_BT = want["input_ids"], want["completion_mask"][:, 1:]
    policy, reference = load_model(oracles / "llama_tied"), load_model(oracles / "llama_tied_ref")

    def response_logprobs(model, params):
        positions_BT = positions_from_mask(tokens_BT, want["attention_mask"])
        logprobs_BN, _ = completion_logprobs(model.config, params, tokens_BT, positions_BT, mask_BT)
        return masked_fill(logprobs_BN, mask_BT).sum(1).reshape(2, -1)

    ref_chosen_B, ref_rejected_B = response_logprobs(reference, reference.params)
    np.testing.assert_allclose(ref_chosen_B, want["ref_chosen_logps"], atol=1e-4)
    np.testing.assert_allclose(ref_rejected_B, want["ref_rejected_logps"], atol=1e-4)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        chosen_B, rejected_B = response_logprobs(policy, params)
        return dpo.loss(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, float(want["beta"]))

    value, gradient = loss(policy.params)
    np.testing.assert_allclose(value, want["loss"], atol=1e-5)
    np.testing.assert_allclose(gradient["embed"], want["grad_embed"], atol=1e-4)
