"""Training adapters: the numbers of an obvious implementation, and memory for what trains alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from packing import pack

from cai_jax import config as configs
from cai_jax.config import Lora, Mesh
from cai_jax.mesh import make_mesh
from cai_jax.models import kernels, lora
from cai_jax.models.pretrained import load_model
from cai_jax.objectives.model_losses import reward_objective, sft_objective
from cai_jax.training.batches import Example, pair_rows
from cai_jax.training.step import join, make_optimizer, make_schedule, split, start_training

# A large eps: with a small one Adam would turn the rounding of a gradient near zero into a whole step.
OPTIMIZER = configs.Optimizer(
    learning_rate=1e-2, schedule="constant", warmup_fraction=0.0, weight_decay=0.1, eps=1e-3
)
STEPS = 3


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(Mesh(), jax.devices()[:1])


def batches(kind):
    rng = np.random.default_rng(0)
    draw = lambda low, high: tuple(rng.integers(3, 128, rng.integers(low, high)).tolist())  # noqa: E731
    if kind == "policy":
        return [pack([Example(draw(2, 9), draw(4, 7)) for _ in range(8)], 32) for _ in range(STEPS)]
    rows = [pair_rows([(draw(3, 8), draw(3, 8), draw(3, 8)) for _ in range(4)], 24) for _ in range(STEPS)]
    labels = {"probability": np.linspace(0.1, 0.9, 4).astype(np.float32), "real": np.ones(4, np.int32)}
    return [{**row, **labels} for row in rows]


def started(params, mesh, objective, microbatches=1):
    trained, frozen = split(params, lora.trainable(params))
    state, step = start_training(objective, trained, OPTIMIZER, STEPS, mesh, microbatches, frozen)
    return state, step, frozen


def slowly(model, params, objective, kind):
    """Merge, then differentiate by the factors; plain arrays and optax."""
    factors = {"layers": {name: {"a": k.a_IR, "b": k.b_RO} for name, k in lora.adapters(params).items()}}
    factors |= {"score": params["score"]} if kind == "reward" else {}
    scale = params["layers"]["q"].scale

    def loss(factors, batch):
        layers = dict(model.params["layers"])
        for name, pair in factors["layers"].items():
            layers[name] = layers[name] + scale * jnp.einsum("lir,lro->lio", pair["a"], pair["b"])
        total, weight, _ = objective({**model.params, **factors, "layers": layers}, batch)
        return total / weight

    optimizer = make_optimizer(OPTIMIZER, make_schedule(OPTIMIZER, STEPS))
    state, losses, differentiate = optimizer.init(factors), [], jax.jit(jax.value_and_grad(loss))
    for batch in batches(kind):
        value, grads = differentiate(factors, batch)
        updates, state = optimizer.update(grads, state, factors)
        factors = optax.apply_updates(factors, updates)
        losses.append([float(value), float(optax.tree.norm(grads))])
    return factors, losses


@pytest.mark.parametrize("kind, microbatches", [("policy", 1), ("reward", 2)])
def test_steps_equal_those_of_merging_and_differentiating(oracles, mesh, kind, microbatches):
    model = load_model(oracles / ("llama_tied" if kind == "policy" else "llama_tied_reward"))
    objective = (sft_objective if kind == "policy" else reward_objective)(model.config)
    params = lora.add(model.params, Lora(rank=4, targets=("q", "v", "o", "down")), 0, mesh)
    want, want_losses = slowly(model, params, objective, kind)
    state, step, frozen = started(params, mesh, objective, microbatches)
    losses = []
    for batch in batches(kind):
        state, metrics = step(state, batch)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    np.testing.assert_allclose(losses, want_losses, rtol=1e-4)
    assert losses[0][0] - losses[-1][0] != 0
    for name, pair in want["layers"].items():
        np.testing.assert_allclose(state.params["layers"][name].a_IR, pair["a"], atol=1e-5)
        np.testing.assert_allclose(state.params["layers"][name].b_RO, pair["b"], atol=1e-5)
    if kind == "reward":
        np.testing.assert_allclose(state.params["score"], want["score"], atol=1e-5)
    trained = join(state.params, frozen)
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    assert trained["layers"]["q"].base is model.params["layers"]["q"], "neither donated nor copied"
    assert not trained["layers"]["q"].base.is_deleted()


def test_the_state_holds_what_trains_alone(oracles, mesh):
    model = load_model(oracles / "llama_tied")
    params = lora.add(model.params, Lora(rank=2), 0, mesh)
    state, _, _ = started(params, mesh, sft_objective(model.config))
    adapter_bytes = sum(kernel.a_IR.nbytes + kernel.b_RO.nbytes for kernel in lora.adapters(params).values())
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert total == 3 * adapter_bytes + 3 * 4, "weights, two moments, and three counters"


def test_no_gradient_of_a_frozen_weight_is_computed(oracles, mesh):
    """The products of a step: forward, and backward to activations and adapters; a frozen kernel's own are absent."""
    model = load_model(oracles / "llama_tied")
    objective = sft_objective(model.config)
    batch = batches("policy")[0]

    def flops(params):
        state, step, frozen = started(params, mesh, objective)
        compiled = step.func.lower(state, batch, frozen=frozen).compile()
        return compiled.cost_analysis()["flops"]

    full = flops(model.params)
    assert flops(lora.add(model.params, Lora(rank=1), 0, mesh)) < 0.8 * full


def test_an_adapter_trains_on_an_int8_base(oracles, mesh):
    small, exact = (load_model(oracles / "llama_tied", dtype) for dtype in ("int8", "float32"))
    losses = []
    for model in (small, exact):
        objective = sft_objective(model.config)
        state, step, _ = started(lora.add(model.params, Lora(rank=4), 0, mesh), mesh, objective)
        row = []
        for batch in batches("policy"):
            state, metrics = step(state, batch)
            row.append(float(metrics["loss"]))
        losses.append(row)
    np.testing.assert_allclose(*losses, rtol=0.02)
    assert losses[0] != losses[1]


def test_nothing_frozen_is_the_same_path(oracles):
    params = {"layers": {"q": jnp.ones((2, 3, 3))}, "embed": jnp.zeros(3), "q8": kernels.quantize(jnp.ones((3, 3)))}
    trains = jax.tree.map(lambda _: True, params)
    trained, frozen = split(params, trains)
    assert jax.tree.leaves(frozen) == [] and jax.tree.structure(trained) == jax.tree.structure(params)
    assert join(trained, frozen)["embed"] is params["embed"] and join(params, None) is params
    trained, frozen = split(params, {**trains, "embed": False})
    assert trained["embed"] is None and frozen["embed"] is params["embed"]
    assert jax.tree.structure(join(trained, frozen)) == jax.tree.structure(params)
