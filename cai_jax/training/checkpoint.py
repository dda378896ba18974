"""Train states on disk, by orbax: the whole state or nothing."""

from dataclasses import dataclass, field
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from cai_jax import distributed
from cai_jax.errors import UserError


@dataclass
class Kept(checkpoint_managers.PreservationPolicy):
    """Which checkpoints stay: the last so many, and (if asked for) the one of the highest quality."""

    last: int
    best: bool
    qualities: dict[int, float] = field(default_factory=dict)  # by step; a checkpoint for a signal has none

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """For every checkpoint, in the order of their steps, whether it stays."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.last :], self.best_step() if self.best else None}
        return [step in kept for step in steps]

    def best_step(self) -> int | None:
        """The step of the highest quality, the last one of equal ones; None where there is no quality."""
        return max(self.qualities, key=lambda step: (self.qualities[step], step), default=None)


class Checkpoints:
    """Checkpoints of one training stage in a folder.

    A checkpoint holds the whole train state (parameters, optimizer, step) and, as JSON, the data position and the
    quality. A half-written one is never seen: orbax renames a finished folder into place, and removes an older
    checkpoint only after that. All processes must call; each writes what its devices hold.

    On accelerators `save` returns once the state is copied to the host, and the rest is written while training goes
    on. On a CPU there is nothing to win by that: a device array is host memory, so the next step would have to leave
    it alone and hold a second state, and the writer would take its time from the step's own cores. There `save`
    returns when all is on disk.
    """

    def __init__(self, folder: Path, every: int, keep: int = 1, best: bool = False, asynchronous: bool | None = None):
        self.every = every
        self._asynchronous = asynchronous  # None: where that is safe
        self._folder = Path(folder).absolute()
        self._kept = Kept(keep, best)
        self._manager = None

    def _open(self):
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                enable_async_checkpointing=self._is_asynchronous(),
                cleanup_tmp_directories=True,
            )
            self._manager = ocp.CheckpointManager(self._folder, options=options)
            self._kept.qualities.clear()
            for step in self._manager.all_steps():
                quality = self._load(step, data=ocp.args.JsonRestore())["data"].get("quality")
                if quality is not None:
                    self._kept.qualities[step] = quality
        return self._manager

    def _is_asynchronous(self) -> bool:
        return jax.default_backend() != "cpu" if self._asynchronous is None else self._asynchronous

    def restore(self, state, step: int | None = None):
        """The (state, data position) of a step, without one of the last; (state, {}) where there is no checkpoint.

        The state comes shaped and sharded like `state`, on whatever mesh it was saved. Where there is a checkpoint,
        `state` is given up, as by a step: its arrays are deleted first, so that two states never are in memory.
        """
        manager = self._open()
        step = manager.latest_step() if step is None else step
        if step is None:
            return state, {}
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        jax.tree.map(lambda leaf: leaf.delete(), state)
        loaded = self._load(step, state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        return loaded["state"], loaded["data"]

    def _load(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            distributed.await_verdict()  # the fault may be a lost process's
            raise UserError(
                f"checkpoint {self._folder / str(step)} can't be read ({_first_line(error)}): delete that folder to go "
                "on from an earlier one, if there is any, or start the stage anew with --fresh"
            ) from error

    def due(self, done: int, total: int) -> bool:
        """Whether to save after `done` of `total` steps; the last state is exported, not saved."""
        return done % self.every == 0 and done < total

    def save(self, step: int, state, data: dict, quality: float | None = None) -> None:
        """Write the state after `step` steps. `quality`: higher is better; None: no candidate for the best."""
        manager = self._open()
        if quality is not None:
            self._kept.qualities[step] = quality
        data = data if quality is None else data | {"quality": quality}
        try:
            manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
            )
        except Exception as error:
            distributed.await_verdict()
            raise self._not_written(error) from error

    def best(self) -> tuple[int, float] | None:
        """Step and quality of the best checkpoint, if one has a quality."""
        self._open()
        step = self._kept.best_step()
        return None if step is None else (step, self._kept.qualities[step])

    def close(self) -> None:
        """Wait until all is on disk and let go of the folder."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            try:
                manager.wait_until_finished()
            except Exception as error:
                distributed.await_verdict()
                raise self._not_written(error) from error
            finally:
                manager.close()

    def _not_written(self, error: Exception) -> UserError:
        return UserError(
            f"{self._folder}: the checkpoint cannot be written ({_first_line(error)}): make room or choose another "
            "--run_dir; the same command goes on from the checkpoint before"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
