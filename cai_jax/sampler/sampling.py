"""Drawing one token a row from logits: settings, filters, and a draw that reads the vocabulary once."""

import flax.struct
import jax
import jax.numpy as jnp

from cai_jax.models.attention import NEGATIVE

SPAN = 256  # tokens of the vocabulary whose probabilities are summed first


@flax.struct.dataclass
class RowSettings:
    """How each row is sampled; everything is traced, so no value of it compiles a new program."""

    temperature: jax.Array  # [B], 0 is greedy
    top_k: jax.Array  # [B], 0 is off
    top_p: jax.Array  # [B], 1 is off
    min_p: jax.Array  # [B], 0 is off
    repetition_penalty: jax.Array  # [B], 1 is off
    max_new_tokens: jax.Array  # [B]
    stop: jax.Array  # [B, X] token ids that end a row, padded with -1
    key: jax.Array  # [B, 2] uint32, the row key


def sample(logits_BV, seen_BV, settings: RowSettings, drawn_B):
    """One token a row and its log-prob. The key of a token is fold_in(row key, tokens drawn before it)."""
    greedy_B = settings.temperature == 0
    scaled_BV = logits_BV / jnp.where(greedy_B, 1.0, settings.temperature)[:, None]
    needs_filter = jnp.any(
        (settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0) | (settings.repetition_penalty != 1)
    )
    choice_BV = jax.lax.cond(needs_filter, lambda: filtered_logits(logits_BV, seen_BV, settings), lambda: scaled_BV)

    def uniform(key, drawn):
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), drawn))

    drawn_B = jax.lax.cond(
        jnp.all(greedy_B),
        lambda: jnp.zeros(greedy_B.shape, jnp.int32),
        lambda: draw(choice_BV, jax.vmap(uniform)(settings.key, drawn_B)),
    )
    token_B = jnp.where(greedy_B, jnp.argmax(choice_BV, axis=-1), drawn_B).astype(jnp.int32)
    return token_B, pick(jax.nn.log_softmax(scaled_BV), token_B)


def draw(logits_BV, uniform_B):
    """The token at which the cumulative probability passes `uniform_B` (0 to 1): one random number a row.

    Sums over spans of the vocabulary come first, then those inside the span that is hit. Noise for every entry, the
    other way to draw, costs a third of a decoding step of a small model on a CPU (benchmarks/products.py).
    """
    rows, vocabulary = logits_BV.shape
    spans = -(-vocabulary // SPAN)
    padded_BV = jnp.pad(logits_BV, ((0, 0), (0, spans * SPAN - vocabulary)), constant_values=NEGATIVE)
    mass_BZS = jnp.exp(padded_BV - jnp.max(padded_BV, axis=1, keepdims=True)).reshape(rows, spans, SPAN)
    until_BZ = jnp.cumsum(jnp.sum(mass_BZS, axis=2), axis=1)
    target_B = uniform_B * until_BZ[:, -1]
    span_B = _first_above(until_BZ, target_B)
    before_B = jnp.where(span_B > 0, pick(until_BZ, jnp.maximum(span_B - 1, 0)), 0)
    mass_BS = jnp.take_along_axis(mass_BZS, span_B[:, None, None], axis=1)[:, 0]
    return span_B * SPAN + _first_above(jnp.cumsum(mass_BS, axis=1), target_B - before_B)


def _first_above(until_BX, target_B):
    """The first place whose cumulative sum exceeds the target; where rounding left none, the last that adds to it."""
    place_B = jnp.sum(until_BX <= target_B[:, None], axis=1)
    last_B = jnp.argmax(until_BX >= until_BX[:, -1:], axis=1)
    return jnp.minimum(place_B, last_B)


def filtered_logits(logits_BV, seen_BV, settings: RowSettings):
    """Logits after repetition penalty, temperature, top-k, top-p and min-p, in that order; dropped ones at -1e30."""
    penalty_B1 = settings.repetition_penalty[:, None]
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    logits_BV = logits_BV / jnp.where(settings.temperature == 0, 1.0, settings.temperature)[:, None]

    def keep_above(logits_BV, weights_BV, target_B, off_B):
        floor_B = highest_floor(logits_BV, weights_BV, target_B)
        return jnp.where((logits_BV >= floor_B[:, None]) | off_B[:, None], logits_BV, NEGATIVE)

    def top_k(logits_BV):
        off_B = settings.top_k <= 0
        count_B = jnp.where(off_B, logits_BV.shape[-1], settings.top_k).astype(jnp.float32)
        return keep_above(logits_BV, jnp.ones_like(logits_BV), count_B, off_B)

    def top_p(logits_BV):
        return keep_above(logits_BV, jax.nn.softmax(logits_BV), settings.top_p, settings.top_p >= 1)

    def min_p(logits_BV):
        probability_BV = jax.nn.softmax(logits_BV)
        enough_BV = probability_BV >= settings.min_p[:, None] * jnp.max(probability_BV, axis=-1, keepdims=True)
        return jnp.where(enough_BV, logits_BV, NEGATIVE)

    for used_B, filtered in ((settings.top_k > 0, top_k), (settings.top_p < 1, top_p), (settings.min_p > 0, min_p)):
        logits_BV = jax.lax.cond(jnp.any(used_B), filtered, lambda logits_BV: logits_BV, logits_BV)
    return logits_BV


def highest_floor(x_BV, weights_BV, target_B):
    """The highest value such that the weights of all entries at or above it add up to the target, `[B]`.

    With weights of one it is the k-th largest entry, with probabilities the floor of top-p. Found bit by bit, 32
    sums over the row, for a sort of the vocabulary takes longer than a decoding step on a CPU (benchmarks/products.py).
    Entries equal to the floor stand or fall together.
    """
    bits_BV = jax.lax.bitcast_convert_type(x_BV.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ordered_BV = jnp.where(bits_BV & sign, ~bits_BV, bits_BV | sign)  # the order of floats as unsigned ints

    def try_bit(i, floor_B):
        higher_B = floor_B | (sign >> i.astype(jnp.uint32))
        weight_B = jnp.sum(jnp.where(ordered_BV >= higher_B[:, None], weights_BV, 0), axis=-1)
        return jnp.where(weight_B >= target_B, higher_B, floor_B)

    floor_B = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(x_BV.shape[0], jnp.uint32))
    floor_B = jnp.where(floor_B & sign, floor_B ^ sign, ~floor_B)
    found_B = jax.lax.bitcast_convert_type(floor_B, jnp.float32)
    return jnp.where(jnp.isnan(found_B), -jnp.inf, found_B)  # no such value: rounding kept the sum below the target


def pick(x_BV, token_B):
    """The entry of each row at its token, `[B]`."""
    return jnp.take_along_axis(x_BV, token_B[:, None], axis=-1)[:, 0]
