"""The sampler's programs in a plan: prepare, share, prefill, decode."""

from dataclasses import dataclass
from math import ceil

import jax.numpy as jnp

from cai_jax.models.families import ModelConfig
from cai_jax.plan import arithmetic
from cai_jax.plan.programs import GENERATION, Program, Run, size
from cai_jax.sampler import abstract
from cai_jax.sampler.cache import STRIP


@dataclass(frozen=True)
class Load:
    """What a sampler is asked for: `steps` decoding steps of all slots, `prefilled` tokens; on `context` entries."""

    steps: float
    prefilled: float
    context: float
    versions: int = 1  # of the policy: how often weights are prepared

    @classmethod
    def of(cls, slots: int, rows: int, new_tokens: int, prefilled: float, context: float, versions: int = 1) -> "Load":
        """`rows` rows through `slots` slots, `new_tokens` drawn and `prefilled` run for each of them."""
        return cls(versions * ceil(rows / slots) * new_tokens, versions * rows * prefilled, context, versions)


def sampler_programs(
    run: Run, stage: str, model: ModelConfig, params, resident: int, load: Load, share: str = GENERATION
) -> list[Program]:
    """Programs of a sampler of `params`, which are among the `resident` bytes that the stage holds beside it."""
    mesh, shape, platform = run.mesh, run.sampler(model), run.piece.chip.platform
    weights, cache = (f(shape, mesh, platform) for f in (abstract.abstract_weights, abstract.abstract_cache))
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    strip_tokens = abstract.strips_of_shard(shape.prefill_tokens, mesh) * STRIP
    stored = jnp.dtype(run.config.model.dtype).itemsize

    def program(name, lower, arguments, outputs, temporaries, beside, work, calls, tokens=0):
        key = run.key(name, shape, run.config.model.dtype)
        return Program(stage, name, share, key, lower, arguments, outputs, temporaries, beside, work, calls, tokens)

    both = size(weights, cache)
    programs = [
        program(
            "prepare weights", lambda: abstract.lower_prepare(shape, mesh, params), size(params), size(weights),
            arithmetic.prepare_temporaries(shape, mesh), resident - size(params),
            arithmetic.prepare_work(shape, mesh, stored), load.versions,
        ),
        program(
            "share prefix", lambda: abstract.lower_share(shape, mesh), size(cache.own), size(cache.shared), 0.0,
            resident + size(weights, cache.shared), arithmetic.share_work(shape, mesh), load.versions,
        ),
        program(
            "prefill", lambda: abstract.lower_prefill(shape, mesh), both, 0,
            arithmetic.sampler_temporaries(shape, mesh, strip_tokens), resident,
            arithmetic.prefill_work(shape, mesh, load.context / 2), ceil(load.prefilled / (strip_tokens * ways)),
        ),
    ]  # fmt: skip
    if load.steps:
        programs.append(program(
            "decode, a step", lambda: abstract.lower_decode(shape, mesh), both, 0,
            arithmetic.sampler_temporaries(shape, mesh, shape.rows // ways), resident,
            arithmetic.decode_work(shape, mesh, load.context), load.steps, shape.rows,
        ))  # fmt: skip
    return programs


def sampler_bytes(run: Run, model: ModelConfig) -> int:
    """Weights and cache of a sampler on a chip."""
    shape, platform = run.sampler(model), run.piece.chip.platform
    return size(
        abstract.abstract_weights(shape, run.mesh, platform), abstract.abstract_cache(shape, run.mesh, platform)
    )
