"""Weights that know how to multiply.

The dtype of a kernel decides the operands of the product; the sum is always float32. Casting the parameters once
(`cast`) therefore chooses the precision of a whole step, and the decoder has no flag for it, nor one for what a kernel
is made of: a plain array, whole numbers (Int8), or a frozen kernel with an adapter (Lora).

Letters: I inputs, O outputs, R rank of an adapter, B rows.
"""

import math
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cai_jax.mesh import platform_in_use, rounded

FEW_ROWS = 64  # of activations; up to here a CPU is faster with the weights on the left


@flax.struct.dataclass
class Transposed:
    """A kernel stored `[O, I]`: a tied embedding, or any kernel where that is faster (benchmarks/products.py)."""

    kernel_OI: jax.Array


@flax.struct.dataclass
class Int8:
    """A kernel as whole numbers from -127 to 127, times a scale for each output. `dtype` is that of the operands."""

    kernel: jax.Array | Transposed
    scale_O: jax.Array
    dtype: str = flax.struct.field(pytree_node=False, default="float32")


@flax.struct.dataclass
class Lora:
    """A kernel that stays as it is, plus an adapter that trains: base + scale a b (Hu et al., arXiv 2106.09685)."""

    base: jax.Array | Int8
    a_IR: jax.Array
    b_RO: jax.Array
    scale: float = flax.struct.field(pytree_node=False)


def quantize(kernel) -> Int8:
    """The nearest Int8 kernel, with operands in the dtype of `kernel`; leading axes (layers) are kept."""
    transposed = isinstance(kernel, Transposed)
    values = kernel.kernel_OI if transposed else kernel
    scale = jnp.maximum(jnp.max(jnp.abs(values), axis=-1 if transposed else -2), 1e-8).astype(jnp.float32) / 127
    whole = jnp.round(values / jnp.expand_dims(scale, -1 if transposed else -2)).astype(jnp.int8)
    return Int8(Transposed(whole) if transposed else whole, scale, str(values.dtype))


def plain(kernel):
    """The kernel as one array, which `dot` multiplies with to the same result; leading axes (layers) are kept.

    A Lora kernel is merged in float32 and comes in the dtype of its base, an Int8 kernel in float32. Other arrays
    (norms, biases) come as they are.
    """
    if isinstance(kernel, Lora):
        base = plain(kernel.base)
        adapter = jnp.matmul(kernel.a_IR, kernel.b_RO, precision="highest", preferred_element_type=jnp.float32)
        return (base + kernel.scale * adapter).astype(base.dtype)
    return kernel.kernel * jnp.expand_dims(kernel.scale_O, -2) if isinstance(kernel, Int8) else kernel


def dot(x, kernel):
    """Multiply activations `x_...I` with a kernel `[I, O]`: operands in the kernel's dtype, float32 result."""
    if isinstance(kernel, Lora):
        return dot(x, kernel.base) + kernel.scale * dot(dot(x, kernel.a_IR), kernel.b_RO)
    if isinstance(kernel, Int8):
        return dot(x, jax.tree.map(lambda leaf: leaf.astype(kernel.dtype), kernel.kernel)) * kernel.scale_O
    if x.size == x.shape[-1] and jax.tree.leaves(kernel)[0].dtype == jnp.bfloat16:
        # XLA's CPU multiplies matrices in bfloat16, but widens one that meets a vector. So the vector comes twice.
        twice = jnp.broadcast_to(x.reshape(1, -1), (2, x.shape[-1]))
        return dot(twice, kernel)[:1].reshape(*x.shape[:-1], -1)
    if isinstance(kernel, Transposed):
        few = math.prod(x.shape[:-1]) <= FEW_ROWS and kernel.kernel_OI.dtype != jnp.bfloat16
        if not few:
            return _rows_major(x, kernel.kernel_OI)
        # Decided when the program is lowered: a CPU may compile for chips that are elsewhere.
        return jax.lax.platform_dependent(x, kernel.kernel_OI, cpu=_feature_major, default=_rows_major)
    return product(f"{_rows(x)}i,io->{_rows(x)}o", x.astype(kernel.dtype), kernel)


def _rows(x) -> str:
    """A letter for each axis of activations but the last."""
    return "abcdefgh"[: x.ndim - 1]


def _rows_major(x, kernel_OI):
    return product(f"{_rows(x)}i,oi->{_rows(x)}o", x.astype(kernel_OI.dtype), kernel_OI)


