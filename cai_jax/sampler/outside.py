"""Calls of rows that leave this program, and the driver of rows that make nothing but such calls."""

import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from cai_jax import distributed
from cai_jax.sampler.requests import Outside, Row


@dataclass
class Counts:
    """What a sampler has done so far, in tokens and, for `done`, rows."""

    done: int = 0
    generated: int = 0
    prefilled: int = 0
    reused: int = 0  # tokens of requests whose keys were there already
    steps: int = 0  # slots times decoding steps; generated / steps is the occupancy


class Calls:
    """Calls under way, each in a thread of its own, known by the place of the row that waits for it.

    Among several processes the first alone calls, and all are told the same results at the same time. The threads are
    daemons: one that nobody waits for any longer does not keep the program from its end.
    """

    def __init__(self):
        self._open: set[int] = set()
        self._ended: queue.SimpleQueue = queue.SimpleQueue()

    def __bool__(self) -> bool:
        return bool(self._open)

    def start(self, place: int, call: Callable) -> None:
        """Begin a call."""
        self._open.add(place)
        if distributed.first():
            threading.Thread(target=self._make, args=(place, call), daemon=True, name=f"outside-{place}").start()

    def ended(self, wait: bool) -> list[tuple[int, object]]:
        """(place, result) of the calls that have ended, `wait`: of one at least. Raises what a call has raised."""
        if not self._open:
            return []
        found = [tuple(pair) for pair in distributed.by_first(lambda: self._take(wait))]
        self._open -= {place for place, _ in found}
        return found

    def _make(self, place: int, call: Callable) -> None:
        try:
            self._ended.put((place, call(), None))
        except BaseException as error:
            self._ended.put((place, None, error))

    def _take(self, wait: bool) -> list:
        found = [self._ended.get()] if wait else []
        while not self._ended.empty():
            found.append(self._ended.get())
        for _, _, error in found:
            if error is not None:
                raise error
        results = [[place, result] for place, result, _ in sorted(found, key=lambda entry: entry[0])]
        return json.loads(json.dumps(results)) if distributed.several() else results


class WithoutModel:
    """Drives rows that ask for nothing but `Outside` as a `Sampler` does, without a model; `rows` of them at a time."""

    def __init__(self, rows: int):
        self.rows, self.counts = rows, Counts()
        self.on_progress: Callable[[Counts], None] = lambda counts: None

    def run(self, rows: Iterable[Row], prefix: Sequence = ()) -> list:
        """What each row program returns, in order."""
        return [result for _, result in sorted(self.stream(rows, prefix), key=lambda pair: pair[0])]

    def stream(self, rows: Iterable[Row], prefix: Sequence = (), more: Sequence = ()) -> Iterator[tuple[int, object]]:
        """(place, what it returned) of each row program, as soon as it ends. Raises TypeError at other requests."""
        waiting, calls, running = enumerate(rows), Calls(), {}

        def go_on(place, row, answer):
            try:
                request = row.send(answer)
            except StopIteration as end:
                running.pop(place, None)
                self.counts.done += 1
                yield place, end.value
                return
            if not isinstance(request, Outside):
                raise TypeError(f"row {place} asks for {type(request).__name__}, which needs a model")
            running[place] = row
            calls.start(place, request.call)

        while True:
            while len(running) < self.rows and (following := next(waiting, None)) is not None:
                yield from go_on(*following, None)
            self.on_progress(self.counts)
            if not running:
                return
            for place, answer in calls.ended(wait=True):
                yield from go_on(place, running[place], answer)
