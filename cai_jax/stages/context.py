"""What a stage is given: the resolved config, checked inputs, models on the mesh, and its folder."""

import contextlib
import gc
import importlib
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import jax

import cai_jax
from cai_jax import distributed
from cai_jax import mesh as meshes
from cai_jax.config import Config, PromptSet
from cai_jax.config_rules import REINFORCED
from cai_jax.constitution import Constitution, load_constitution
from cai_jax.conversation_sets import Conversations
from cai_jax.endpoint import Client, check_endpoint
from cai_jax.errors import UserError
from cai_jax.gold import Gold
from cai_jax.memory import peak_memory, reset_peak_memory
from cai_jax.metrics_log import MetricsLog
from cai_jax.models import lora
from cai_jax.models.adapters import save_adapter
from cai_jax.models.pretrained import Model, load_model, save_model
from cai_jax.overrides import flatten
from cai_jax.progress import Progress, duration
from cai_jax.prompt_sets import check_disjoint, joined, load_prompts
from cai_jax.provenance import row_seed
from cai_jax.run_folder import StageFolder, check_free_space
from cai_jax.sampler import Sampler
from cai_jax.sampler.cache import cache_bytes, entry_dtype
from cai_jax.sampler.memory import check_cache_fits, gibibytes
from cai_jax.stages import judge
from cai_jax.stages.fingerprint import fingerprint_of
from cai_jax.stages.inputs import (
    EVAL_SETS,
    asks_endpoint,
    check_models,
    check_principles,
    override_of,
    read_gold,
    read_mixed,
    read_prompts,
)
from cai_jax.stages.rollouts import rows_of_pass
from cai_jax.training.checkpoint import Checkpoints

# Copies of the parameters in a train state: themselves and two moments, in PPO those of a value model of its own too.
STATE_COPIES = {"sft": 3, "reward_model": 3, "ppo": 6, "dpo": 3, "best_of_n": 3, "grpo": 3}
# Stages that compute nothing with the model that the run starts from: its memory is theirs.
WITHOUT_BASE = ("reward_model", "ppo", "dpo", "best_of_n", "grpo")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets")


