"""A run on chips that are not there: what its programs need, how long they take at the least, what that costs."""

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, replace

from cai_jax.accelerators import GIB, Accelerator, Slice, slices_of
from cai_jax.config import Config
from cai_jax.config_rules import REINFORCED, validate
from cai_jax.errors import UserError
from cai_jax.models.families import ModelConfig
from cai_jax.models.known_shapes import shape_of
from cai_jax.plan import mend
from cai_jax.plan.measure import Measurer, Memory, arrays_alone
from cai_jax.plan.programs import GENERATION, SCORING, TRAINING, Program, Run
from cai_jax.plan.stages import programs_of
from cai_jax.plan.topology import planned_mesh
from cai_jax.plan.workload import workload_of
from cai_jax.stages.context import check_rows
from cai_jax.stages.inputs import is_watched

# Half of the published peaks is what a good training run reaches (MaxText publishes 50-70% on v4 to v5p).
EXPECTED_SHARE_OF_PEAK = 0.5


@dataclass(frozen=True)
class Line:
    """A program with its bytes on a chip and the seconds of one call at peak."""

    program: Program
    memory: Memory
    seconds: float
    bound: str  # compute | memory | links: what takes that long

    @property
    def total(self) -> int:
        """Bytes a chip while the program runs, with what the stage holds beside it."""
        return self.program.resident - self.program.shared + self.memory.total

    @property
    def run_seconds(self) -> float:
        """Of all calls of the run, at peak."""
        return self.seconds * self.program.calls


@dataclass(frozen=True)
class Plan:
    """All lines of a run on a slice."""

    config: Config
    piece: Slice
    mesh: dict[str, int]
    lines: tuple[Line, ...]
    models: dict[str, tuple[ModelConfig, str]]  # field -> shape, and where it is known from
    assumptions: tuple[str, ...]

    @property
    def tokens(self) -> float:
        """Tokens that the run draws and trains on."""
        return sum(line.program.tokens * line.program.calls for line in self.lines)

    @property
    def too_large(self) -> list[Line]:
        """The lines that do not fit."""
        return [line for line in self.lines if line.total > self.piece.chip.usable]

    def seconds(self, stage: str = "", share: str = "") -> float:
        """At peak, of a stage, or of one kind of work, or of all."""
        return sum(
            line.run_seconds
            for line in self.lines
            if stage in ("", line.program.stage) and share in ("", line.program.share)
        )

    def shares(self, stage: str = "") -> dict[str, float]:
        """Parts of the time that generation, scoring and training take."""
        whole = max(self.seconds(stage), 1e-12)
        return {share: self.seconds(stage, share) / whole for share in (GENERATION, SCORING, TRAINING)}


def make_plan(config: Config, piece: Slice, measurer: Measurer) -> Plan:
    """Measure every program of a run. Raises UserError where the config, its models or its mesh do not go together."""
    run, models = planned_run(config, piece)
    return _plan(run, models, measurer.of)


def find_change(plan: Plan, measurer: Measurer) -> tuple[mend.Change, Plan] | None:
    """The nearest change with which everything fits, measured like the plan itself; None where there is none.

    Candidates are first judged by arithmetic, scaled by what the compiler last made of the same program, on this slice
    or in the plan; only one that passes is compiled, the largest program first, up to the first that does not fit.
    """
    known = dict(map(_scale, plan.lines))
    scales = defaultdict(known.copy)  # by slice
    found = None

    def guessed(config: Config, piece: Slice) -> list[Line]:
        """Largest first."""
        run, models = planned_run(config, piece)
        lines = _plan(run, models, lambda program: measurer.guess(program, scales[piece.name])).lines
        return sorted(lines, key=lambda line: -line.total)

    def largest(config: Config, piece: Slice) -> int:
        validate(config)
        return guessed(config, piece)[0].total

    def fits(config: Config, piece: Slice) -> bool:
        nonlocal found
        for line in guessed(config, piece):
            line = dataclasses.replace(line, memory=measurer.of(line.program))
            scales[piece.name].update([_scale(line)])
            if line.total > piece.chip.usable:
                measurer.log(f"{line.program.stage}: {line.program.name}: {line.total / GIB:.2f} GiB, too large")
                return False
        found = make_plan(config, piece, measurer)
        return True

    change = mend.nearest(plan.config, plan.piece, largest, fits, measurer.log)
    return change and (change, found)


def _scale(line: Line) -> tuple[tuple[str, str], float]:
    """Stage and name of a program, and how its temporaries compare with the arithmetic of them."""
    return (line.program.stage, line.program.name), line.memory.temporaries / max(1.0, line.program.temporaries)


def planned_run(config: Config, piece: Slice) -> tuple[Run, dict]:
    """A run on a slice, and `models_of` it. Raises UserError where config, models and mesh do not go together."""
    models = models_of(config)
    mesh = planned_mesh(config.mesh, piece)
    check_rows(config, mesh)
    shapes = {name: shape for name, (shape, _) in models.items()}
    return Run(config, piece, mesh, shapes, workload_of(config)), models


def _plan(run: Run, models, measure) -> Plan:
    lines = []
    for program in programs_of(run):
        times = program.work.times(run.piece)
        bound = max(times, key=times.get)
        lines.append(Line(program, measure(program), times[bound], bound))
    return Plan(run.config, run.piece, dict(run.mesh.shape), tuple(lines), models, run.workload.assumptions)


def models_of(config: Config) -> dict[str, tuple[ModelConfig, str]]:
    """Config field that names a model -> its shape, and in words where that is known from."""
    base = shape_of(config.model.source)
    models = {"model.source": base}
    named = {
        "red_team": ("writer", "target"),
        "preferences": ("policy", "judge"), "reward_model": ("start",), "evaluate": ("rl", "reward_model"),
        **{stage: ("policy", *_scoring_model(getattr(config, stage))) for stage in REINFORCED},
        "dpo": ("policy",), "best_of_n": ("policy", "reward_model"),
    }  # fmt: skip
    if "judge" in config.stages:  # it asks the model that labels
        judge = config.preferences.judge
        models["preferences.judge"] = shape_of(judge, base[0]) if judge else base
    scorer = replace(base[0], score_heads=config.reward_model.heads), base[1]
    for stage, fields in named.items():
        for field in fields if stage in config.stages else ():
            source = getattr(getattr(config, stage), field)
            own = scorer if field == "reward_model" else base
            models[f"{stage}.{field}"] = shape_of(source, base[0]) if source else own
    if config.monitor.judge in ("rating", "contrast", "model") and any(is_watched(config, s) for s in config.stages):
        models["monitor.model"] = shape_of(config.monitor.model, base[0]) if config.monitor.model else base
    return models


def _scoring_model(settings) -> tuple[str, ...]:
    """The field that names the model that scores rollouts; a rule has none."""
    return {"model": ("reward_model",), "rule": ()}.get(settings.reward, ("judge",))


def smallest_plan(config: Config, chip: Accelerator, measurer: Measurer) -> Plan:
    """The plan on the smallest slice of a chip on which everything fits, or on the largest there is.

    A slice whose arrays alone are too large is passed over without compiling. Raises UserError where the mesh of the
    config divides no slice.
    """
    plan, refused = None, None
    for piece in slices_of(chip):
        try:
            run, models = planned_run(config, piece)
        except UserError as error:
            refused = error
            continue
        plan = _plan(run, models, arrays_alone)
        if not plan.too_large:
            plan = _plan(run, models, measurer.of)
        if not plan.too_large:
            return plan
    if plan is None:
        raise refused
    return plan
