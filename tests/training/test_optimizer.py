import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cai_jax.config import Optimizer
from cai_jax.training.step import make_optimizer, make_schedule


@pytest.fixture
def recorded(oracles):
    """Ten AdamW steps on a matrix and a vector: warmup of 3, cosine to 0 at 10, clipping at norm 1."""
    with np.load(oracles / "losses" / "adamw_clip_cosine.npz") as file:
        want = {key: file[key] for key in file.files}
    learning_rate, b1, b2, eps, decay, clip_norm, warmup, steps = want["hyper"].tolist()
    config = Optimizer(
        learning_rate=learning_rate,
        schedule="cosine",
        warmup_fraction=warmup / steps,
        weight_decay=decay,
        b1=b1,
        b2=b2,
        eps=eps,
        clip_norm=clip_norm,
    )
    return want, config, int(steps)


def test_ten_steps(recorded):
    want, config, steps = recorded
    optimizer = make_optimizer(config, make_schedule(config, steps))
    params = {"w": jnp.asarray(want["w0"]), "b": jnp.asarray(want["b0"])}
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    assert (want["pre_clip_norm"] > config.clip_norm).any() and (want["pre_clip_norm"] < config.clip_norm).any()
    for step in range(steps):
        gradient = {"w": want["grads_w"][step], "b": want["grads_b"][step]}
        params, state = update(params, state, gradient)
        np.testing.assert_allclose(params["w"], want["w"][step], atol=1e-5)
        np.testing.assert_allclose(params["b"], want["b"][step], atol=1e-5)


def test_schedules(recorded):
    want, config, steps = recorded
    cosine = make_schedule(config, steps)
    np.testing.assert_allclose([cosine(step) for step in range(steps)], want["lr"], atol=1e-7)
    linear = make_schedule(Optimizer(learning_rate=1.0, schedule="linear", warmup_fraction=0.3), 10)
    np.testing.assert_allclose([linear(step) for step in range(12)], want["linear_lr"], atol=1e-6)


def test_decay_touches_matrices_only_and_knows_the_axis_of_layers():
    config = Optimizer(learning_rate=0.1, schedule="constant", warmup_fraction=0.0, weight_decay=0.5)
    optimizer = make_optimizer(config, make_schedule(config, 5))
    params = {
        "embed": jnp.ones((4, 3)),
        "final_norm": jnp.ones(3),
        "layers": {"norm": jnp.ones((2, 3)), "up": jnp.ones((2, 3, 5)), "bias": jnp.ones((2, 5))},
    }
    still = jax.tree.map(jnp.zeros_like, params)  # without a gradient only decay moves a weight
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    moved = jax.tree.map(lambda x: float(jnp.abs(x).max()), updates)
    assert moved["embed"] == moved["layers"]["up"] == pytest.approx(0.05)
    assert moved["final_norm"] == moved["layers"]["norm"] == moved["layers"]["bias"] == 0
