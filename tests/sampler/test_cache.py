"""The cache has an order of axes for each kind of device, and a way to write them: all of them are the same cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax import Sampler, load_model
from cai_jax.config import Sampling
from cai_jax.models.families import ModelConfig
from cai_jax.sampler import cache as caches
from cai_jax.sampler.cache import BLOCK, STRIP, Strips, append, as_entries, empty_cache

CHATS = [[{"role": "user", "content": text}] for text in ("Hi", "What is a tide?", "Why is " + "the sea " * 40 + "so?")]
PREFIX = [{"role": "user", "content": "Be brief."}, {"role": "assistant", "content": "I will."}]


@pytest.fixture(scope="module")
def model():
    return load_model("random:llama")


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_texts_and_scores_do_not_depend_on_the_order_of_a_platform(model, platform, int8, monkeypatch):
    def answers():
        sampler = Sampler(model, max_length=300, rows=4, int8_cache=int8)
        drawn = sampler.generate(CHATS, Sampling(max_new_tokens=6), seed=3, prefix=PREFIX)
        return sampler._cache.own[0].orders, drawn, np.asarray(sampler.score(CHATS, ["Yes, of course.", "No."], PREFIX))

    orders, drawn, scores = answers()
    monkeypatch.setattr(caches, "platform_of", lambda mesh: platform)
    others, also_drawn, also_scores = answers()
    assert orders != others
    assert [sample.tokens for sample in also_drawn] == [sample.tokens for sample in drawn]
    np.testing.assert_allclose(also_scores, scores, atol=2e-4)


@pytest.mark.parametrize("length", [1, STRIP])
def test_all_strips_at_once_are_the_strips_one_by_one(model, length):
    """Windows that begin before the new tokens, a strip with none, two strips of one slot, the last block."""
    config: ModelConfig = model.config
    slots, starts = [2, 0, 2, 1], [0, BLOCK + length, 2 * BLOCK, STRIP]
    real = np.arange(length) >= np.asarray([0, length // 2, 0, length])[:, None]  # of the last strip nothing
    strips = Strips(*map(jnp.asarray, (np.zeros((4, length), np.int32), real, slots, starts, [0] * 4, [0] * 4)))
    shape = config.n_kv_heads, 4, length, config.head_dim
    found = {}
    for platform in ("gpu", "tpu"):
        layers = empty_cache(config, 3, 3 * BLOCK, (0,), "float32", platform).own
        layers = jax.tree.map(lambda array: array + 7.0, layers)
        rng = np.random.default_rng(0)
        new = tuple(as_entries(own, *rng.normal(size=(2, *shape)).astype(np.float32)) for own in layers)
        written = append(strips, layers, new)
        axes = [own.orders[0] for own in written]
        found[platform] = [
            np.einsum(f"{order}->zqksn", own.keys)[:-1] for order, own in zip(axes, written, strict=True)
        ]  # the last block is never read
    assert any((layer != 7.0).any() for layer in found["gpu"])
    for at_once, one_by_one in zip(found["gpu"], found["tpu"], strict=True):
        np.testing.assert_array_equal(at_once, one_by_one)
