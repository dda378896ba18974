"""The decoding loop compiled by the TPU compiler, without a TPU: bytes it holds beside the cache, bytes it reads.

    pip install 'cai-jax[plan]'      # libtpu; no TPU is needed
    python benchmarks/tpu_decode.py [--slice v4-8] [--rows 64] [--length 1024] [--layers 32]

Mistral-7B in bfloat16, heads split over the chips of the slice. Prints the compiler's temporaries against the key/value
cache, and what a step must read (weights and the filled cache) against what the compiled step reads. The compiler's
count takes each loop's body once: one step of the outer loop, one block of the cache, one row of the loop that writes.
So its count with one layer and with two is carried on to all layers, plus the blocks that it leaves out. That is more
than a chip moves: the count takes writes too.
"""

import argparse
import dataclasses
import os
import time

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v4-8",
)  # fmt: skip

from cai_jax.accelerators import GIB, parse_slice
from cai_jax.config import Mesh
from cai_jax.mesh import bytes_on_a_device
from cai_jax.models.known_shapes import known_shape
from cai_jax.plan.topology import planned_mesh
from cai_jax.sampler.abstract import SamplerShape, abstract_cache, abstract_weights, lower_decode
from cai_jax.sampler.cache import BLOCK, blocks_of


def main():
    """Compile and print."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--slice", default="v4-8")
    flags.add_argument("--rows", type=int, default=64)
    flags.add_argument("--length", type=int, default=1024)
    flags.add_argument("--prefix", type=int, default=0)
    flags.add_argument("--layers", type=int, default=32)
    flags.add_argument("--model", default="mistralai/Mistral-7B-Instruct-v0.3")
    args = flags.parse_args()
    piece = parse_slice(args.slice)
    mesh = planned_mesh(Mesh(data=1, fsdp=1, tensor=-1), piece)
    whole = SamplerShape(
        with_layers(known_shape(args.model), args.layers), args.rows, args.length, (args.prefix,), "bfloat16"
    )
    start = time.monotonic()
    compiled = lower_decode(whole, mesh).compile()
    seconds = time.monotonic() - start
    weights, cache = abstract_weights(whole, mesh, "tpu"), abstract_cache(whole, mesh, "tpu")
    read = bytes_on_a_device(weights) - bytes_on_a_device(weights["embed"])
    report(args, piece, compiled.memory_analysis(), bytes_on_a_device(cache), read, seconds)
    report_reads(whole, mesh, read, bytes_on_a_device(cache.own))


def with_layers(config, layers: int):
    """The same model with other depth."""
    return dataclasses.replace(
        config, n_layers=layers, windows=config.windows[:1] * layers, rope_of_layer=config.rope_of_layer[:1] * layers
    )


def report(args, piece, memory, cache: int, weights: int, seconds: float):
    """Bytes that the loop holds."""
    temporaries = memory.temp_size_in_bytes
    show("slice, chips, layers", f"{piece.name}, {piece.chips}, {args.layers}")
    show("rows x entries", f"{args.rows} x {args.length}")
    show("key/value cache, a chip", gib(cache))
    show("weights that a step reads, a chip", gib(weights))
    show("arguments, a chip", gib(memory.argument_size_in_bytes))
    show("temporaries, a chip", f"{gib(temporaries)}  ({temporaries / cache:.1%} of the cache)")
    show("compiled in", f"{seconds:.0f} s")


def report_reads(whole, mesh, weights: int, own: int):
    """Bytes that a step must read, and those that the compiled step reads, the cache full."""
    one, two = (counted(dataclasses.replace(whole, config=with_layers(whole.config, n)), mesh) for n in (1, 2))
    layers, blocks = whole.config.n_layers, blocks_of(whole.length) - 1
    a_block = own / layers / (blocks + 1)
    ours = one + (layers - 1) * (two - one) + layers * (blocks - 1) * a_block
    must = weights + layers * blocks * a_block
    show("a step must read, cache full", gib(must))
    show("the compiler's count, 1 and 2 layers, bodies once", f"{gib(one)}, {gib(two)}")
    show(f"carried on to {layers} layers, {blocks} blocks of {BLOCK}", f"{gib(ours)}  ({ours / must:.2f} of the must)")


def counted(shape: SamplerShape, mesh) -> float:
    """Bytes accessed by the compiler's count, reads and writes."""
    cost = lower_decode(shape, mesh).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["bytes accessed"]


def show(name: str, value: str):
    """One line of the table."""
    print(f"{name:52s} {value}", flush=True)


def gib(count: float) -> str:
    """2.00 GiB"""
    return f"{count / GIB:.2f} GiB"


if __name__ == "__main__":
    main()
