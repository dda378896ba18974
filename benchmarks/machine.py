"""What the machine can do at most: how fast it reads memory, and how fast it multiplies matrices.

    python benchmarks/machine.py

prints one line of JSON. Bytes a second: a 512 MB matrix, which no cache holds, times a vector. FLOPs a second: the
product of two 2048 x 2048 matrices, in float32 and with bfloat16 operands. NumPy or JAX, the faster; bfloat16: JAX.
"""

import json
import os
import time

SIZE = 2048
ROWS = 1 << 16  # of the 512 MB matrix


def best(work, times: int = 7) -> float:
    """Seconds of the fastest of some runs: a limit is what the machine can do undisturbed."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def bytes_per_second() -> float:
    import jax
    import numpy as np

    weights, x = np.ones((ROWS, SIZE), np.float32), np.ones(SIZE, np.float32)
    product = jax.jit(lambda weights, x: weights @ x)
    on_device = jax.device_put((weights, x))
    product(*on_device).block_until_ready()
    seconds = min(best(lambda: product(*on_device).block_until_ready()), best(lambda: weights @ x))
    return weights.nbytes / seconds


def flops_per_second(precision: str) -> float:
    import jax
    import jax.numpy as jnp
    import numpy as np

    ones = np.ones((SIZE, SIZE), np.float32)
    a = jnp.asarray(ones, precision)
    product = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()
    seconds = best(lambda: product(a, a).block_until_ready())
    if precision == "float32":
        seconds = min(seconds, best(lambda: ones @ ones))
    return 2 * SIZE**3 / seconds


def decode_limit(config: dict, machine: dict, rows: int, filled: int, precision: str) -> float:
    """Milliseconds below which no decoding step of `rows` rows with `filled` cached tokens each can be.

    `config` is the model's config.json. Weights and cache are read once; products run at the measured rate.
    """
    width, layers, size = config["hidden_size"], config["num_hidden_layers"], 2 if precision == "bfloat16" else 4
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = width * (2 * queries + 2 * keys + 3 * config["intermediate_size"])
    weights = layers * layer + config["vocab_size"] * width
    bytes_read = size * (weights + rows * filled * 2 * layers * keys)
    flops = 2 * rows * (weights + 2 * layers * filled * queries)
    return 1000 * max(bytes_read / machine["bytes_per_second"], flops / machine[f"{precision}_flops_per_second"])


def main() -> None:
    print(json.dumps({
        "bytes_per_second": bytes_per_second(),
        "float32_flops_per_second": flops_per_second("float32"),
        "bfloat16_flops_per_second": flops_per_second("bfloat16"),
    }))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