def _feature_major(x, kernel_OI):
    """Weights times activations `[I, B]`. The barriers keep the compiler from turning it into the other form."""
    x_IB = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T.astype(kernel_OI.dtype))
    y_OB = jax.lax.optimization_barrier(product("oi,ib->ob", kernel_OI, x_IB))
    return y_OB.T.reshape(*x.shape[:-1], -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(form, x, y):
    """`einsum` of two arrays of one dtype with float32 sums and result; every letter is in two of its three terms.

    In the backward pass the incoming gradient is rounded to that dtype, so the two products of the gradient are as
    fast as the forward one: by itself a derivative would multiply float32 with bfloat16. There the operands change
    places where that leaves less to transpose.
    """
    return _as_it_stands(form, x, y)


def _as_it_stands(form, x, y):
    """The product with the operands in the order in which they are given: einsum chooses one by itself."""
    of_x, of_y, of_result = form.replace("->", ",").split(",")
    batch = [letter for letter in of_x if letter in of_y and letter in of_result]
    summed = [letter for letter in of_x if letter not in of_result]
    dimensions = [tuple(map(of.index, letters)) for letters in (summed, batch) for of in (of_x, of_y)]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    out = jax.lax.dot_general(x, y, (tuple(dimensions[:2]), tuple(dimensions[2:])), preferred_element_type=wide)
    made = [*batch, *(i for of in (of_x, of_y) for i in of if i not in batch and i in of_result)]
    order = [made.index(letter) for letter in of_result]
    # Without the barrier the compiler would turn a transposed result to operands that it has to transpose.
    return out if order == sorted(order) else jax.lax.optimization_barrier(out).transpose(order)


def _product_forward(form, x, y):
    return product(form, x, y), (x, y)


def _product_backward(form, operands, gradient):
    x, y = operands
    of_x, of_y, of_result = form.replace("->", ",").split(",")
    gradient = gradient.astype(x.dtype)
    to_x = _in_good_order((of_result, gradient), (of_y, y), of_x)
    to_y = _in_good_order((of_x, x), (of_result, gradient), of_y)
    return to_x.astype(x.dtype), to_y.astype(y.dtype)


def _in_good_order(one, other, of_result):
    """The `product` of two (letters, array), with that one in front which leaves less to transpose.

    XLA's CPU wants the summed letters of the first operand at its end, and makes the result with the letters of the
    first operand before those of the second. What is not so is copied, as slowly as some products are computed.
    """
    sizes = dict(zip(one[0] + other[0], one[1].shape + other[1].shape, strict=True))

    def copied(first, second):
        own = [letter for letter in first if letter in of_result and letter not in second]
        summed = [letter for letter in first if letter not in of_result]
        natural = own + [letter for letter in second if letter in of_result and letter not in first]
        operand = list(first[-len(summed) :]) != summed
        result = [letter for letter in of_result if letter in natural] != natural
        return operand * math.prod(sizes[i] for i in first) + result * math.prod(sizes[i] for i in of_result)

    if copied(other[0], one[0]) < copied(one[0], other[0]):
        one, other = other, one
    return _as_it_stands(f"{one[0]},{other[0]}->{of_result}", one[1], other[1])


product.defvjp(_product_forward, _product_backward)


def cast(params, dtype, in_loop=False):
    """Every floating leaf in `dtype`; an Int8 kernel keeps its numbers and takes operands of that dtype.

    `in_loop`: the cast belongs to a loop over layers and must stay there; see `mesh.rounded`.
    """

    def one(leaf):
        if isinstance(leaf, Int8):
            return leaf.replace(dtype=jnp.dtype(dtype).name)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return (rounded(leaf, dtype) if in_loop else leaf).astype(dtype)

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, Int8))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def kept(x, name: str):
    """`x`, which a policy of rematerialisation may keep under `name` (`jax.checkpoint_policies`).

    On a CPU bfloat16 is kept as its bits. A scan stacks what it keeps of its passes, and XLA's CPU writes a slice of a
    bfloat16 stack by turning all of it to float32 and back, once a layer.
    """
    return _kept_forward(x, name)[0]


def _kept_forward(x, name):
    if x.dtype != jnp.bfloat16 or platform_in_use() != "cpu":
        return checkpoint_name(x, name), None
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(bits, x.dtype), None


def _kept_backward(name, _, gradient):
    return (gradient,)


kept.defvjp(_kept_forward, _kept_backward)
