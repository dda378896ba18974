"""Every backend gives the same attention as a loop over queries, gradients included; what one cannot do, XLA does."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packing import pack

from cai_jax.models import attention
from cai_jax.models.attention import attend, choose_backend
from cai_jax.models.families import tiny_config
from cai_jax.training.batches import Example, pair_rows

HEADS, KV_HEADS, SIZE = 4, 2, 16


def config_of(windows=(0,), cap=0.0):
    return replace(
        tiny_config("llama"), n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=SIZE, windows=windows, attn_softcap=cap,
        query_scale=0.3,
    )  # fmt: skip


def rows_of(kind, length):
    """(positions, segments) of two rows."""
    rng = np.random.default_rng(0)
    if kind == "packed":
        examples = [Example(tuple(range(3)), tuple(range(int(n)))) for n in rng.integers(length // 6, length // 3, 7)]
        rows = pack(examples, length)
        return rows["positions"][:2], rows["segments"][:2]
    if kind == "pairs":
        third = length // 3
        rows = pair_rows([([1] * third, [1] * (third - 5), [1] * third), ([1] * 9, [1] * 20, [1] * 30)], length)
        return rows["positions"], rows["segments"]
    positions = np.full((2, length), -1, np.int32)
    for row, real in enumerate((length - 37, length // 2)):
        place = slice(length - real, None) if kind == "left" else slice(real)
        positions[row, place] = np.arange(real)
    return positions, None


def inputs(length, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(2, length, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def slowly(config, q, k, v, positions, segments, window):
    """The rule of who sees whom, one query at a time; zeros for pads."""
    out = np.zeros(q.shape)
    for row, query in np.argwhere(positions >= 0):
        distance = positions[row, query] - positions[row]
        seen = (positions[row] >= 0) & (distance >= 0) & (distance < (window or 10**9))
        if segments is not None:
            seen &= (segments[row] == segments[row, query]) | (segments[row] == 0)
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = k[row, seen, group] @ q[row, query, head] * config.query_scale
            if config.attn_softcap:
                scores = config.attn_softcap * np.tanh(scores / config.attn_softcap)
            weights = np.exp(scores - scores.max())
            out[row, query, head] = weights @ v[row, seen, group] / weights.sum()
    return out


@pytest.mark.parametrize("kind", ["packed", "pairs", "left", "right"])
@pytest.mark.parametrize("window, cap", [(0, 0.0), (40, 2.0)])
def test_pieces_are_the_rule_applied_query_by_query(kind, window, cap):
    length = attention.PIECE * 2 + 44
    config, arrays, (positions, segments) = config_of((window,), cap), inputs(length), rows_of(kind, length)
    reach = window or np.iinfo(np.int32).max
    got = attend(config, "xla", *arrays, positions, segments, reach)
    real = positions >= 0
    want = slowly(config, *map(np.asarray, arrays), positions, segments, window)
    np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=2e-5)
    assert np.isfinite(got).all()


def value_and_gradients(config, backend, arrays, positions, segments, window):
    real = (positions >= 0)[..., None, None]
    weights = jnp.asarray(np.random.default_rng(5).standard_normal(arrays[0].shape), jnp.float32)

    def total(q, k, v):
        out = attend(config, backend, q, k, v, positions, segments, window)
        return jnp.sum(jnp.where(real, out * weights, 0)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return np.where(real, out, 0), gradients


@pytest.mark.parametrize(
    "kind, windows, layer, cap",
    [("packed", (0,), 0, 0.0), ("left", (50,), 0, 3.0), ("right", (50, 0), 0, 0.0), ("packed", (50, 0), 1, 0.0)],
)
def test_splash_equals_plain_attention(kind, windows, layer, cap):
    """On a CPU the kernel is interpreted. Layers with and without a window are chosen from traced data."""
    length = 200  # not a multiple of the kernel's blocks
    config, arrays, rows = config_of(windows, cap), inputs(length), rows_of(kind, length)
    window = jnp.int32(windows[layer] or np.iinfo(np.int32).max)
    plain, plain_gradients = value_and_gradients(config, "xla", arrays, *rows, window)
    splash, gradients = value_and_gradients(config, "splash", arrays, *rows, window)
    np.testing.assert_allclose(splash, plain, atol=2e-5)
    for got, want in zip(gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=5e-5)


def test_scores_of_a_long_row_never_exist_whole():
    """Kept for the backward pass they would be 4 heads x 2048 x 2048 floats a row."""
    length = 2048
    config, arrays, rows = config_of(), inputs(length), rows_of("left", length)
    run = jax.jit(jax.grad(lambda q: jnp.sum(attend(config, "xla", q, *arrays[1:], *rows, length))))
    whole = 2 * HEADS * length * length * 4
    assert run.lower(arrays[0]).compile().memory_analysis().temp_size_in_bytes < whole / 2


def test_cudnn_lowers_with_gradients(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 90800)
    config, rows = config_of((50,)), rows_of("pairs", 256)
    arrays = [x.astype(jnp.bfloat16) for x in inputs(256)]
    run = jax.jit(jax.grad(lambda q: attend(config, "cudnn", q, *arrays[1:], *rows, 50).astype(jnp.float32).sum()))
    text = run.trace(arrays[0]).lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn$fmha" in text and "cudnn$fmhaScaleBiasSoftmaxBackward" in text


def on(platform, tensor=1):
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=1, platform=platform)
    mesh = jax.sharding.AbstractMesh(
        (2, 2, tensor), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3, abstract_device=device
    )
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    "platform, changes, dtype, prefix, expected",
    [
        ("tpu", {}, jnp.bfloat16, False, "splash"),
        ("tpu", {"attn_softcap": 30.0, "windows": (8, 0)}, jnp.float32, False, "splash"),
        ("tpu", {}, jnp.bfloat16, True, "xla"),
        ("tpu", {"n_kv_heads": 1}, jnp.bfloat16, False, "xla"),
        ("gpu", {}, jnp.bfloat16, True, "cudnn"),
        ("gpu", {}, jnp.float32, False, "xla"),
        ("gpu", {"attn_softcap": 30.0}, jnp.bfloat16, False, "xla"),
        ("gpu", {"head_dim": 256}, jnp.bfloat16, False, "xla"),
        ("cpu", {}, jnp.bfloat16, False, "xla"),
    ],
)
def test_auto_goes_by_device_and_falls_back_to_what_can(platform, changes, dtype, prefix, expected):
    with on(platform, tensor=2):
        assert choose_backend("auto", replace(config_of(), **changes), dtype, 64, prefix) == expected
