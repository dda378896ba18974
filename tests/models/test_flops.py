import dataclasses

import jax
import jax.numpy as jnp
import pytest

from cai_jax.models import transformer
from cai_jax.models.families import param_shapes, tiny_config
from cai_jax.models.flops import attention_flops, forward_flops, mean_context, parameters, training_flops


@pytest.mark.parametrize("length, past, window", [(1, 0, 0), (7, 5, 0), (7, 5, 4), (7, 5, 9), (7, 0, 3), (4, 9, 100)])
def test_mean_context_counts_visible_keys(length, past, window):
    seen = [min(past + i + 1, window or 10**9) for i in range(length)]
    assert mean_context(length, past, window) == pytest.approx(sum(seen) / length)


def wide_config(layers):
    """Wide enough that products are nearly all of XLA's count."""
    return dataclasses.replace(
        tiny_config("llama"), d_model=512, n_heads=8, n_kv_heads=4, head_dim=64, d_ff=1024, vocab_size=2048,
        n_layers=layers, windows=(0,) * layers, rope_of_layer=(0,) * layers,
    )  # fmt: skip


def xla_flops(config, rows, length):
    tokens_BT = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    compiled = jax.jit(lambda p, t: transformer.forward(config, p, t)).lower(param_shapes(config, "policy"), tokens_BT)
    return compiled.compile().cost_analysis()["flops"]


def test_forward_flops_are_those_that_xla_counts():
    # One layer, for XLA counts the body of a scan once; its attention is dense: every token meets every key.
    config, rows, length = wide_config(1), 2, 128
    ours = forward_flops(config, rows * length, length=1, past=length - 1)
    assert ours == pytest.approx(xla_flops(config, rows, length), rel=0.02)


def test_layers_add_up():
    one, two, four = (forward_flops(wide_config(n), 100, 10) for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one))


def test_parts_of_a_pass():
    config = wide_config(2)
    body = forward_flops(config, 100, 10, unembedded=0)
    assert forward_flops(config, 100, 10) == pytest.approx(body + 100 * 2 * config.d_model * config.vocab_size)
    assert forward_flops(config, 100, 10, past=50) > forward_flops(config, 100, 10)
    windowed = dataclasses.replace(config, windows=(4, 4))
    assert forward_flops(windowed, 100, 10) < forward_flops(config, 100, 10)


def test_attention_alone_is_what_grows_with_the_context():
    config = wide_config(2)
    grown = forward_flops(config, 100, 10, past=50) - forward_flops(config, 100, 10)
    assert attention_flops(config, 100, 10, 50) - attention_flops(config, 100, 10) == pytest.approx(grown)
    without = dataclasses.replace(config, n_heads=0, n_kv_heads=0)
    of_kernels = 100 * 2 * 2 * config.d_model * 2 * (config.n_heads + config.n_kv_heads) * config.head_dim
    parts = forward_flops(without, 100, 10) + of_kernels + attention_flops(config, 100, 10)
    assert forward_flops(config, 100, 10) == pytest.approx(parts)


def test_training_passes():
    config = wide_config(2)
    forward = forward_flops(config, 100, 10)
    assert training_flops(config, 100, 10) == pytest.approx(3 * forward)
    assert training_flops(config, 100, 10, remat="full") == pytest.approx(4 * forward)
    assert training_flops(config, 100, 10, remat="dots") == pytest.approx(
        3 * forward + attention_flops(config, 100, 10)
    )
    assert training_flops(config, 100, 10, frozen=True) == pytest.approx(2 * forward)


def test_parameters():
    config = tiny_config("llama")
    leaves = jax.tree.leaves(param_shapes(config, "policy"))
    assert parameters(config) == sum(leaf.size for leaf in leaves)
    assert parameters(config, "reward") == parameters(config) + config.d_model  # tied embeddings, plus the head
