"""Runs endpoint_server.py, and reads what was asked of it."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cai_jax.config import Endpoint

KEY = "sk-test-3f9a1c77d2e84b06"
KEY_ENV = "CAI_JAX_TEST_KEY"


@dataclass
class Server:
    """A server under way."""

    url: str
    log: Path

    def requests(self) -> list[dict]:
        """What was asked so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def settings(self, model: str, **fields) -> Endpoint:
        """The endpoint section that asks one of its models."""
        return Endpoint(**{"base_url": self.url, "model": model, "key_env": KEY_ENV, "timeout": 10.0} | fields)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """The server as a process of its own, for as long as the block runs."""
    script, log = Path(__file__).parent / "endpoint_server.py", folder / "requests.jsonl"
    process = subprocess.Popen([sys.executable, str(script), str(log), KEY], stdout=subprocess.PIPE, text=True)
    try:
        yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}/v1", log)
    finally:
        process.kill()
        process.communicate()
