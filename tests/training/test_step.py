"""The one train step: packing, microbatches and padding change nothing; gradients are those of transformers."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from packing import pack

from cai_jax import config as configs
from cai_jax.config import Mesh
from cai_jax.mesh import make_mesh, put_rows
from cai_jax.models.heads import reward
from cai_jax.models.pretrained import load_model
from cai_jax.objectives.model_losses import reward_objective, sft_objective
from cai_jax.objectives.pairwise import bradley_terry
from cai_jax.training.batches import Example, pair_rows, right_padded
from cai_jax.training.step import init_state, make_optimizer, make_schedule, make_train_step


@pytest.fixture(scope="module")
def model(oracles):
    return load_model(oracles / "llama_tied")


def examples(count=8, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Example(tuple(rng.integers(3, 128, rng.integers(2, 9)).tolist()), tuple(rng.integers(3, 128, 6).tolist()))
        for _ in range(count)
    ]


def one_step(model, objective, batch, microbatches=1, learning_rate=1e-2):
    mesh = make_mesh(Mesh())
    optimizer_config = configs.Optimizer(learning_rate=learning_rate, schedule="constant", warmup_fraction=0.0)
    schedule = make_schedule(optimizer_config, 10)
    optimizer = make_optimizer(optimizer_config, schedule)
    state = init_state(model.params, optimizer, mesh)
    step = make_train_step(objective, optimizer, schedule, mesh, state, microbatches)
    state, metrics = step(state, put_rows(mesh, batch))
    return state, {name: float(x) for name, x in metrics.items()}


def unpacked(rows, length=32):
    return {name: np.concatenate([pack([e], length)[name] for e in rows]) for name in pack(rows[:1], length)}


def test_sft_loss_and_gradient_equal_those_of_transformers(oracles, model):
    data = np.load(oracles / "losses" / "sft_nll.npz")
    positions = np.where(data["attention_mask"] > 0, np.cumsum(data["attention_mask"], 1) - 1, -1)
    batch = {
        "tokens": data["input_ids"].astype(np.int32),
        "positions": positions.astype(np.int32),
        "segments": data["attention_mask"].astype(np.int32),
        "targets": (data["labels"] != -100).astype(np.int32),
    }

    def loss(params):
        total, count, _ = sft_objective(model.config)(params, batch)
        return total / count

    value, grads = jax.jit(jax.value_and_grad(loss))(model.params)
    np.testing.assert_allclose(value, data["loss"], rtol=1e-5)
    np.testing.assert_allclose(grads["embed"], data["grad_embed"], atol=1e-5)
    np.testing.assert_allclose(optax.tree.norm(grads), data["grad_norm"], rtol=1e-4)


def test_packed_rows_train_as_rows_of_their_own(model):
    rows = examples()
    packed_state, packed = one_step(model, sft_objective(model.config), pack(rows, 32))
    own_state, own = one_step(model, sft_objective(model.config), unpacked(rows))
    assert packed["weight"] == own["weight"] == 6 * len(rows)
    np.testing.assert_allclose(packed["loss"], own["loss"], rtol=1e-5)
    np.testing.assert_allclose(packed["grad_norm"], own["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("anchor", [False, True])
def test_a_start_that_rows_share_trains_as_one_of_each_example(model, anchor):
    """With an anchor too: against another model, so that its loss is not zero."""
    start = (9, 8, 7, 6)
    rows = [Example(start + e.prompt, e.completion, anchor and i % 2 == 0) for i, e in enumerate(examples())]
    other = jax.tree.map(lambda leaf: leaf * 1.1, model.params)
    coef = 0.5 if anchor else 0.0

    def loss(share_start, batch):
        objective = sft_objective(model.config, anchor=coef, share_start=share_start)

        def total(params):
            total, count, sums = objective({"policy": params, "reference": other} if anchor else params, batch)
            return total / count, (count, sums)

        return jax.value_and_grad(total, has_aux=True)(model.params)

    shared = pack(rows, 40, share_start=True)
    assert len(shared["tokens"]) < len(pack(rows, 40)["tokens"])
    (ours, (count, sums)), gradients = loss(True, shared)
    (own, (own_count, own_sums)), own_gradients = loss(False, unpacked(rows))
    assert count == own_count == 6 * len(rows) and set(sums) == ({"anchor_kl", "anchor_share"} if anchor else set())
    leaves = (jax.tree.leaves(found) for found in ((ours, sums, gradients), (own, own_sums, own_gradients)))
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_microbatches_of_unequal_weight_give_the_gradient_of_the_whole_batch(model):
    batch = unpacked(examples())
    batch["targets"][:3] = 0  # the first microbatch weighs far less than the others: a mean of means would differ
    whole_state, whole = one_step(model, sft_objective(model.config), batch)
    split_state, split = one_step(model, sft_objective(model.config), batch, microbatches=4)
    np.testing.assert_allclose(whole["loss"], split["loss"], rtol=1e-5)
    np.testing.assert_allclose(whole["grad_norm"], split["grad_norm"], rtol=1e-4)
    assert whole["weight"] == split["weight"]


def test_microbatches_of_a_bfloat16_model_add_up_in_float32():
    """In bfloat16 a sum of ones stops at 256: of 1024 equal microbatches a quarter would count."""
    microbatches, size = 1024, 8

    def objective(params, batch):
        loss = jnp.sum(batch["x"].astype(jnp.bfloat16) @ params["score"])
        return loss.astype(jnp.float32), len(batch["x"]), {}

    model = SimpleNamespace(params={"score": jnp.zeros((size, 1), jnp.bfloat16)})
    batch = {"x": np.ones((microbatches, size), np.float32)}
    state, metrics = one_step(model, objective, batch, microbatches)
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(size), rel=1e-3)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(model, remat):
    batch = unpacked(examples())
    _, plain = one_step(model, sft_objective(model.config), batch)
    _, again = one_step(model, sft_objective(model.config, remat=remat), batch)
    np.testing.assert_allclose(plain["grad_norm"], again["grad_norm"], rtol=1e-5)


def test_each_rematerialisation_policy_holds_less_than_the_one_before(model):
    rows = {name: np.tile(x[:1], (16, 4)) for name, x in pack(examples(), 32).items()}

    def held(remat, dtype="float32"):
        gradient = jax.jit(jax.grad(lambda params: sft_objective(model.config, dtype, remat)(params, rows)[0]))
        return gradient.lower(model.params).compile().memory_analysis().temp_size_in_bytes

    sizes = [held(remat) for remat in ("none", "dots", "full")]
    assert sizes[0] > 1.1 * sizes[1] > 1.1**2 * sizes[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_between_layers_are_in_the_dtype_of_the_products(model, dtype):
    """What a layer leaves for the backward pass under "full" is its input: the carry of the scan over layers."""
    rows = unpacked(examples()[:1])
    jaxpr = jax.make_jaxpr(lambda params: sft_objective(model.config, dtype)(params, rows)[0])(model.params)
    scans = [equation for equation in jaxpr.jaxpr.eqns if equation.primitive.name == "scan"]
    [layers] = [scan for scan in scans if scan.params["length"] == model.config.n_layers]
    assert layers.outvars[0].aval.dtype == dtype


def test_bfloat16_operands_stay_near_float32(model):
    batch = unpacked(examples())
    state, exact = one_step(model, sft_objective(model.config), batch)
    half_state, half = one_step(model, sft_objective(model.config, "bfloat16"), batch)
    assert abs(exact["loss"] - half["loss"]) < 0.02 * exact["loss"] and exact["loss"] != half["loss"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half_state.params))


def test_the_end_of_turn_token_gets_a_gradient(model):
    """Cutting completions before the end token is a known fault: the model then never learns to stop."""
    end = 2
    rows = [Example((5, 6, 7), (8, 9, end))]
    state, _ = one_step(model, sft_objective(model.config), pack(rows, 8), learning_rate=1e-3)

    def end_logprob(params):
        loss, _, _ = sft_objective(model.config)(params, pack([Example((5, 6, 7, 8, 9), (end,))], 8))
        return -float(loss)

    assert end_logprob(state.params) > end_logprob(model.params) + 0.05


def reward_batch(pairs, length):
    return {
        **pair_rows(pairs, length),
        "probability": np.linspace(0.1, 0.9, len(pairs)).astype(np.float32),
        "real": np.ones(len(pairs), np.int32),
    }


@pytest.fixture(scope="module")
def reward_model(oracles):
    return load_model(oracles / "llama_tied_reward")


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(1)
    return [[rng.integers(3, 128, rng.integers(3, 8)).tolist() for _ in "pab"] for _ in range(4)]


def test_a_pair_in_one_row_is_scored_like_its_two_texts(reward_model, pairs):
    """The prompt stands once, and neither response sees the other."""
    texts = [prompt + response for prompt, *responses in pairs for response in responses]
    tokens, positions = right_padded(texts, 16)
    scores = np.asarray(reward(reward_model.config, reward_model.params, tokens, positions >= 0)).reshape(-1, 2)
    batch = reward_batch(pairs, 24)
    expected = float(bradley_terry(scores[:, 0], scores[:, 1], batch["probability"]))
    loss, count, _ = reward_objective(reward_model.config)(reward_model.params, batch)
    np.testing.assert_allclose(loss / count, expected, rtol=1e-5)


def test_ties_are_left_out_of_the_accuracy_of_a_step(reward_model, pairs):
    objective = reward_objective(reward_model.config, tie=1e-3)
    batch = reward_batch(pairs, 24)
    decided, sums = batch["probability"].copy(), {}
    for name, tied in (("none", []), ("half", [1, 3]), ("all", [0, 1, 2, 3])):
        batch["probability"] = decided.copy()
        batch["probability"][tied] = 0.5 + 4e-4
        sums[name] = {key: float(x) for key, x in objective(reward_model.params, batch)[2].items()}
    assert [sums[name]["decided_share"] for name in ("none", "half", "all")] == [4, 2, 0]
    assert sums["all"]["accuracy"] == 0 and sums["half"]["accuracy"] <= 2
    own = {name: x[[0, 2]] for name, x in batch.items()} | {"probability": decided[[0, 2]]}
    assert sums["half"]["accuracy"] == float(objective(reward_model.params, own)[2]["accuracy"])


def test_reward_loss_does_not_see_padding_or_empty_rows(reward_model, pairs):
    objective = reward_objective(reward_model.config)
    _, short = one_step(reward_model, objective, reward_batch(pairs, 24))
    _, long = one_step(reward_model, objective, reward_batch(pairs, 40))
    padded = reward_batch(pairs, 24)
    empty = {name: np.concatenate([x, np.zeros_like(x[:2])]) for name, x in padded.items()}
    empty["positions"][-2:] = -1
    _, filled = one_step(reward_model, objective, empty)
    for name in ("loss", "grad_norm", "accuracy", "margin"):
        np.testing.assert_allclose(short[name], long[name], rtol=2e-5)
        np.testing.assert_allclose(short[name], filled[name], rtol=2e-5)
    assert filled["weight"] == 4


def test_donated_params_become_those_of_the_state():
    mesh, optimizer = make_mesh(Mesh()), optax.adam(1e-3)
    for donate in (False, True):
        params = {"embed": jnp.ones((64, 8)), "final_norm": jnp.ones(8)}
        places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)]
        state = init_state(params, optimizer, mesh, donate)
        assert all(leaf.is_deleted() == donate for leaf in jax.tree.leaves(params))
        assert ([leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.params)] == places) == donate
