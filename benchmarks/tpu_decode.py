"""The decoding loop compiled by the TPU compiler, without a TPU: bytes it holds beside the cache, bytes it reads.

    pip install 'cai-jax[tpu]'      # for libtpu; no TPU is needed
    python benchmarks/tpu_decode.py [--rows 64] [--length 1024] [--topology v4:2x2x1]

Mistral-7B in bfloat16, heads split over the four chips of a v4-8. Prints the compiler's temporaries against the
key/value cache, and the bytes that a step must read (weights and the filled cache) against those that the compiled step
reads by the compiler's own count.
"""

import argparse
import os
import time

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding

from cai_jax.mesh import AXES, ROWS, decoding_shardings
from cai_jax.models import families
from cai_jax.sampler import cache as caches
from cai_jax.sampler import decode
from cai_jax.sampler.sampling import RowSettings
from cai_jax.sampler.weights import decoding_form

MISTRAL = dict(
    model_type="mistral", vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=32768,
    sliding_window=None, tie_word_embeddings=False,
)  # fmt: skip


def main():
    """Compile and print."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rows", type=int, default=64)
    flags.add_argument("--length", type=int, default=1024)
    flags.add_argument("--prefix", type=int, default=0)
    flags.add_argument("--layers", type=int, default=32)
    flags.add_argument("--topology", default="v4:2x2x1")
    args = flags.parse_args()
    mesh = topology_mesh(args.topology)
    config = families.config_from_hf(MISTRAL | {"num_hidden_layers": args.layers}, "mistral")
    weights, cache = abstract_state(config, mesh, args)
    slots, history = abstract_slots(mesh, args.rows, args.length)
    start = time.time()
    lowered = decode.decode.lower(
        config, mesh, weights, cache, slots, history, jax.ShapeDtypeStruct((), jnp.int32), steps=32
    )
    compiled = lowered.compile()
    report(args, compiled, weights, cache, mesh.size, time.time() - start)


def topology_mesh(name: str):
    """A mesh over chips that are not there, all of them along the tensor axis."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=name, chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1), num_slices=1,
        wrap=(False, False, False),
    )  # fmt: skip
    devices = np.asarray(topology.devices).reshape(1, 1, -1)
    return jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_state(config, mesh, args):
    """Shapes and places of weights and cache."""
    params = families.param_shapes(config, "policy")
    weights = jax.eval_shape(lambda params: decoding_form(config, jnp.bfloat16, mesh, False, params), params)
    cache = jax.eval_shape(lambda: caches.empty_cache(config, args.rows, args.length, args.prefix, jnp.bfloat16, "tpu"))
    places = decoding_shardings(mesh, weights), caches.cache_shardings(config, mesh, cache)
    return placed(weights, places[0]), placed(cache, places[1])


def abstract_slots(mesh, rows: int, length: int):
    """Shapes of what a decoding call is told of its slots."""
    column = {
        "temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32,
        "repetition_penalty": np.float32, "max_new_tokens": np.int32,
    }  # fmt: skip
    settings = RowSettings(
        **{name: np.zeros(rows, dtype) for name, dtype in column.items()},
        stop=np.zeros((rows, 2), np.int32), key=np.zeros((rows, 2), np.uint32),
    )  # fmt: skip
    numbers = [np.zeros(rows, np.int32)] * 4
    slots = decode.Slots(*numbers, np.zeros(rows, bool), settings)
    by_row = NamedSharding(mesh, ROWS)
    arrays = slots, np.zeros((rows, length), np.int32)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_row), arrays)


def placed(shapes, shardings):
    """Abstract arrays in their places."""
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, shardings)


def report(args, compiled, weights, cache, chips, seconds):
    """The table."""
    def total(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    memory = compiled.memory_analysis()
    temporaries = memory.temp_size_in_bytes
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    kv, model = total(cache) / chips, (total(weights) - total(weights["embed"])) / chips
    lines = [
        ("topology, chips", f"{args.topology}, {chips}"),
        ("rows x entries", f"{args.rows} x {args.length}"),
        ("key/value cache, a chip", gib(kv)),
        ("weights, a chip", gib(total(weights) / chips)),
        ("temporaries, a chip", f"{gib(temporaries)}  ({temporaries / kv:.0%} of the cache)"),
        ("arguments, a chip", gib(memory.argument_size_in_bytes)),
        ("a step must read, cache full", gib(model + kv)),
        ("the compiler counts, loop bodies once", gib(cost["bytes accessed"])),
        ("compiled in", f"{seconds:.0f} s"),
    ]
    for name, value in lines:
        print(f"{name:40s} {value}")


def gib(count: float) -> str:
    """2.00 GiB"""
    return f"{count / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
