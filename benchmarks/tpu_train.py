"""One training step compiled by the TPU compiler, without a TPU: bytes a chip, and how long compiling takes.

    pip install 'cai-jax[tpu]'      # for libtpu; no TPU is needed
    python benchmarks/tpu_train.py [--remat full] [--rows 2] [--length 2048] [--attention auto] [--topology v4:2x2x4]

SFT of Mistral-7B with everything split over all chips (FSDP), float32 parameters and Adam, bfloat16 operands and
activations. Goals: MaxText's numbers by the same compiler for the same step (v4-32, 2 x 2048 tokens a chip, full
rematerialisation, flash attention): arguments 5.06 GiB, temporaries 4.70, peak 9.74.
"""

import argparse
import os
import time

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from tpu_decode import gib, with_layers

from cai_jax import config as configs
from cai_jax.mesh import AXES, ROWS, placed, shardings
from cai_jax.models import families
from cai_jax.models.known_shapes import known_shape
from cai_jax.objectives.model_losses import sft_objective
from cai_jax.training.step import TrainState, make_optimizer, make_schedule, make_train_step

GOALS = {"temporaries": 4.7, "peak": 9.7, "seconds": 150}  # GiB, GiB, of compiling on two cores


def main():
    """Compile and print."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rows", type=int, default=2, help="a chip")
    flags.add_argument("--length", type=int, default=2048)
    flags.add_argument("--microbatches", type=int, default=1)
    flags.add_argument("--layers", type=int, default=32)
    flags.add_argument("--remat", default="full")
    flags.add_argument("--attention", default="auto")
    flags.add_argument("--topology", default="v4:2x2x4")
    flags.add_argument("--tensor", type=int, default=1, help="chips that share the heads of a layer")
    flags.add_argument("--hlo", help="file for the compiled program")
    args = flags.parse_args()
    mesh = topology_mesh(args.topology, args.tensor)
    model = with_layers(known_shape("mistral-7b-v0.3"), args.layers)
    start = time.time()
    compiled = lower(model, mesh, args).compile()
    report(args, compiled.memory_analysis(), mesh.size, time.time() - start)
    if args.hlo:
        with open(args.hlo, "w") as file:
            file.write(compiled.as_text())


def topology_mesh(name: str, tensor: int):
    """A mesh over chips that are not there: fsdp over all that the tensor axis leaves."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=name, chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1), num_slices=1,
        wrap=(False, False, False),
    )  # fmt: skip
    devices = np.asarray(topology.devices).reshape(1, -1, tensor)
    return jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def lower(model, mesh, args):
    """The step on abstract values in their places."""
    settings = configs.Optimizer()
    schedule = make_schedule(settings, 1000)
    optimizer = make_optimizer(settings, schedule)

    def start(params):
        return TrainState(params, optimizer.init(params), np.int32(0))

    state = jax.eval_shape(start, families.param_shapes(model, "policy"))
    objective = sft_objective(model, "bfloat16", args.remat, args.attention)
    step = make_train_step(objective, optimizer, schedule, mesh, state, args.microbatches)
    shape = args.rows * mesh.shape["fsdp"] * args.microbatches, args.length
    by_row = NamedSharding(mesh, ROWS)
    names = "tokens", "positions", "segments", "targets"
    batch = {name: jax.ShapeDtypeStruct(shape, np.int32, sharding=by_row) for name in names}
    return step.lower(placed(state, shardings(mesh, state)), batch)


def report(args, memory, chips, seconds):
    """The table."""
    temporaries = memory.temp_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + temporaries + new
    lines = [
        ("topology, chips", f"{args.topology}, {chips}"),
        ("rows x tokens a chip", f"{args.rows} x {args.length}, {args.microbatches} microbatches"),
        ("rematerialisation, attention", f"{args.remat}, {args.attention}"),
        ("arguments, a chip", gib(memory.argument_size_in_bytes)),
        ("temporaries, a chip", f"{gib(temporaries)}  (goal {GOALS['temporaries']})"),
        ("arguments and temporaries", f"{gib(peak)}  (goal {GOALS['peak']})"),
        ("peak by the compiler", gib(memory.peak_memory_in_bytes)),
        ("traced and compiled in", f"{seconds:.0f} s  (goal {GOALS['seconds']})"),
    ]
    for name, value in lines:
        print(f"{name:40s} {value}", flush=True)


if __name__ == "__main__":
    main()
