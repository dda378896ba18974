"""Weights that know how to multiply.

The dtype of a kernel decides the operands of the product; the sum is always float32. Casting the parameters once
(`cast`) therefore chooses the precision of a whole step, and the decoder has no flag for it.
"""

import math

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
    if isinstance(kernel, Transposed):
        if math.prod(x.shape[:-1]) > FEW_ROWS:
            return _rows_major(x, kernel.kernel_OI)
        # Decided when the program is lowered: a CPU may compile for chips that are elsewhere.
        return jax.lax.platform_dependent(x, kernel.kernel_OI, cpu=_feature_major, default=_rows_major)
    return _product(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _rows_major(x, kernel_OI):
    return _product(x, kernel_OI, (((x.ndim - 1,), (1,)), ((), ())))


def _feature_major(x, kernel_OI):
    """Weights times activations `[I, rows]`. The barriers keep the compiler from turning it into the other form."""
    x_IR = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T.astype(kernel_OI.dtype))
    y_OR = jax.lax.optimization_barrier(_product(kernel_OI, x_IR, (((1,), (0,)), ((), ()))))
    return y_OR.T.reshape(*x.shape[:-1], -1)


def _product(x, kernel, dimension_numbers):
    accumulator = jnp.promote_types(kernel.dtype, jnp.float32)
    return jax.lax.dot_general(x.astype(kernel.dtype), kernel, dimension_numbers, preferred_element_type=accumulator)


def cast(params, dtype):
    """Every floating leaf in `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params)