@dataclass
class Context:
    """A run: its config, and everything that was read and checked before any compute was spent."""

    name: str
    config: Config
    run_dir: Path
    progress: Progress
    mesh: jax.sharding.Mesh
    constitution: Constitution
    prompts: dict  # of the later stages: `given`, and in red_team what the stage of that name has written
    mixed: dict[str, Conversations]  # what SFT mixes in, by source
    base: Model
    gold: Gold | None = None  # of the judge stage
    endpoint: Client | None = None  # while a stage runs that asks it
    programs: set = field(default_factory=set)  # static shapes that the samplers of the stage have run
    all_programs: set = field(default_factory=set)  # the same of all stages of this command
    given: dict = field(init=False)  # prompts as the config names them

    def __post_init__(self):
        self.given = self.prompts

    def folder(self, stage: str) -> StageFolder:
        """The artifacts of a stage."""
        return StageFolder(self.run_dir, stage)

    def load(self, source: str, kind: str | None = None, dtype: str = "", **options) -> Model:
        """A model on the mesh, in the run's dtype or in another."""
        dtype = dtype or self.config.model.dtype
        return load_model(source, dtype, kind, lambda shapes: meshes.shardings(self.mesh, shapes), **options)

    def load_from(self, stage: str, override: str, kind: str = "policy", **options) -> Model:
        """The exported model of a stage, or the one that the config names in its place."""
        return self.load(override or str(self.folder(stage).path / "model"), kind, **options)

    def adapted(self, params: dict, name: str) -> dict:
        """The params of a model that a stage is to train: with fresh adapters, where the config asks for them."""
        return lora.add(params, self.config.lora, self.row_seed("lora", name) % 2**31, self.mesh)

    def export(self, folder: StageFolder, model: Model, params, kind: str) -> None:
        """Write trained params as the Hugging Face folder `model/` of a stage, with its provenance.

        Adapters are merged there, and lie beside it in `adapter/`.
        """
        metadata = {
            "constitution": self.constitution_name(), "constitution_hash": self.constitution.hash,
            "base_model_hash": self.base.hash, "stage": folder.stage, "seed": str(self.config.seed),
        }  # fmt: skip
        with self.progress.task(f"{folder.stage}: export", 1, "models") as task:
            if self.config.lora.rank:
                base = self._start_of(folder.stage)
                save_adapter(folder.path / "adapter", model.config, params, kind, base, metadata)
            merged = lora.merge(params)
            save_model(
                folder.path / "model", model.config, merged, model.tokenizer, model.hf_config, kind, metadata
            )
            task.advance(1)

    def _start_of(self, stage: str) -> str:
        """The model that a training stage starts from, as the config names it, or as seen from the run folder."""
        return self.config.model.source if stage == "sft" else override_of(self.config, stage, "sft") or "sft/model"

    def sampler(self, model: Model) -> Sampler:
        """The sampler of a model, in the shape that the config asks for."""
        return Sampler(
            model,
            max_length=min(self.config.sampler.max_length, model.config.max_position),
            rows=self.config.sampler.rows,
            dtype=self.config.model.compute_dtype,
            int8_weights=self.config.sampler.int8_weights,
            int8_cache=self.config.sampler.int8_cache,
            mesh=self.mesh if self.mesh.devices.size > 1 else None,
            prefill_tokens=self.config.sampler.prefill_tokens,
            programs=self.programs,
        )

    def metrics_log(self, folder: StageFolder, flops_per_token: float) -> MetricsLog:
        """Where a training stage writes its numbers; `flops_per_token` as in models/flops.py, without recomputation."""
        project = self.config.logging.wandb
        wandb = {"project": project, "group": self.name, "name": f"{self.name}/{folder.stage}",
                 "config": flatten(self.config)} if project else None  # fmt: skip
        return MetricsLog(folder.path, flops_per_token, list(self.mesh.devices.flat), wandb)

    def put_rows(self, batch: dict):
        """A batch of host arrays, its rows split over the mesh."""
        return meshes.put_rows(self.mesh, batch)

    def place_rows(self, rows, take):
        """The batch `take(rows)`, its rows split over the mesh; each process takes those of its devices only."""
        return meshes.place_rows(self.mesh, rows, take)

    def checkpoints(self, folder: StageFolder, every: int) -> Checkpoints:
        """The checkpoints of a training stage."""
        settings = self.config.checkpoints
        chooses = settings.export == "best" or (settings.export == "frontier" and folder.stage in REINFORCED)
        return Checkpoints(folder.path / "checkpoints", every, settings.keep, chooses)

    def quality(self, of_state):
        """`of_state` where the config asks for the best state of a training stage, None where it asks for none."""
        return of_state if self.config.checkpoints.export == "best" else None

    def row_seed(self, stage: str, row_id: str, *rest) -> int:
        """The key of a row in this run."""
        return row_seed(self.config.seed, stage, row_id, *rest)

    def provenance(self, stage: str, model: Model | None = None) -> dict:
        """What every row carries about where it is from."""
        return {
            "constitution": self.constitution_name(),
            "constitution_hash": self.constitution.hash,
            "model_hash": (model or self.base).hash,
            "seed": self.config.seed,
            "stage": stage,
        }

    def constitution_name(self) -> str:
        """name@version"""
        return f"{self.constitution.name}@{self.constitution.version}"

    def describe(self) -> dict:
        """What the report says about the inputs of the run."""
        leaves = jax.tree.leaves(self.base.params)
        return {
            "parameters": sum(leaf.size for leaf in leaves),
            "constitution": {
                "name": self.constitution.name, "version": self.constitution.version, "hash": self.constitution.hash,
            },
            "model_hash": self.base.hash,
            "prompts": {
                name: {"rows": len(rows.rows), "skipped": list(rows.skipped), "hash": rows.hash}
                for name, rows in self.prompts.items()
            },
            "conversations": {
                source: {"rows": len(rows.rows), "skipped": len(rows.skipped), "hash": rows.hash}
                for source, rows in self.mixed.items()
            },
            "versions": {"cai_jax": cai_jax.__version__} | {package: metadata.version(package) for package in PACKAGES},
        }  # fmt: skip

    def run_stage(self, stage: str) -> None:
        """Run one stage, or go on with it, or find it done.

        Raises UserError where labelers that a judge stage has measured are not good enough to label.
        """
        if stage == "preferences":
            judge.check_gate(self.config, self.folder("judge"))
        self._run_stage(stage)
        if stage == "judge":
            judge.check_gate(self.config, self.folder("judge"))

    def _run_stage(self, stage: str) -> None:
        folder = self.folder(stage)
        begun = folder.begin(self.fingerprint(stage))
        if begun == "done":
            self.progress.log(f"{stage}: done before, skipped")
            return
        self.progress.log(f"{stage}: {'going on where it stopped' if begun == 'resume' else 'start'}")
        started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        reset_peak_memory()
        self.programs.clear()
        self._hold_base(stage not in WITHOUT_BASE)
        with self._open_endpoint(stage) as self.endpoint:
            summary = importlib.import_module(f"cai_jax.stages.{stage}").run(self, folder)
        folder.write_summary(summary)
        seconds = time.monotonic() - clock
        self.all_programs |= self.programs
        timing = {
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(),
            "started": started,
            "resumed": begun == "resume",
            "sampler_programs": len(self.programs),
            "sampler_programs_so_far": len(self.all_programs),
        }
        if self.endpoint:
            timing["endpoint"] = self.endpoint.report()
        folder.finish(timing)
        if stage == "red_team":
            self.take_up_written()
        gc.collect()
        self.progress.log(f"{stage}: done in {duration(seconds)}")

    def _open_endpoint(self, stage: str):
        """The client of a stage that asks the endpoint, to be closed at its end; None for others."""
        if not asks_endpoint(self.config, stage):
            return contextlib.nullcontext()
        return Client(self.config.endpoint, self.run_dir / "endpoint")

    def _hold_base(self, wanted: bool) -> None:
        """Have the params of the model that the run starts from in memory, or not."""
        if not wanted:
            self.base = replace(self.base, params=None)
        elif self.base.params is None:
            self.base = self.load(self.config.model.source, "policy")

    def take_up_written(self) -> None:
        """Add the prompts that the stage red_team has written to those of the run, where it is done."""
        folder = self.folder("red_team")
        if folder.done() is None or not (folder.path / "prompts.jsonl").stat().st_size:
            return
        written = load_prompts(PromptSet(str(folder.path / "prompts.jsonl")), "red_team")
        check_disjoint({"red_team": written}, {name: self.given[name] for name in EVAL_SETS})
        self.prompts = self.given | {"red_team": joined(self.given["red_team"], written)}

    def available(self, stage: str, override: str) -> bool:
        """Whether a model of a stage is there: exported by this run, or named by the config."""
        return bool(override) or self.folder(stage).done() is not None

    def fingerprint(self, stage: str) -> dict:
        """All that the artifacts of a stage depend on; see fingerprint.py."""
        return fingerprint_of(self, stage)

    def check_unchanged(self) -> None:
        """Refuse selected stages whose earlier work was made from other inputs, as far as these are known by now."""
        for stage in self.config.stages:
            self.folder(stage).check(self.fingerprint(stage))


