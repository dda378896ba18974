"""What a run may spend at an endpoint: charged before a request is sent, corrected when its answer is there."""

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from cai_jax.config import Endpoint
from cai_jax.errors import UserError


@dataclass(frozen=True)
class Spent:
    """Requests sent, and tokens of questions (read) and of answers (written)."""

    requests: int = 0
    read: int = 0
    written: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.requests + other.requests, self.read + other.read, self.written + other.written)

    def cost(self, settings: Endpoint) -> float:
        """Its price, in the currency of the config's prices."""
        return (self.read * settings.price_read + self.written * settings.price_written) / 1e6


class Budget:
    """The bounds `max_requests`, `max_tokens_total` and `max_cost` of a run, over all of its commands.

    `ledger` is a file of lines that add up to what has been spent. A request is charged at the most it can take; the
    line that corrects this to what it took follows its answer. So a killed run has counted too much, never too little.
    """

    def __init__(self, settings: Endpoint, ledger: Path):
        self._settings, self._ledger = settings, ledger
        self._changed = threading.Condition()
        self._in_flight, self._closed = 0, False
        self.spent = _read(ledger)

    def charge(self, most: Spent) -> Spent:
        """Charge a request; waits where answers under way may make room. Raises UserError where there is none."""
        with self._changed:
            while (over := self._over(self.spent + most)) and self._in_flight and not self._closed:
                self._changed.wait()
            if over:
                raise UserError(over)
            self._add(most)
            self._in_flight += 1
            return most

    def correct(self, charged: Spent, took: Spent) -> None:
        """A request has ended: what it took stands in the place of what it was charged."""
        with self._changed:
            self._in_flight -= 1
            if took != charged:
                self._add(Spent(*(a - b for a, b in zip(_numbers(took), _numbers(charged), strict=True))))
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _over(self, spent: Spent) -> str:
        """Which bound would be passed; "": none."""
        settings = self._settings
        bounds = {
            "max_requests": (settings.max_requests, spent.requests),
            "max_tokens_total": (settings.max_tokens_total, spent.read + spent.written),
            "max_cost": (settings.max_cost, spent.cost(settings)),
        }
        for name, (bound, value) in bounds.items():
            if bound and value > bound:
                return (f"endpoint.{name}={bound:g}: the next request could pass it ({self._so_far()}); answers are "
                        "kept: raise it and run the same command to go on")
        return ""

    def _so_far(self) -> str:
        spent = self.spent
        price = f", a cost of {spent.cost(self._settings):.4g}" if self._settings.max_cost else ""
        return f"spent: {spent.requests} requests, {spent.read + spent.written} tokens{price}"

    def _add(self, spent: Spent) -> None:
        self.spent += spent
        self._ledger.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(dict(zip(("requests", "read", "written"), _numbers(spent), strict=True))) + "\n"
        file = os.open(self._ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())  # in one piece: a kill leaves a line or none
        finally:
            os.close(file)


def _numbers(spent: Spent) -> tuple[int, int, int]:
    return spent.requests, spent.read, spent.written


def _read(ledger: Path) -> Spent:
    total = Spent()
    if ledger.exists():
        for number, line in enumerate(ledger.read_text(encoding="utf-8").splitlines(), 1):
            try:
                total += Spent(**json.loads(line))
            except (ValueError, TypeError):
                raise UserError(f"{ledger}:{number}: not a line of spending; mend it or remove the file") from None
    return total
