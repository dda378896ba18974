"""Products: float32 sums, and in the backward pass operands of the same dtype as in the forward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from cai_jax.models.kernels import Transposed, cast, dot, kept, product, quantize


def dots(jaxpr):
    """All products in a jaxpr, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from dots(inner)


@pytest.mark.parametrize(
    "form, x, y",
    [
        ("abi,io->abo", (2, 3, 4), (4, 5)),
        ("abi,io->abo", (5, 7, 9), (9, 2)),  # here the gradient of the kernel is made with the operands changed
        ("abi,oi->abo", (2, 3, 4), (5, 4)),
        ("btkgn,bskn->bkgts", (2, 3, 2, 2, 4), (2, 5, 2, 4)),
        ("bkgtn,bskn->bkgts", (2, 2, 2, 3, 4), (2, 5, 2, 4)),
        ("bkgts,bskn->bkgtn", (2, 2, 2, 3, 9), (2, 9, 2, 4)),
    ],
)
def test_gradient_is_that_of_einsum(form, x, y):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (x, y))
    weights = jnp.asarray(rng.standard_normal(jnp.einsum(form, x, y).shape), jnp.float32)

    def gradients(multiply):
        return jax.grad(lambda x, y: jnp.sum(weights * multiply(form, x, y)), argnums=(0, 1))(x, y)

    ours, theirs = gradients(product), gradients(jnp.einsum)
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_all_products_of_a_step_have_operands_in_the_dtype_of_the_kernel(transposed):
    x, kernel = jnp.ones((2, 40, 8)), jnp.ones((8, 16), jnp.bfloat16)
    kernel = Transposed(kernel.T) if transposed else kernel
    jaxpr = jax.make_jaxpr(jax.grad(lambda x, kernel: dot(x, kernel).sum(), argnums=(0, 1)))(x, kernel)
    found = list(dots(jaxpr.jaxpr))
    assert len(found) == 3
    for equation in found:
        assert {operand.aval.dtype for operand in equation.invars} == {jnp.dtype("bfloat16")}
        assert equation.outvars[0].aval.dtype == jnp.float32


def test_a_cast_that_stays_in_a_loop_gives_the_same_bits():
    rng = np.random.default_rng(0)
    odd = [0.0, -0.0, np.inf, -np.inf, 3.4e38, 1e-40, 1 + 2**-8, 1 + 2**-8 + 2**-20, 1 + 3 * 2**-8]
    values = np.concatenate([np.asarray(odd, np.float32), rng.standard_normal(10_000).astype(np.float32)])
    params = {"x": jnp.asarray(values), "int8": quantize(jnp.asarray(rng.standard_normal((8, 4)), jnp.float32))}
    mesh = jax.sharding.AbstractMesh((1, 2, 1), ("data", "fsdp", "tensor"))

    def both(params):
        with jax.sharding.use_abstract_mesh(mesh):
            return cast(params, jnp.bfloat16), cast(params, jnp.bfloat16, in_loop=True)

    assert "reduce_precision" in str(jax.make_jaxpr(both)(params))
    plain, rounded = jax.jit(both)(params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(_bits(a), _bits(b)), plain, rounded)


def _bits(x):
    return np.asarray(x).view(f"uint{8 * x.dtype.itemsize}")


def test_the_gradient_of_a_kernel_transposes_the_smaller_operand():
    def gradient(inputs, outputs):
        x, kernel = jnp.ones((4, 8, inputs)), jnp.ones((inputs, outputs))
        return jax.make_jaxpr(jax.grad(lambda kernel: jnp.sum(dot(x, kernel))))(kernel).jaxpr

    for sizes in ((16, 3), (3, 16)):
        [of_kernel] = [each for each in dots(gradient(*sizes)) if sorted(each.outvars[0].aval.shape) == [3, 16]]
        assert of_kernel.invars[0].aval.shape[-1] == 3


@pytest.mark.parametrize("dtype, stacked", [("bfloat16", "uint16"), ("float32", "float32")])
def test_what_a_scan_keeps_on_a_cpu_is_never_bfloat16(dtype, stacked):
    """A slice of a stack of bfloat16 is not written in place there (see `kept`)."""
    policy = jax.checkpoint_policies.save_only_these_names("x", "wide")

    def passes(x, weights):
        @partial(jax.checkpoint, policy=policy, prevent_cse=False)
        def one(x, weight):
            x = kept(x, "x")
            wide = kept(jnp.tanh(x * weight), "wide")
            return (jnp.sin(wide) * wide + x).astype(dtype), None

        return jnp.sum(jax.lax.scan(one, x, weights)[0].astype(jnp.float32))

    x, weights = jnp.arange(6, dtype=dtype) / 7, jnp.linspace(-1, 1, 3, dtype=dtype)
    closed = jax.make_jaxpr(jax.grad(passes, argnums=(0, 1)))(x, weights)
    forward = next(each for each in closed.jaxpr.eqns if each.primitive.name == "scan")
    stacks = [var.aval for var in forward.outvars if var.aval.shape == (3, 6)]
    assert [str(aval.dtype) for aval in stacks] == [stacked] * 2

    def plainly(x, weights):
        for weight in weights:
            wide = jnp.tanh(x * weight)
            x = (jnp.sin(wide) * wide + x).astype(dtype)
        return jnp.sum(x.astype(jnp.float32))

    ours, theirs = (jax.grad(function, argnums=(0, 1))(x, weights) for function in (passes, plainly))
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2e-2, atol=2e-2)
