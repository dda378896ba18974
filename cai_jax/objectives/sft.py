"""Fine-tuning: negative log-likelihood of the tokens that the mask marks, and KL to a reference where it says so."""

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

# Tokens a device whose logits exist at once where the weights of the head do not train. Few, as only slabs in which
# a token counts are computed; where they train (then `logprobs.CHUNK`) each slab adds a whole gradient of them.
CHUNK_OF_A_FROZEN_HEAD = 256


def token_loss(logprobs_BT, mask_BT):
    """Mean negative log-prob, in nats, over the marked tokens of the whole batch (not a mean of row means)."""
    assert_same_shape(logprobs_BT, mask_BT)
    return masked_mean(-masked_fill(logprobs_BT, mask_BT), mask_BT)


def token_loss_sums(logprobs_BT, mask_BT):
    """(summed negative log-prob, tokens): what a step adds up over microbatches before it divides."""
    total, count = masked_sum(logprobs_BT, mask_BT)
    return -total, count


def nll_sum(head, weights, hidden_BTD, targets_BT, mask_BT, chunk: int = 0):
    """Sum of -log softmax(head(weights, hidden))[target] over the masked positions, a float32 scalar.

    As `logprobs.token_logprobs`, but the gradient is made slab by slab in the forward pass, while the logits are
    there, and only scaled in the backward pass: three products with the vocabulary instead of four. It can be so
    because the weight of every token is known beforehand. So is which tokens count: each row's are put first, and
    slabs without one are not computed.

    Args:
      head: (weights, hidden [..., D]) -> logits [..., V] in float32; a cast of the weights belongs inside.
      weights: a dict of leaves by their names in the parameters. Where all are frozen, their gradient is not computed.
      hidden_BTD, targets_BT: see logprobs.token_logprobs.
      mask_BT: true or 1 where a token counts.
      chunk: tokens a device whose logits exist at once; 0: few where the weights are frozen, else `logprobs.CHUNK`.
    """
    hidden_BTD, *arrays = _counted_first(mask_BT, hidden_BTD, targets_BT, mask_BT)
    return _slab_sum(partial(_nll, head), weights, hidden_BTD, tuple(arrays), (), chunk)[0]


def anchored_sum(head, weights, hidden_BTD, targets_BT, mask_BT, reference, coef: float, chunk: int = 0):
    """As `nll_sum` where the mask is 1; where it is 2, `coef` times the KL from a reference model's distribution.

    A sampled token is one draw of its distribution; the KL is the mean over all draws, so it has none of their noise,
    and its gradient is zero where the model still is the reference (Hinton et al. 2015, arXiv 1503.02531, section 2, at
    temperature 1).

    Args:
      reference: (weights, hidden_BTD) of the reference model, from which no gradient is taken.

    Returns:
      The loss and, without gradient, the summed KL of the positions marked 2, in nats, without `coef`.
    """
    reference_weights, reference_BTD = reference
    hidden_BTD, *arrays = _counted_first(mask_BT, hidden_BTD, targets_BT, mask_BT, reference_BTD)
    return _slab_sum(partial(_nll_and_kl, head, coef), weights, hidden_BTD, tuple(arrays), reference_weights, chunk)


def _counted_first(mask_BT, *arrays):
    """The arrays [B, T, ...] with each row's positions in another order: first those where the mask is not 0."""
    order_BT = jnp.argsort(mask_BT == 0, axis=1)

    def ordered(x):
        return jnp.take_along_axis(x, order_BT.reshape(order_BT.shape + (1,) * (x.ndim - 2)), axis=1)

    return [ordered(x) for x in arrays]


def _nll(head, weights, hidden, fixed, targets, mask):
    logits = head(weights, hidden)
    return token_loss_sums(logits_of(targets, logits) - jax.nn.logsumexp(logits, axis=-1), mask)[0], jnp.float32(0)


def _nll_and_kl(head, coef, weights, hidden, reference_weights, targets, mask, reference_hidden):
    logits = head(weights, hidden)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    nll = token_loss_sums(logits_of(targets, logits) - normalizer, mask == 1)[0]
    wanted = jax.nn.log_softmax(head(reference_weights, reference_hidden))
    kl = (jnp.exp(wanted) * (wanted - logits)).sum(-1) + normalizer
    kl, _ = masked_sum(kl, mask == 2)
    return nll + coef * kl, kl


@partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def _slab_sum(slab_loss, weights, hidden_BTD, arrays, fixed, chunk):
    """The sums of `slab_loss(weights, hidden, fixed, targets, mask, ...) -> (loss, metric)` over slabs of positions.

    `arrays` are targets, mask and what else there is; a slab whose mask is 0 everywhere is not computed. Only the loss,
    and of it only `weights` and `hidden_BTD`, have a gradient.
    """
    hidden, *slabs = [to_slabs(x, chunk or CHUNK_OF_A_FROZEN_HEAD) for x in (hidden_BTD, *arrays)]
    nothing = jnp.float32(0), jnp.float32(0)

    def sums(slab):
        return jax.lax.cond(_counts(slab), lambda: slab_loss(weights, slab[0], fixed, *slab[1:]), lambda: nothing)

    losses, metrics = jax.lax.map(sums, (hidden, *slabs))
    return losses.sum(), metrics.sum()


def _slab_sum_forward(slab_loss, weights, hidden_BTD, arrays, fixed, chunk):
    trained = any(leaf.perturbed for leaf in jax.tree.leaves(weights, is_leaf=_is_primal))
    weights, hidden_BTD, arrays, fixed = jax.tree.map(
        lambda leaf: leaf.value, (weights, hidden_BTD, arrays, fixed), is_leaf=_is_primal
    )
    chunk = chunk or (CHUNK if trained else CHUNK_OF_A_FROZEN_HEAD)
    slabs = [to_slabs(x, chunk) for x in (hidden_BTD, *arrays)]
    differentiate = jax.value_and_grad(slab_loss, argnums=(0, 1) if trained else (1,), has_aux=True)

    def add(total, slab):
        return jax.lax.cond(_counts(slab), added, lambda total, slab: (total, jnp.zeros_like(slab[0])), total, slab)

    def added(total, slab):
        hidden, *others = slab
        sums, (*of_weights, of_hidden) = differentiate(weights, hidden, fixed, *others)
        total = jax.tree.map(jnp.add, total, (sums, [jax.tree.map(as_float, tree) for tree in of_weights]))
        return (total[0], [by_table(tree) for tree in total[1]]), of_hidden

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, as_float(leaf).dtype), weights)
    start = (jnp.float32(0), jnp.float32(0)), [by_table(zeros)] if trained else []
    (sums, of_weights), of_hidden = jax.lax.scan(add, start, slabs)
    of_weights = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), of_weights[0], weights) if trained else None
    return sums, (of_weights, from_slabs(of_hidden, hidden_BTD.shape[1]))


def _counts(slab):
    """Whether a token of a slab counts; its arrays are hidden states, targets and the mask."""
    return jnp.any(slab[2] != 0)


def _slab_sum_backward(slab_loss, chunk, gradients, scales):
    scaled = jax.tree.map(lambda x: (x * scales[0]).astype(x.dtype), gradients)
    return *scaled, None, None


def _is_primal(leaf):
    return hasattr(leaf, "perturbed")


_slab_sum.defvjp(_slab_sum_forward, _slab_sum_backward, symbolic_zeros=True)
