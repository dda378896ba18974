"""int8 weights and cache: half the bytes or less, and an error that stays where it was measured."""

import jax
import numpy as np
import pytest

from cai_jax import Sampler, load_model
from cai_jax.models import kernels
from cai_jax.sampler.cache import cache_bytes

CHATS = [[{"role": "user", "content": text}] for text in ("Hi", "What is a tide, and why does it come twice a day?")]
OPTIONS = ["Yes, of course.", "No.", "Perhaps it is the moon."]


@pytest.fixture(scope="module")
def model():
    return load_model("random:llama")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_quantized_kernel_is_within_half_a_step(transposed):
    kernel_LIO = jax.random.normal(jax.random.key(0), (2, 64, 48))
    kernel = kernels.Transposed(kernel_LIO.swapaxes(1, 2)) if transposed else kernel_LIO
    one = jax.tree.map(lambda leaf: leaf[1], kernels.quantize(kernel))
    x = jax.random.normal(jax.random.key(1), (5, 64))
    exact = np.asarray(x @ kernel_LIO[1])
    assert jax.tree.leaves(one)[0].dtype == np.int8
    np.testing.assert_allclose(kernels.dot(x, one), exact, atol=0.02 * np.abs(exact).max())
    restored = np.asarray(kernels.dot(np.eye(64, dtype=np.float32), one))
    assert (np.abs(restored - kernel_LIO[1]) <= np.asarray(one.scale_O) / 2 + 1e-6).all()


@pytest.mark.parametrize("choice", ["int8_weights", "int8_cache"])
def test_scores_stay_close(model, choice):
    plain = Sampler(model, max_length=256, rows=8)
    small = Sampler(model, max_length=256, rows=8, **{choice: True})
    prefix = [{"role": "user", "content": "Be brief."}, {"role": "assistant", "content": "I will."}]
    exact, near = (np.asarray(sampler.score(CHATS, OPTIONS, prefix)) for sampler in (plain, small))
    error = np.abs(exact - near) / np.asarray([len(option) for option in OPTIONS])
    assert 0 < error.max() < 0.05, "nats a token"


def test_an_int8_cache_takes_the_bytes_of_its_entries_and_scales(model):
    args = model.config, 8, 256, 64
    assert cache_bytes(*args, "int8") == cache_bytes(*args, "float32") * (model.config.head_dim + 4) / (
        4 * model.config.head_dim
    )
