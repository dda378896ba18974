"""What a person sees while a run works: a live line on a terminal, now and then a plain line elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

from cai_jax.provenance import explain_os_errors

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Lines for a person, on stderr and (with a run folder) in its log.txt.

    On a terminal the task under way is one live line; elsewhere, and in log.txt, it is a plain line at its
    start, at its end, and at most every ten seconds between.
    """

    def __init__(self, run_dir: str | Path | None = None, stream: TextIO | None = None,
                 clock: Callable[[], float] = time.monotonic, profiler=None):
        self._stream = stream or sys.stderr
        self._log_path = Path(run_dir) / "log.txt" if run_dir is not None else None
        self._clock = clock
        self._profiler = profiler  # a profiling.Profiler, told of every step
        self._console = _console(self._stream) if self._stream.isatty() else None

    def log(self, line: str) -> None:
        """One line to the person and to log.txt."""
        self._to_file(line)
        if self._console:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str = "rows", done: int = 0) -> Iterator["Task"]:
        """A piece of work of `total` units, `done` of which an earlier command has left. One at a time."""
        task = Task(name, total, unit, done, self._clock, self._report, self._profiler)
        with self._live_line(task):
            self._report(task)
            try:
                yield task
            finally:
                if self._profiler:
                    self._profiler.ended(task)
            self._report(task)
        if self._console:
            self._console.print(str(task), markup=False, highlight=False, soft_wrap=True)

    def _report(self, task: "Task") -> None:
        if self._console:
            self._to_file(str(task))
        else:
            self.log(str(task))

    def _live_line(self, task: "Task"):
        if not self._console:
            return contextlib.nullcontext()
        from rich.live import Live
        from rich.text import Text

        return Live(console=self._console, get_renderable=lambda: Text(str(task), no_wrap=True,
                    overflow="ellipsis"), refresh_per_second=4, transient=True)

    def _to_file(self, line: str) -> None:
        if self._log_path is None:
            return
        with explain_os_errors(self._log_path), open(self._log_path, "ab") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n".encode(errors="replace"))


class Task:
    """Counts of one piece of work; its text is the line that people see."""

    def __init__(self, name: str, total: int, unit: str, done: int, clock: Callable[[], float],
                 report: Callable[["Task"], None], profiler=None):
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.tokens = 0
        self._done_before, self._clock, self._report_to, self._note = done, clock, report, ""
        self._profiler = profiler
        self._started = self._last_report = clock()

    def advance(self, count: int = 1, tokens: int = 0, note: str = "") -> None:
        """`count` more units are done, with so many tokens; `note` (a loss, say) stands until the next."""
        self.done += count
        self.tokens += tokens
        self._note = note or self._note
        if self._profiler:
            self._profiler.advanced(self)
        if self.done < self.total and self._clock() - self._last_report >= _SECONDS_BETWEEN_LINES:
            self._last_report = self._clock()
            self._report_to(self)

    def seconds_left(self) -> float | None:
        """At the rate of this command so far; None while there is none."""
        now_done = self.done - self._done_before
        if not now_done:
            return None
        return max(0, self.total - self.done) * (self._clock() - self._started) / now_done

    def __str__(self) -> str:
        seconds = self._clock() - self._started
        parts = [f"{self.name}: {self.done}/{self.total} {self.unit}"]
        if self.tokens and seconds > 0:
            parts.append(f"{self.tokens / seconds:.0f} tokens/s")
        if self._note:
            parts.append(self._note)
        if self.done >= self.total and self.done > self._done_before:
            parts.append(f"{duration(seconds)} in all")
        elif (left := self.seconds_left()) is not None:
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """42s, 3m05s, 2h07m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def _console(stream: TextIO):
    from rich.console import Console

    return Console(file=stream)
