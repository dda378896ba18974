import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.objectives.logprobs import as_float, masked_fill, masked_mean, masked_sum, token_logprobs

B, T, D, V = 3, 13, 8, 50


def problem(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden_BTD = jax.random.normal(keys[0], (B, T, D))
    weights_VD = 2 * jax.random.normal(keys[1], (V, D))
    targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
    weight_BT = jax.random.normal(keys[3], (B, T))
    return hidden_BTD, weights_VD, targets_BT, weight_BT


def head(weights_VD):
    return lambda hidden: jnp.einsum("...d,vd->...v", hidden, weights_VD)


def plain(hidden_BTD, weights_VD, targets_BT, temperature, softcap):
    logits_BTV = head(weights_VD)(hidden_BTD)
    if softcap:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    log_p_BTV = jax.nn.log_softmax(logits_BTV / temperature)
    logprobs_BT = jnp.take_along_axis(log_p_BTV, targets_BT[..., None], -1)[..., 0]
    return logprobs_BT, -(jnp.exp(log_p_BTV) * log_p_BTV).sum(-1)


@pytest.mark.parametrize(
    "chunk, temperature, softcap",
    [(1, 1.0, 0.0), (2 * B + 1, 1.0, 0.0), (2 * B, 0.7, 0.0), (5 * B, 1.3, 5.0), (10_000, 1.0, 0.0)],
)
def test_equal_to_plain_in_value_and_gradient(chunk, temperature, softcap):
    hidden_BTD, weights_VD, targets_BT, weight_BT = problem()

    def total(hidden_BTD, weights_VD, function):
        logprobs_BT, entropy_BT = function(hidden_BTD, weights_VD)
        return (weight_BT * (logprobs_BT + 0.3 * entropy_BT)).sum(), (logprobs_BT, entropy_BT)

    def chunked(hidden_BTD, weights_VD):
        return token_logprobs(
            hidden_BTD, head(weights_VD), targets_BT, temperature=temperature, chunk=chunk, softcap=softcap
        )

    def whole(hidden_BTD, weights_VD):
        return plain(hidden_BTD, weights_VD, targets_BT, temperature, softcap)

    gradient = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True), static_argnums=2)
    got_gradients, got = gradient(hidden_BTD, weights_VD, chunked)
    want_gradients, want = gradient(hidden_BTD, weights_VD, whole)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def avals_within(jaxpr):
    """Shapes of everything computed in a jaxpr, inner ones too."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.shape
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from avals_within(inner)


def test_logits_of_all_tokens_never_exist_forward_or_backward():
    hidden_BTD, weights_VD, targets_BT, _ = problem()
    chunk = 2 * B

    def loss(hidden_BTD, weights_VD, chunk):
        return token_logprobs(hidden_BTD, head(weights_VD), targets_BT, chunk=chunk)[0].sum()

    def most_logit_rows(chunk):
        gradient = jax.grad(lambda h, w: loss(h, w, chunk), argnums=(0, 1))
        shapes = list(avals_within(jax.make_jaxpr(gradient)(hidden_BTD, weights_VD).jaxpr))
        return max(np.prod(shape[:-1]) for shape in shapes if shape and shape[-1] == V)

    assert most_logit_rows(chunk) == chunk
    assert most_logit_rows(B * T) == B * T  # the measure sees whole logits where they are made


def test_entropy_of_uniform_and_of_certain():
    targets_BT = jnp.zeros((1, 2), jnp.int32)
    logits_BTV = jnp.stack([jnp.zeros(V), 1e4 * jax.nn.one_hot(0, V)])[None]
    logprobs_BT, entropy_BT = token_logprobs(logits_BTV, lambda x: x, targets_BT)
    np.testing.assert_allclose(entropy_BT, [[np.log(V), 0.0]], atol=1e-4)
    np.testing.assert_allclose(logprobs_BT, [[-np.log(V), 0.0]], atol=1e-5)


def test_ignored_targets_are_finite_and_leave_the_others_alone():
    hidden_BTD, weights_VD, targets_BT, _ = problem()
    ignored_BT = targets_BT.at[:, -4:].set(-100)
    mask_BT = ignored_BT != -100

    @jax.jit
    @jax.grad
    def gradient(weights_VD, targets_BT):
        logprobs_BT, _ = token_logprobs(hidden_BTD, head(weights_VD), targets_BT, chunk=7)
        return masked_mean(logprobs_BT, mask_BT)

    np.testing.assert_array_equal(gradient(weights_VD, ignored_BT), gradient(weights_VD, targets_BT))
    assert np.isfinite(token_logprobs(hidden_BTD, head(weights_VD), ignored_BT)[0]).all()


def test_temperature_may_be_traced():
    hidden_BTD, weights_VD, targets_BT, _ = problem()
    traced = jax.jit(lambda t: token_logprobs(hidden_BTD, head(weights_VD), targets_BT, temperature=t)[0])
    want, _ = plain(hidden_BTD, weights_VD, targets_BT, 0.6, 0.0)
    np.testing.assert_allclose(traced(0.6), want, atol=2e-5)


def test_as_float_raises_small_types_and_keeps_float64():
    assert as_float(jnp.zeros(2, jnp.int32)).dtype == jnp.float32
    assert as_float(jnp.zeros(2, jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert as_float(np.zeros(2)).dtype == jnp.float64


@pytest.mark.parametrize("mask_dtype", [bool, np.int32, np.float32])
def test_masked_mean_and_sum(mask_dtype):
    x_BT = np.array([[1.0, 2.0, np.nan], [np.inf, 5.0, -np.inf]], np.float32)
    mask_BT = np.array([[1, 1, 0], [0, 1, 0]]).astype(mask_dtype)
    total, count = masked_sum(x_BT, mask_BT)
    assert (float(total), float(count)) == (8.0, 3.0)
    np.testing.assert_allclose(masked_mean(x_BT, mask_BT), 8 / 3, rtol=1e-6)
    np.testing.assert_array_equal(masked_fill(x_BT, mask_BT), [[1, 2, 0], [0, 5, 0]])
    assert float(masked_mean(x_BT, np.zeros_like(mask_BT))) == 0.0


def test_sums_of_parts_give_the_mean_of_the_whole():
    rng = np.random.default_rng(0)
    x_BT = rng.normal(size=(6, 9)).astype(np.float32)
    mask_BT = rng.random((6, 9)) < np.linspace(0.05, 0.95, 6)[:, None]  # parts of very unequal size
    parts = [masked_sum(x_BT[i : i + 2], mask_BT[i : i + 2]) for i in (0, 2, 4)]
    totals, counts = zip(*parts, strict=True)
    np.testing.assert_allclose(sum(totals) / sum(counts), masked_mean(x_BT, mask_BT), rtol=1e-5)
