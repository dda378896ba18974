"""Every program of a run: what it is called with, what else stands in memory beside it, what it does, how often.

The programs are those that the stages run, built by the same functions from shapes in the place of arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from cai_jax.accelerators import Slice
from cai_jax.config import PROJECTIONS, Config
from cai_jax.mesh import ROWS, bytes_on_a_device, placed, shardings
from cai_jax.models import lora
from cai_jax.models.families import ModelConfig, param_shapes
from cai_jax.models.kernels import quantize
from cai_jax.plan.arithmetic import Work
from cai_jax.plan.workload import Workload
from cai_jax.sampler.abstract import SamplerShape
from cai_jax.sampler.cache import BLOCK
from cai_jax.training.step import TrainState

GENERATION, SCORING, TRAINING = "generation", "scoring", "training"


@dataclass(frozen=True)
class Program:
    """One compiled program of a stage. Bytes are those of one chip.

    `key` is the same for programs that compile to the same thing. `resident` is what the stage holds while the
    program runs and does not pass to it; `shared` are arguments that are passed twice and held once. `temporaries`
    and `outputs` (those that take no argument's place) are arithmetic, until a compiler has said better.
    """

    stage: str
    name: str
    share: str  # generation | scoring | training
    key: tuple
    lower: Callable[[], jax.stages.Lowered]
    arguments: int
    outputs: int
    temporaries: float
    resident: int
    work: Work
    calls: float
    tokens: float = 0.0  # drawn or trained on, a call
    shared: int = 0


@dataclass(frozen=True)
class Run:
    """A config on a slice: the models it names, their places, and what it has to do."""

    config: Config
    piece: Slice
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
    models: dict[str, ModelConfig]  # config field that names a model -> its shape
    workload: Workload

    @property
    def itemsize(self) -> int:
        """Bytes of an operand of the products."""
        return jnp.dtype(self.config.model.compute_dtype).itemsize

    def key(self, name: str, *rest) -> tuple:
        """What decides a compiled program: the chips, the mesh, and the rest."""
        return (name, self.piece.name, tuple(self.mesh.shape.values()), *rest)

    def params(self, model: ModelConfig, kind: str, dtype: str = ""):
        """A model's parameters, as shapes in their places."""
        dtype = dtype or self.config.model.dtype
        shapes = param_shapes(model, kind, "bfloat16" if dtype == "int8" else dtype)
        if dtype == "int8":
            for name in PROJECTIONS:
                whole = jax.ShapeDtypeStruct(shapes["layers"][name].shape, "float32")
                shapes["layers"][name] = jax.eval_shape(quantize, whole)
        return placed(shapes, shardings(self.mesh, shapes))

    def adapted(self, params):
        """The parameters that a stage is to train, as `Context.adapted` makes them; of several models by name."""
        if not self.config.lora.rank:
            return params
        if "layers" not in params:
            return {name: self.adapted(each) for name, each in params.items()}
        adapted = jax.eval_shape(lambda params: lora.add(params, self.config.lora, 0, self.mesh), params)
        return placed(adapted, shardings(self.mesh, adapted))

    def rows(self, arrays: dict):
        """A batch of host arrays, as shapes with their rows over the data axes."""
        by_row = NamedSharding(self.mesh, ROWS)
        return {name: jax.ShapeDtypeStruct(*shape, sharding=by_row) for name, shape in arrays.items()}

    def train_state(self, params, optimizer: optax.GradientTransformation) -> TrainState:
        """The state of a training, as shapes in their places."""
        state = jax.eval_shape(lambda params: TrainState(params, optimizer.init(params), jnp.int32(0)), params)
        return placed(state, shardings(self.mesh, state))

    @cached_property
    def prefixes(self) -> tuple[int, ...]:
        """Rooms of the shared prefixes, in the stage where they are longest together."""
        of_stages = [self.workload.starts.get(stage, (0,)) for stage in self.config.stages]
        # A template writes something before the first text.
        rooms = [tuple(ceil((tokens + 1) / BLOCK) * BLOCK for tokens in starts) for starts in of_stages]
        return max(rooms, key=sum, default=(BLOCK,))

    def sampler(self, model: ModelConfig) -> SamplerShape:
        """The sampler of a model as `Context.sampler` makes it."""
        shape = self.config.sampler
        return SamplerShape(
            model, shape.rows, min(shape.max_length, model.max_position), self.prefixes,
            self.config.model.compute_dtype, shape.int8_weights, shape.int8_cache, shape.prefill_tokens,
        )  # fmt: skip


def size(*trees) -> int:
    """Bytes on a chip."""
    return sum(bytes_on_a_device(tree) for tree in trees)


def int32(*shape: int):
    """Shape and dtype of a batch's column of whole numbers."""
    return shape, np.int32


def float32(*shape: int):
    """Shape and dtype of a batch's column of numbers."""
    return shape, np.float32
