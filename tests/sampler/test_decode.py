"""The jitted programs against transformers' greedy tokens, the full forward pass and the published filters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.models.pretrained import load_model
from cai_jax.models.transformer import forward
from cai_jax.sampler import decode
from cai_jax.sampler.cache import prepare

FAMILIES = (
    "llama_tied", "llama_untied_rope3", "mistral_swa", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3_linear",
)  # fmt: skip


def settings(rows, *, seeds=None, stop=(), **columns):
    """Row settings; a scalar stands for all rows."""
    defaults = dict(
        temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, max_new_tokens=16
    ) | columns  # fmt: skip
    kinds = dict(top_k=jnp.int32, max_new_tokens=jnp.int32)
    arrays = {
        name: jnp.broadcast_to(jnp.asarray(value, kinds.get(name, jnp.float32)), (rows,))
        for name, value in defaults.items()
    }
    seeds = np.arange(rows) if seeds is None else np.asarray(seeds)
    key = jnp.asarray(np.stack([seeds, seeds + 7], axis=1), jnp.uint32)
    stops = jnp.tile(jnp.asarray(list(stop) + [-1], jnp.int32), (rows, 1))
    return decode.RowSettings(**arrays, stop=stops, key=key)


@pytest.fixture(scope="module")
def tiny(oracles):
    model = load_model(oracles / "llama_tied")
    io = np.load(oracles / "llama_tied" / "io.npz")
    return model, prepare(model.config, model.params, "float32"), io


def generate(model, weights, tokens, mask, row_settings, new_tokens=16, prefix=()):
    shared = decode.prefill_prefix(model.config, weights, jnp.asarray(prefix, jnp.int32), "float32")
    out = decode.generate(
        model.config, weights, shared, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, bool), row_settings,
        new_tokens, "float32",
    )  # fmt: skip
    return [np.asarray(x) for x in out]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers(oracles, family):
    model = load_model(oracles / family)
    io = np.load(oracles / family / "io.npz")
    weights = prepare(model.config, model.params, "float32")
    tokens, _, lengths = generate(model, weights, io["left_ids"], io["left_mask"], settings(4, temperature=0.0))
    np.testing.assert_array_equal(tokens, io["greedy_left_new"])
    np.testing.assert_array_equal(lengths, 16)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_sampled_tokens_are_those_of_a_full_forward_pass(tiny, temperature):
    model, weights, io = tiny
    tokens, logprobs, _ = generate(
        model, weights, io["left_ids"], io["left_mask"], settings(4, temperature=temperature, top_p=0.9)
    )
    full = np.concatenate([io["left_ids"], tokens], axis=1)
    mask = np.concatenate([io["left_mask"], np.ones_like(tokens)], axis=1)
    logits = forward(model.config, model.params, jnp.asarray(full), jnp.asarray(mask))
    expected = jax.nn.log_softmax(logits[:, 23:-1] / temperature)
    expected = np.take_along_axis(np.asarray(expected), tokens[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(logprobs, expected, atol=1e-4)


def test_a_row_keeps_its_text_in_any_slot_and_company(tiny):
    model, weights, io = tiny
    alone = None
    for slot in range(4):
        ids, mask = np.roll(io["left_ids"], slot, axis=0), np.roll(io["left_mask"], slot, axis=0)
        if slot:  # other company
            ids = np.where(np.arange(4)[:, None] == slot, ids, (ids + 5 * slot) % 128)
        seeds = np.roll(np.arange(4) * 11, slot)
        out = generate(model, weights, ids, mask, settings(4, seeds=seeds, temperature=1.3))
        row = [x[slot] for x in out]
        alone = alone or row
        for got, expected in zip(row, alone, strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_shared_prefix_changes_no_text(tiny, temperature):
    model, weights, io = tiny
    ids = np.array(io["input_ids"])
    ids[:, :10] = ids[0, :10]
    ones = np.ones_like(ids)
    whole = generate(model, weights, ids, ones, settings(4, temperature=temperature, repetition_penalty=1.2))
    reused = generate(
        model, weights, ids[:, 10:], ones[:, 10:], settings(4, temperature=temperature, repetition_penalty=1.2),
        prefix=ids[0, :10],
    )  # fmt: skip
    np.testing.assert_array_equal(whole[0], reused[0])
    np.testing.assert_allclose(whole[1], reused[1], atol=1e-5)


def test_a_row_ends_at_its_stop_token_which_stays(tiny):
    model, weights, io = tiny
    stop = int(io["greedy_left_new"][0, 3])
    first = int(np.argmax(io["greedy_left_new"][0] == stop))
    tokens, logprobs, lengths = generate(
        model, weights, io["left_ids"], io["left_mask"],
        settings(4, temperature=0.0, stop=[stop], max_new_tokens=[16, 16, 16, 2]),
    )  # fmt: skip
    assert lengths[0] == first + 1 and tokens[0, first] == stop
    assert not tokens[0, first + 1 :].any() and not logprobs[0, first + 1 :].any()
    assert lengths[3] <= 2


def test_settings_are_traced_and_compile_nothing_new(tiny):
    model, weights, io = tiny
    generate(model, weights, io["left_ids"], io["left_mask"], settings(4))
    before = decode.generate._cache_size()
    for columns in ({"temperature": 0.3}, {"top_k": 4}, {"top_p": 0.5}, {"max_new_tokens": 3}, {"min_p": 0.2}):
        generate(model, weights, io["left_ids"], io["left_mask"], settings(4, **columns))
    assert decode.generate._cache_size() == before


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
    filtered = decode.filtered_logits(jnp.asarray(data["logits"]), jnp.asarray(seen), settings(rows, **FILTERS[name]))
    np.testing.assert_allclose(jax.nn.softmax(filtered), data[name], atol=1e-6)


def test_draws_follow_the_distribution():
    logits = jnp.tile(jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05])), (4000, 1))
    row_settings = settings(4000, seeds=np.arange(4000), top_k=3)
    tokens, _ = decode.sample(logits, jnp.zeros_like(logits, bool), row_settings, jnp.int32(2))
    shares = np.bincount(np.asarray(tokens), minlength=4) / 4000
    np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_options_are_scored_as_if_each_stood_alone(tiny):
    model, weights, io = tiny
    options = [[5, 9, 17], [44], [9, 5]]
    packed = {
        "tokens": np.array([[5, 9, 17, 44, 9, 5, 0, 0]] * 4),
        "segment": np.array([[1, 1, 1, 2, 3, 3, 0, 0]] * 4),
        "offset": np.array([[0, 1, 2, 0, 0, 1, 0, 0]] * 4),
    }
    shared = decode.prefill_prefix(model.config, weights, jnp.zeros(0, jnp.int32), "float32")
    got = decode.score(
        model.config, weights, shared, jnp.asarray(io["left_ids"], jnp.int32), jnp.asarray(io["left_mask"], bool),
        jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), packed), "float32",
    )  # fmt: skip
    expected = []
    for option in options:
        full = np.concatenate([io["left_ids"], np.tile(option, (4, 1))], axis=1)
        mask = np.concatenate([io["left_mask"], np.ones((4, len(option)), int)], axis=1)
        logits = forward(model.config, model.params, jnp.asarray(full), jnp.asarray(mask))
        logprobs = np.asarray(jax.nn.log_softmax(logits[:, 23:-1]))
        expected.append(np.take_along_axis(logprobs, np.tile(option, (4, 1))[..., None], axis=2)[..., 0])
    np.testing.assert_allclose(got[:, :6], np.concatenate(expected, axis=1), atol=1e-4)
