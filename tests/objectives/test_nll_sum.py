"""The loss whose gradient is made in the forward pass: equal to the plain one, without the logits of all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.objectives.logprobs import token_logprobs
from cai_jax.objectives.sft import anchored_sum, nll_sum, token_loss_sums

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


def test_only_slabs_with_a_token_that_counts_are_projected():
    weights, hidden, targets, _ = arrays()
    mask = np.zeros((B, T), int)
    mask[0, [1, 4, 6]] = mask[1, 5] = 1
    seen = []

    def watched(weights, hidden):
        jax.debug.callback(seen.append, hidden[..., 0])
        return head(weights, hidden)

    jax.block_until_ready(jax.grad(nll_sum, argnums=2)(watched, weights, hidden, targets, mask, B))
    jax.effects_barrier()
    assert len(seen) == 3  # slabs of a position a row: the row with most that count has three
    assert {float(x) for x in hidden[0, [1, 4, 6], 0]} <= {float(x) for slab in seen for x in np.ravel(slab)}


def reference_of(weights, hidden):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.standard_normal(x.shape), x.dtype), (weights, hidden))


@pytest.mark.parametrize("chunk", [1, 6, 1000])
def test_an_anchor_is_the_kl_of_whole_distributions(chunk):
    weights, hidden, targets, mask = arrays()
    marks = np.random.default_rng(2).integers(0, 3, (B, T))
    reference = reference_of(weights, hidden)
    wanted = jax.nn.log_softmax(head(*reference))

    def plain(weights, hidden):
        logprobs = jax.nn.log_softmax(head(weights, hidden))
        nll = -jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
        kl = (jnp.exp(wanted) * (wanted - logprobs)).sum(-1)
        return jnp.sum(nll * (marks == 1)) + 0.7 * jnp.sum(kl * (marks == 2)), jnp.sum(kl * (marks == 2))

    def ours(weights, hidden):
        return anchored_sum(head, weights, hidden, targets, marks, reference, 0.7, chunk)

    want, want_gradients = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(weights, hidden)
    got, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(weights, hidden)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_an_anchor_pulls_nowhere_from_the_reference_itself():
    """A drawn token would: its gradient is zero only on average over draws."""
    weights, hidden, targets, _ = arrays()

    def loss(weights, hidden, marks):
        return anchored_sum(head, weights, hidden, targets, marks, (weights, hidden), 3.0)

    marks = np.full((B, T), 2)
    gradients, kl = jax.grad(loss, argnums=(0, 1), has_aux=True)(weights, hidden, marks)
    assert abs(kl) < 1e-5 and all(np.abs(leaf).max() < 1e-5 for leaf in jax.tree.leaves(gradients))
    drawn, _ = jax.grad(loss, argnums=(0, 1), has_aux=True)(weights, hidden, marks - 1)
    assert all(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(drawn))


def test_the_gradient_of_an_anchor_is_the_mean_over_drawn_tokens():
    weights, hidden, _, _ = arrays()
    reference = reference_of(weights, hidden)
    chances = np.asarray(jax.nn.softmax(head(*reference)))
    ones = np.ones((B, T), int)

    def of_token(token):
        gradient = jax.grad(nll_sum, argnums=2)(head, weights, hidden, ones * token, ones)
        return gradient * chances[..., token, None]

    mean = sum(of_token(token) for token in range(V))
    of_kl = jax.grad(lambda h: anchored_sum(head, weights, h, ones, 2 * ones, reference, 1.0)[0])(hidden)
    np.testing.assert_allclose(of_kl, mean, atol=1e-5)
