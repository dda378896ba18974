"""Weights that know how to multiply.

The dtype of a kernel decides the operands of the product; the sum is always float32. Casting the parameters once
(`cast`) therefore chooses the precision of a whole step, and the decoder has no flag for it.
"""

import math
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

FEW_ROWS = 64  # of activations; up to here a CPU is faster with the weights on the left


@flax.struct.dataclass
class Transposed:
    """A kernel stored `[O, I]`: a tied embedding, or any kernel where that is faster (benchmarks/products.py)."""

    kernel_OI: jax.Array


@flax.struct.dataclass
class Int8:
    """A kernel as whole numbers from -127 to 127, times a scale for each output."""

    kernel: jax.Array | Transposed
    scale_O: jax.Array


def quantize(kernel) -> Int8:
    """The nearest Int8 kernel; leading axes (layers) are kept."""
    transposed = isinstance(kernel, Transposed)
    values = kernel.kernel_OI if transposed else kernel
    scale = jnp.maximum(jnp.max(jnp.abs(values), axis=-1 if transposed else -2), 1e-8).astype(jnp.float32) / 127
    whole = jnp.round(values / jnp.expand_dims(scale, -1 if transposed else -2)).astype(jnp.int8)
    return Int8(Transposed(whole) if transposed else whole, scale)


def dot(x, kernel):
    """Multiply activations `x_...I` with a kernel `[I, O]`: operands in the kernel's dtype, float32 result.

    With an Int8 kernel the operands are in the dtype of `x`.
    """
    if isinstance(kernel, Int8):
        return dot(x, jax.tree.map(lambda leaf: leaf.astype(x.dtype), kernel.kernel)) * kernel.scale_O
    rows = "abcdefgh"[: x.ndim - 1]
    if isinstance(kernel, Transposed):
        few = math.prod(x.shape[:-1]) <= FEW_ROWS and jax.default_backend() == "cpu"
        if few:
            return _feature_major(x, kernel.kernel_OI)
        return product(f"{rows}i,oi->{rows}o", x.astype(kernel.kernel_OI.dtype), kernel.kernel_OI)
    return product(f"{rows}i,io->{rows}o", x.astype(kernel.dtype), kernel)


def _feature_major(x, kernel_OI):
    """Weights times activations `[I, rows]`. The barriers keep the compiler from turning it into the other form."""
    x_IR = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T.astype(kernel_OI.dtype))
    y_OR = jax.lax.optimization_barrier(product("oi,ir->or", kernel_OI, x_IR))
    return y_OR.T.reshape(*x.shape[:-1], -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(form, x, y):
    """`einsum` of two arrays of one dtype with float32 sums and result; every letter is in two of its three terms.

    In the backward pass the incoming gradient is rounded to that dtype, so the two products of the gradient are as
    fast as the forward one: by itself a derivative would multiply float32 with bfloat16.
    """
    return jnp.einsum(form, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _product_forward(form, x, y):
    return product(form, x, y), (x, y)


def _product_backward(form, operands, gradient):
    x, y = operands
    of_x, of_y, of_result = form.replace("->", ",").split(",")
    gradient = gradient.astype(x.dtype)
    to_x = product(f"{of_result},{of_y}->{of_x}", gradient, y)
    to_y = product(f"{of_x},{of_result}->{of_y}", x, gradient)
    return to_x.astype(x.dtype), to_y.astype(y.dtype)


product.defvjp(_product_forward, _product_backward)


def cast(params, dtype):
    """Every floating leaf in `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params)