def prepare(name: str, config: Config, run_dir: Path, fresh: bool, progress: Progress) -> Context:
    """Read and check everything that a run starts from; whatever is wrong with it is a UserError now."""
    constitution = load_constitution(config.constitution, config.principles)
    check_principles(config, constitution)
    prompts = read_prompts(config)
    mesh = meshes.make_mesh(config.mesh)
    check_rows(config, mesh)
    check_models(config, Path(run_dir))
    for stage in config.stages:
        asked_by = asks_endpoint(config, stage)
        if asked_by and (fresh or StageFolder(run_dir, stage).done() is None):
            distributed.by_first(partial(check_endpoint, config.endpoint, asked_by))
    mixed = read_mixed(config, prompts)
    gold = read_gold(config, constitution, prompts)
    base = load_model(
        config.model.source, config.model.dtype, "policy", lambda shapes: meshes.shardings(mesh, shapes)
    )
    parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(base.params))
    check_free_space(run_dir, parameter_bytes * max(_copies_on_disk(config, stage) for stage in config.stages))
    context = Context(name, config, Path(run_dir), progress, mesh, constitution, prompts, mixed, base, gold)
    _announce_cache(context)
    if fresh:
        for stage in config.stages:
            context.folder(stage).discard()
    context.take_up_written()
    if not fresh:
        context.check_unchanged()
    return context


def _copies_on_disk(config: Config, stage: str) -> int:
    """Copies of the parameters that a stage puts on disk at worst: the states that are kept, one more, an export."""
    if stage not in STATE_COPIES or (stage == "best_of_n" and not config.best_of_n.distill):
        return 0
    if config.lora.rank:
        return 2  # the states of adapters are small
    copies = 3 if stage == "ppo" and config.ppo.value_trunk == "shared" else STATE_COPIES[stage]
    states = config.checkpoints.keep + 1 + (config.checkpoints.export != "last")
    return copies * states + 1


def _announce_cache(context: Context) -> None:
    """Say what the sampler's cache will take, or refuse it with what would fit."""
    shape = context.config.sampler
    length = min(shape.max_length, context.base.config.max_position)
    dtype = entry_dtype(context.config.model.compute_dtype, shape.int8_cache, meshes.platform_of(context.mesh))
    asked = context.base.config, shape.rows, length, 0, dtype
    check_cache_fits(*asked, context.mesh)
    context.progress.log(
        f"sampler: {shape.rows} slots of {length} tokens, key/value cache {gibibytes(cache_bytes(*asked))}"
    )


def check_rows(config: Config, mesh) -> None:
    """Raise UserError where the rows of a selected stage's batches do not split over the data axes."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    batched = ["sft", "reward_model", "dpo", *(["best_of_n"] if config.best_of_n.distill else [])]
    sections = {stage: getattr(config, stage) for stage in batched}
    sizes = {
        **{name: (f"{name}.batch_size", each.batch_size // each.microbatches) for name, each in sections.items()},
        **{name: (f"{name}.rollouts", rows_of_pass(getattr(config, name))) for name in REINFORCED},
    }
    selected = [sizes[stage] for stage in config.stages if stage in sizes]
    for name, size in [("sampler.rows", config.sampler.rows), *selected]:
        if size % ways:
            raise UserError(f"{name}: its (micro)batches of {size} rows do not split over data x fsdp = {ways} devices")
