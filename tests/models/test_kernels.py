"""Products: float32 sums, and in the backward pass operands of the same dtype as in the forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from cai_jax.models.kernels import Transposed, dot, product


def dots(jaxpr):
    """All products in a jaxpr, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from dots(inner)


@pytest.mark.parametrize(
    "form, x, y", [("abi,io->abo", (2, 3, 4), (4, 5)), ("btkgn,bskn->bkgts", (2, 3, 2, 2, 4), (2, 5, 2, 4))]
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
