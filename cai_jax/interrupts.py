"""Signals that ask a run to end: Ctrl-C, and SIGTERM, by which machines that are taken away say so."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Stopped(KeyboardInterrupt):
    """A signal has asked for the end.

    `saved` says at which point a training stage has saved its state, in all processes; "": nothing was waited for.
    """

    def __init__(self, number: int, saved: str = ""):
        super().__init__(number, saved)
        self.number, self.saved = number, saved

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as shells have it: 130 or 143."""
        return 128 + self.number

    def __str__(self) -> str:
        what = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[signal.Signals(self.number)]
        return f"{what} and saved at {self.saved}" if self.saved else what


@contextlib.contextmanager
def obeyed() -> Iterator[None]:
    """While the block runs, SIGTERM raises `Stopped` where the main thread is, as SIGINT raises KeyboardInterrupt."""

    def stop(number, _):
        raise Stopped(number)

    with _handled(stop, signal.SIGTERM):
        yield


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], int]]:
    """While the block runs, the first signal is only noted; yields a function that tells its number, 0: none yet.

    A second one is obeyed at once: whoever asks twice does not want to wait.
    """
    asked = []

    def note(number, _):
        asked.append(number)
        if len(asked) > 1:
            raise Stopped(number)

    with _handled(note, signal.SIGINT, signal.SIGTERM):
        yield lambda: asked[0] if asked else 0


@contextlib.contextmanager
def _handled(handler, *numbers: int) -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():  # only that one is told of signals
        kept = (signal.SIG_IGN, None)  # whoever started the process has said so, or C code handles it
        before = {number: signal.getsignal(number) for number in numbers}
        before = {number: earlier for number, earlier in before.items() if earlier not in kept}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
