"""Log-probs of given tokens without the logits of the whole batch, and sums over masked positions."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from cai_jax.mesh import row_shards

CHUNK = 1024  # tokens a device whose logits exist at once


def as_float(x):
    """x as a floating array of at least float32: integers and half precision are raised, float64 is kept."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def assert_same_shape(*arrays):
    """Raise AssertionError where arrays differ in shape: broadcast, they would give a loss of something else."""
    chex.assert_equal_shape([jnp.asarray(x) for x in arrays])


def masked_fill(x, mask):
    """x (floating, see as_float) where the mask is true and 0 elsewhere, in value and in gradient."""
    return jnp.where(jnp.asarray(mask).astype(bool), as_float(x), 0)


def masked_sum(x, mask):
    """(sum of x where the mask is true, number of those positions): two scalars that add up over microbatches."""
    kept = masked_fill(x, mask)
    return kept.sum(), jnp.asarray(mask).astype(bool).sum(dtype=kept.dtype)


def masked_mean(x, mask):
    """Mean of x where the mask is true; 0 for a mask that is false everywhere."""
    total, count = masked_sum(x, mask)
    return total / jnp.maximum(count, 1)


def token_logprobs(
    hidden_BTD: jax.Array,
    head: Callable[[jax.Array], jax.Array],
    targets_BT: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    chunk: int = CHUNK,
    softcap: float = 0.0,
):
    """Log-prob of each target and entropy of each distribution, with never more than `chunk` rows of logits.

    The logits [B, T, V] are the largest array of a training step; here a slab of positions of all rows is
    projected, reduced and dropped, and projected again in the backward pass. A single slab is kept instead: its
    gradient, which is as large, will exist anyway.

    Args:
      hidden_BTD: final hidden states; position t predicts targets_BT[:, t], so the caller shifts the targets.
      head: hidden [..., D] -> logits [..., V] in float32 (or float64). Its weights may be closed over and
        differentiated. Their gradient is summed over the slabs in the dtype in which head receives them, so a
        cast to half precision belongs inside head.
      targets_BT: token ids. Positions that do not count may hold any id, -100 too: the result there is finite
        and means nothing.
      temperature: divides the (capped) logits, as in sampling; above 0.
      chunk: tokens a device, over its rows, whose logits exist at once.
      softcap: logits become softcap * tanh(logits / softcap); 0 is off (Gemma 2, arXiv 2408.00118, section 2).

    Returns:
      logprobs_BT and entropy_BT, in nats, in the dtype of the logits.
    """
    rows, length, _ = hidden_BTD.shape

    def slab_logprobs(slab):
        hidden, targets = slab
        logits = head(hidden)
        if softcap:
            logits = softcap * jnp.tanh(logits / softcap)
        return logprobs_and_entropy(logits / temperature, targets)

    if slab_width(rows, length, chunk) >= length:
        return slab_logprobs((hidden_BTD, targets_BT))
    slabs = to_slabs(hidden_BTD, chunk), to_slabs(targets_BT, chunk)
    logprobs, entropy = jax.lax.map(jax.checkpoint(slab_logprobs), slabs)
    return from_slabs(logprobs, length), from_slabs(entropy, length)


def slab_width(rows: int, length: int, chunk: int) -> int:
    """Positions of a slab: those of all rows together are about `chunk` tokens a device."""
    return min(length, max(1, chunk * row_shards() // rows))


def to_slabs(x_BT, chunk):
    """[B, T, ...] -> [slabs, B, width, ...]: all rows are in each slab, so that they stay where they are."""
    rows, length = x_BT.shape[:2]
    width = slab_width(rows, length, chunk)
    slabs = -(-length // width)
    padding = [(0, 0), (0, slabs * width - length)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.moveaxis(jnp.pad(x_BT, padding).reshape(rows, slabs, width, *x_BT.shape[2:]), 1, 0)


def from_slabs(x, length):
    """The inverse, without the padding."""
    slabs, rows, width = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(rows, slabs * width, *x.shape[3:])[:, :length]


def logprobs_and_entropy(logits, targets):
    """log softmax(logits)[target] and the entropy of softmax(logits): logits [..., V] -> two arrays [...]."""
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    log_probabilities = logits - log_normalizer[..., None]
    entropy = -(jnp.exp(log_probabilities) * log_probabilities).sum(-1)
    return logits_of(targets, logits) - log_normalizer, entropy


def logits_of(targets, logits):
    """The logit of each target: logits [..., V] -> [...]."""
    # A comparison instead of a gather: it fuses, and it stays local where the vocabulary is sharded.
    is_target = targets[..., None] == jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return jnp.where(is_target, logits, 0).sum(-1)
