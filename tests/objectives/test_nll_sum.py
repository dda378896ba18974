"""The loss whose gradient is made in the forward pass: equal to the plain one, without the logits of all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.objectives.logprobs import token_logprobs
from cai_jax.objectives.sft import nll_sum, token_loss_sums

B, T, D, V = 3, 7, 4, 11


def arrays():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    weights = {"lm_head": jnp.asarray(rng.standard_normal((D, V)), jnp.float32)}
    return weights, hidden, rng.integers(0, V, (B, T)).astype(np.int32), rng.integers(0, 2, (B, T))


def head(weights, hidden):
    return hidden @ weights["lm_head"]


@pytest.mark.parametrize("chunk", [1, 6, 1000])
def test_value_and_gradients_are_those_of_the_log_probs(chunk):
    weights, hidden, targets, mask = arrays()

    def plain(weights, hidden):
        logprobs, _ = token_logprobs(hidden, lambda h: head(weights, h), targets, chunk=chunk)
        return 0.3 * token_loss_sums(logprobs, mask)[0]

    def ours(weights, hidden):
        return 0.3 * nll_sum(head, weights, hidden, targets, mask, chunk)

    want, want_gradients = jax.value_and_grad(plain, argnums=(0, 1))(weights, hidden)
    got, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(weights, hidden)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(ours(weights, hidden), want, rtol=1e-6)  # not differentiated: another path
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def products(function, *arguments) -> int:
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general")


def test_three_products_with_the_vocabulary_and_two_where_it_is_frozen():
    weights, hidden, targets, mask = arrays()

    def loss(weights, hidden):
        return nll_sum(head, weights, hidden, targets, mask, 6)

    assert products(jax.grad(loss, argnums=(0, 1)), weights, hidden) == 3
    assert products(jax.grad(loss, argnums=1), weights, hidden) == 2


def test_no_array_of_all_logits():
    weights, hidden, targets, mask = arrays()
    text = str(jax.make_jaxpr(jax.grad(nll_sum, argnums=(1, 2)), static_argnums=(0, 5))(
        head, weights, hidden, targets, mask, 6))  # fmt: skip
    assert f"f32[{B},2,{V}]" in text and f"f32[{B},{T},{V}]" not in text


def test_masked_positions_have_no_gradient():
    weights, hidden, targets, mask = arrays()
    mask[0] = 0
    of_hidden = jax.grad(nll_sum, argnums=2)(head, weights, hidden, targets, mask, 6)
    assert (np.asarray(of_hidden)[mask == 0] == 0).all() and (np.asarray(of_hidden)[mask > 0] != 0).any()
