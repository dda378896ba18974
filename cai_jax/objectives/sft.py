"""Fine-tuning: negative log-likelihood of the tokens that the mask marks."""

from functools import partial

import jax
import jax.numpy as jnp

from cai_jax.mesh import by_table

from .logprobs import (
    CHUNK,
    as_float,
    assert_same_shape,
    from_slabs,
    logits_of,
    masked_fill,
    masked_mean,
    masked_sum,
    to_slabs,
)


def token_loss(logprobs_BT, mask_BT):
    """Mean negative log-prob, in nats, over the marked tokens of the whole batch (not a mean of row means)."""
    assert_same_shape(logprobs_BT, mask_BT)
    return masked_mean(-masked_fill(logprobs_BT, mask_BT), mask_BT)


def token_loss_sums(logprobs_BT, mask_BT):
    """(summed negative log-prob, tokens): what a step adds up over microbatches before it divides."""
    total, count = masked_sum(logprobs_BT, mask_BT)
    return -total, count


@partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def nll_sum(head, weights, hidden_BTD, targets_BT, mask_BT, chunk: int = CHUNK):
    """Sum of -log softmax(head(weights, hidden))[target] over the masked positions, a float32 scalar.

    As `logprobs.token_logprobs`, but the gradient is made slab by slab in the forward pass, while the logits are
    there, and only scaled in the backward pass: three products with the vocabulary instead of four. It can be so
    because the weight of every token is known beforehand.

    Args:
      head: (weights, hidden [..., D]) -> logits [..., V] in float32; a cast of the weights belongs inside.
      weights: a dict of leaves by their names in the parameters. Where all are frozen, their gradient is not computed.
      hidden_BTD, targets_BT, chunk: see logprobs.token_logprobs.
      mask_BT: true or 1 where a token counts.
    """
    slabs = [to_slabs(x, chunk) for x in (hidden_BTD, targets_BT, mask_BT)]
    losses = jax.lax.map(lambda slab: _slab_nll(head, weights, *slab), slabs)
    return losses.sum()


def _slab_nll(head, weights, hidden, targets, mask):
    logits = head(weights, hidden)
    return token_loss_sums(logits_of(targets, logits) - jax.nn.logsumexp(logits, axis=-1), mask)[0]


def _nll_forward(head, weights, hidden_BTD, targets_BT, mask_BT, chunk):
    trained = any(leaf.perturbed for leaf in jax.tree.leaves(weights, is_leaf=_is_primal))
    weights = jax.tree.map(lambda leaf: leaf.value, weights, is_leaf=_is_primal)
    hidden_BTD = hidden_BTD.value
    slabs = [to_slabs(x, chunk) for x in (hidden_BTD, targets_BT.value, mask_BT.value)]
    differentiate = jax.value_and_grad(partial(_slab_nll, head), argnums=(0, 1) if trained else (1,))

    def add(total, slab):
        loss, (*of_weights, of_hidden) = differentiate(weights, *slab)
        more = loss, *(jax.tree.map(as_float, tree) for tree in of_weights)
        total = jax.tree.map(jnp.add, total, more)
        return (total[0], *map(by_table, total[1:])), of_hidden

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, as_float(leaf).dtype), weights)
    start = jnp.zeros((), jnp.float32), *([by_table(zeros)] if trained else [])
    (loss, *of_weights), of_hidden = jax.lax.scan(add, start, slabs)
    of_weights = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), of_weights[0], weights) if trained else None
    return loss, (of_weights, from_slabs(of_hidden, hidden_BTD.shape[1]))


def _nll_backward(head, chunk, gradients, scale):
    scaled = jax.tree.map(lambda x: (x * scale).astype(x.dtype), gradients)
    return *scaled, None, None


def _is_primal(leaf):
    return hasattr(leaf, "perturbed")


nll_sum.defvjp(_nll_forward, _nll_backward, symbolic_zeros=True)
