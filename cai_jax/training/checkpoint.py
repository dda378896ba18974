"""Train states on disk, by orbax: the whole state or nothing."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from cai_jax.errors import UserError


class Checkpoints:
    """Checkpoints of one training stage in a folder; the last one is kept.

    A checkpoint holds the whole train state (parameters, optimizer, step) and the data position as JSON. A
    half-written one is never seen: orbax renames a finished folder into place.
    """

    def __init__(self, folder: Path, every: int):
        self.every = every
        self._folder = Path(folder).absolute()
        self._manager = None

    def _open(self):
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False, create=True)
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        return self._manager

    def restore(self, state):
        """The latest (state, data position), shaped and sharded like `state`; (state, {}) where there is none."""
        manager = self._open()
        latest = manager.latest_step()
        if latest is None:
            return state, {}
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            loaded = manager.restore(
                latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
            )
        except Exception as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"checkpoint {self._folder / str(latest)} can't be read ({first_line}): "
                "delete that folder, or start the stage anew with --fresh"
            ) from error
        return loaded["state"], loaded["data"]

    def due(self, done: int, total: int) -> bool:
        """Whether to save after `done` of `total` steps; the last state is exported, not saved."""
        return done % self.every == 0 and done < total

    def save(self, step: int, state, data: dict) -> None:
        """Write the state after `step` steps; returns when it is on disk."""
        manager = self._open()
        manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        )
        manager.wait_until_finished()

    def close(self) -> None:
        """Let go of the folder."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None
