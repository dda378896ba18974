"""The choices inside a decoding step on this machine's CPU: how to multiply few rows, how to draw, how to filter.

    python benchmarks/products.py [--rows 1 8 32]

Medians of interleaved runs, milliseconds, in the shapes of SmolLM2-135M (products: all of a step; draws: one step).
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax.models.kernels import Transposed, dot
from cai_jax.sampler.sampling import draw, highest_floor

WIDTH, HIDDEN, KEYS, LAYERS, VOCABULARY = 576, 1536, 192, 30, 49152
SHAPES = ((WIDTH, WIDTH + 2 * KEYS), (WIDTH, WIDTH), (WIDTH, 2 * HIDDEN), (HIDDEN, WIDTH))


def main():
    """Print the table."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    flags.add_argument("--repeats", type=int, default=9)
    args = flags.parse_args()
    products = product_cases()
    for rows in args.rows:
        show(rows, {**{name: (make, rows) for name, make in products.items()}, **draw_cases(rows)}, args.repeats)


def show(rows, cases, repeats):
    """Time the cases one after the other, again and again, and print their medians."""
    ready = {name: make(argument) for name, (make, argument) in cases.items()}
    times = {name: [] for name in ready}
    for _ in range(repeats):
        for name, run in ready.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    print(f"{rows} rows")
    for name, taken in times.items():
        print(f"  {name:44s} {np.median(taken) * 1e3:8.2f} ms")


def product_cases():
    """All products of a step, with the weights on either side and either way up."""
    rng = np.random.default_rng(0)
    stacks = [[jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in SHAPES] for _ in range(LAYERS)]
    turned = [[kernel.T.copy() for kernel in layer] for layer in stacks]

    def plain(x, kernel_OI):
        return jax.lax.dot_general(x, kernel_OI, (((1,), (1,)), ((), ())))

    def step(multiply, layers, rows):
        @jax.jit
        def run(x, layers):
            for qkv, out, gate_up, down in layers:
                x = x + 1e-3 * multiply(multiply(x, qkv)[:, :WIDTH], out)
                gate, up = jnp.split(multiply(x, gate_up), 2, axis=1)
                x = x + 1e-3 * multiply(jax.nn.silu(gate) * up, down)
            return x

        x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, WIDTH), np.float32))
        jax.block_until_ready(run(x, layers))
        return lambda: run(x, layers)

    return {
        "products: rows x weights [in, out]": lambda rows: step(dot, stacks, rows),
        "products: rows x weights [out, in]": lambda rows: step(plain, turned, rows),
        "products: as the sampler does them": lambda rows: step(
            dot, [[Transposed(kernel) for kernel in layer] for layer in turned], rows
        ),
    }


def draw_cases(rows):
    """One token a row from logits: the draw, and the search for the floor of top-p."""
    rng = np.random.default_rng(2)
    logits = jnp.asarray(rng.standard_normal((rows, VOCABULARY), np.float32) * 3)
    keys, uniform = jax.random.split(jax.random.key(0), rows), jnp.asarray(rng.random(rows, np.float32))

    def case(function, *inputs):
        run = jax.jit(function)
        jax.block_until_ready(run(*inputs))
        return lambda: run(*inputs)

    def floor(logits):
        return highest_floor(logits, jax.nn.softmax(logits), jnp.full(rows, 0.9))

    return {
        "draw: noise for every entry": (lambda _: case(jax.vmap(jax.random.categorical), keys, logits), None),
        "draw: one number a row": (lambda _: case(draw, logits, uniform), None),
        "top-p: sort": (lambda _: case(lambda logits: jnp.cumsum(jnp.sort(jax.nn.softmax(logits)), 1), logits), None),
        "top-p: bisection": (lambda _: case(floor, logits), None),
    }


if __name__ == "__main__":
    main()
