"""Filters against transformers', draws against the distribution and against an obvious draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.sampler.sampling import RowSettings, draw, filtered_logits, sample


def settings(rows, **columns):
    """Row settings; a scalar stands for all rows."""
    defaults = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, max_new_tokens=16)
    kinds = dict(top_k=jnp.int32, max_new_tokens=jnp.int32)
    arrays = {
        name: jnp.broadcast_to(jnp.asarray(value, kinds.get(name, jnp.float32)), (rows,))
        for name, value in (defaults | columns).items()
    }
    key = jnp.asarray(np.stack([np.arange(rows), np.arange(rows) + 7], axis=1), jnp.uint32)
    return RowSettings(**arrays, stop=jnp.full((rows, 1), -1), key=key)


FILTERS = {
    "probs_t07": {"temperature": 0.7},
    "probs_k5": {"top_k": 5},
    "probs_p09": {"top_p": 0.9},
    "probs_p05": {"top_p": 0.5},
    "probs_minp01": {"min_p": 0.1},
    "probs_t07_k20_p09": {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "probs_rep13": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_equal_those_of_transformers(oracles, name):
    data = np.load(oracles / "losses" / "sampling_filters.npz")
    rows, vocabulary = data["logits"].shape
    seen = np.zeros((rows, vocabulary), bool)
    seen[np.arange(rows)[:, None], data["prev_ids"]] = True
    filtered = filtered_logits(jnp.asarray(data["logits"]), jnp.asarray(seen), settings(rows, **FILTERS[name]))
    np.testing.assert_allclose(jax.nn.softmax(filtered), data[name], atol=1e-6)


def test_draws_follow_the_distribution():
    logits = jnp.tile(jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05])), (4000, 1))
    tokens, _ = sample(logits, jnp.zeros_like(logits, bool), settings(4000, top_k=3), jnp.full(4000, 2))
    shares = np.bincount(np.asarray(tokens), minlength=4) / 4000
    np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


@pytest.mark.parametrize("vocabulary", [5, 256, 1000])
def test_a_draw_is_where_the_cumulative_probability_passes_the_number(vocabulary):
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(size=(400, vocabulary)).astype(np.float32) * 3
    uniform = rng.random(400).astype(np.float32)
    cumulative = np.cumsum(np.exp(logits.astype(np.float64)), axis=1)
    expected = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(axis=1)
    got = np.asarray(draw(jnp.asarray(logits), jnp.asarray(uniform)))
    assert (got == expected).mean() > 0.99, "float32 may differ at the very edge of a token"
    assert np.abs(got - expected).max() <= 1


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("kept", [[0], [3, 700], [511, 512], [999]])
def test_a_token_that_was_filtered_out_is_never_drawn(uniform, kept):
    """At both ends of the unit interval, where rounding could step past the last token."""
    logits = np.full((1, 1000), -1e30, np.float32)
    logits[0, kept] = np.linspace(-4, 4, len(kept))
    assert int(draw(jnp.asarray(logits), jnp.asarray([uniform], jnp.float32))[0]) in kept


def test_the_key_of_a_token_is_its_row_and_its_place():
    """The same row draws the same token at a place wherever it stands in the batch, and another at another place."""
    logits = jnp.zeros((4, 300))
    row = settings(4)
    same_key = row.replace(key=jnp.tile(row.key[:1], (4, 1)))
    tokens, _ = sample(logits, jnp.zeros_like(logits, bool), same_key, jnp.asarray([5, 5, 6, 7]))
    assert tokens[0] == tokens[1] and len(set(np.asarray(tokens[1:]).tolist())) == 3
