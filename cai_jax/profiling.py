"""Traces for xprof: a few steps of every training stage, a few passes of the sampler in every stage that samples."""

import re
from pathlib import Path

# Steps to let pass (they compile), and steps to trace. An update of PPO holds a whole rollout: one is enough.
_WINDOWS = {"steps": (1, 3), "updates": (1, 1)}
_SAMPLER_PASSES = 10, 10


class Profiler:
    """Writes one trace for every piece of work that `Progress` shows, to `folder`/NAME/plugins/profile/.

    `Progress` calls `advanced` after every step or pass of a task, and `ended` when it is over.
    """

    def __init__(self, folder: Path):
        self._folder = Path(folder)
        self._advances: dict[str, int] = {}
        self._tracing = ""  # the task under trace
        self._written: list[Path] = []

    def advanced(self, task) -> None:
        """Start or end the trace of a task, where it is time to."""
        count = self._advances[task.name] = self._advances.get(task.name, 0) + 1
        skipped, traced = _WINDOWS.get(task.unit, _SAMPLER_PASSES)
        if count == skipped and task.done < task.total:
            self._start(task.name)
        elif count == skipped + traced:
            self._stop(task.name)

    def ended(self, task) -> None:
        """End a trace that is still running."""
        self._stop(task.name)

    def summary(self) -> str:
        """A line that says where the traces are."""
        if not self._written:
            return "profile: nothing was traced: the stages were done before, or too short"
        names = ", ".join(folder.name for folder in self._written)
        return f"profile: traces of {names} under {self._folder}; see them with: xprof {self._written[0]}"

    def _start(self, name: str) -> None:
        import jax

        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call would outnumber everything else
        jax.profiler.start_trace(self._folder / re.sub(r"\W+", "_", name), profiler_options=options)
        self._tracing = name

    def _stop(self, name: str) -> None:
        if self._tracing != name:
            return
        import jax

        jax.profiler.stop_trace()
        self._tracing = ""
        self._written.append(self._folder / re.sub(r"\W+", "_", name))
