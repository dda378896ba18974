"""A client of models behind OpenAI-compatible HTTP interfaces: retries, bounds of rate and spending, answers on disk.

An answer is kept by the hash of its question, so a resumed or repeated run asks nothing twice. The key is read from
the environment, stands in one header of the requests, and nowhere else.
"""

import contextlib
import importlib.util
import json
import math
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from cai_jax import distributed
from cai_jax.budget import Budget, Spent
from cai_jax.config import Endpoint, Sampling
from cai_jax.errors import UserError
from cai_jax.provenance import content_hash, write_json
from cai_jax.replies import Reply, parse_reply

EXTERNAL = "external"  # what a config names a labeler or a critic that is asked here
LONGEST_WAIT = 600.0  # seconds that a server may ask to be left alone for
LARGEST = 2**24  # bytes of an answer
REFUSALS = 5  # questions refused before any was answered, after which a run ends
SECRET = 12  # a key with fewer characters is a placeholder ("none", "EMPTY"), and may stand in a text by chance


@dataclass
class Counts:
    """What a client has done so far."""

    asked: int = 0
    cached: int = 0  # of these answered from disk
    sent: int = 0  # requests, with those that were repeated
    retries: int = 0
    failures: Counter = field(default_factory=Counter)


class Closed(Exception):
    """The client has been closed while a question waited."""


def question(
    settings: Endpoint, messages: Sequence[dict], sampling: Sampling, seed: int | None = None, logprobs: int = 0
) -> dict:
    """The body of a request. Only fields that every server knows, and those whose value is not the server's default."""
    body = {"model": settings.model, "messages": list(messages), settings.limit_field: sampling.max_new_tokens}
    if sampling.temperature != 1:
        body["temperature"] = sampling.temperature
    if sampling.top_p != 1:
        body["top_p"] = sampling.top_p
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if seed is not None:
        body["seed"] = seed % 2**31
    if logprobs:
        body |= {"logprobs": True, "top_logprobs": logprobs}
    return body


class Client:
    """Asks one model questions, from any number of threads.

    Answers lie under `settings.cache`, or in `folder`/answers; `folder`/spent.jsonl is the ledger of the budget. Use it
    as a context: at its end answers under way are waited for, as they are paid for, except after a Ctrl-C.
    """

    def __init__(self, settings: Endpoint, folder: Path):
        httpx = _httpx()
        self.settings, self.counts = settings, Counts()
        self.hash = content_hash([settings.base_url, settings.model])
        self.budget = Budget(settings, Path(folder) / "spent.jsonl")
        self._answers = Path(settings.cache).expanduser() if settings.cache else Path(folder) / "answers"
        self._key = read_key(settings) if distributed.first() else ""  # the others ask nothing
        self._http = httpx.Client(
            headers=_headers(self._key), timeout=settings.timeout, follow_redirects=False,
            limits=httpx.Limits(max_connections=settings.requests_at_once),
        )  # fmt: skip
        self._at_once = threading.BoundedSemaphore(settings.requests_at_once)
        self._stopped = threading.Event()
        self._changed = threading.Condition()  # guards what follows, and the counts
        self._asking: dict[str, threading.Lock] = {}  # by the hash of a question
        self._free_at = 0.0  # on the monotonic clock, when the next request may be sent
        self._answered = self._refused = 0

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind, *_) -> None:
        self._stopped.set()
        self.budget.close()
        if kind is None or issubclass(kind, Exception):
            with self._changed:
                self._changed.wait_for(lambda: not self._asking, self.settings.timeout)
        self._http.close()

    def ask(self, body: dict) -> Reply:
        """The reply to a question, from disk if it was asked before; equal questions asked together are asked once.

        Raises UserError where the server does not answer, refuses the key, or the budget is spent.
        """
        name = content_hash([self.settings.base_url, self.settings.model, body])
        with self._changed:
            self.counts.asked += 1
            lock = self._asking.setdefault(name, threading.Lock())
        try:
            with lock:
                path = self._answers / name[:2] / f"{name}.json"
                if (reply := _kept(path)) is not None:
                    self._count("cached")
                    return reply
                reply = self._fetch(body)
                if not reply.failure:  # what failed is asked again by the next run
                    write_json(path, {"question": body, "reply": reply})
                    return _kept(path)
        finally:
            with self._changed:
                self._asking.pop(name, None)
                self._changed.notify_all()
        with self._changed:
            self.counts.failures[reply.failure] += 1
        return reply

    def report(self) -> dict:
        """What this client has done, and what the run has spent."""
        spent = asdict(self.budget.spent) | {"cost": self.budget.spent.cost(self.settings)}
        return asdict(self.counts) | {"failures": dict(self.counts.failures), "spent_by_run": spent}

    # ---- one question

    def _fetch(self, body: dict) -> Reply:
        """Send a question until it is answered or refused."""
        payload = json.dumps(body).encode()
        # A token has a byte at least; templates add a few tokens a message.
        most = Spent(1, len(payload) + 16 * len(body["messages"]) + 64, body[self.settings.limit_field])
        problem, asked_to_wait = "", 0.0
        for attempt in range(self.settings.retries + 1):
            if attempt:
                self._count("retries")
                self._wait(max(asked_to_wait, _backoff(attempt)))
            status, headers, content = self._send(payload, most)
            if status == 200:
                with self._changed:
                    self._answered += 1
                return parse_reply(content)
            told = self._told(content)
            if status and status != 429 and status < 500:
                return self._refusal(status, headers, told)
            problem = f"HTTP {status} {told}".strip() if status else told
            asked_to_wait = self._pause(headers)
        raise UserError(f"endpoint {self.settings.base_url}: no answer after {self.settings.retries + 1} tries "
                        f"({problem}); run the same command to go on")

    def _send(self, payload: bytes, most: Spent) -> tuple[int, dict, bytes]:
        """Status, headers and body of one request; status 0 and what happened where nothing came back."""
        httpx = _httpx()
        with self._at_once:
            self._pace()
            charged, took = self.budget.charge(most), None
            self._count("sent")
            try:
                status, headers, content = self._post(payload)
                took = _took(content, most) if status == 200 else Spent(1)
                return status, headers, content
            except httpx.ConnectError as error:
                took = Spent(1)
                return 0, {}, str(error).encode()
            except httpx.TimeoutException:  # it may have been answered and be paid for
                return 0, {}, f"nothing within {self.settings.timeout:g} s".encode()
            except (httpx.RequestError, httpx.StreamError) as error:
                return 0, {}, f"{type(error).__name__}: {error}".encode()
            except RuntimeError:
                if self._stopped.is_set():  # its connection was closed under it
                    raise Closed from None
                raise
            finally:
                self.budget.correct(charged, took or most)

    def _post(self, payload: bytes) -> tuple[int, dict, bytes]:
        """The timeout bounds the whole answer, not each piece of it."""
        until, content = time.monotonic() + self.settings.timeout, bytearray()
        url, kind = f"{self.settings.base_url.rstrip('/')}/chat/completions", {"Content-Type": "application/json"}
        with self._http.stream("POST", url, content=payload, headers=kind) as response:
            for piece in response.iter_bytes():
                content += piece
                if time.monotonic() > until:
                    raise _httpx().ReadTimeout("the answer took too long")
                if len(content) > LARGEST:
                    break
            return response.status_code, dict(response.headers), self._without_key(bytes(content[:LARGEST]))

    def _refusal(self, status: int, headers: dict, told: str) -> Reply:
        """A question that is refused for itself is a failure; the run ends where no question can be answered."""
        where = f"endpoint {self.settings.base_url}"
        if status in (401, 403):
            raise UserError(f"{where}: HTTP {status}, the key is not accepted; {_key_hint(self.settings)} ({told})")
        if 300 <= status < 400:
            target = self._told(headers.get("location", "").encode())
            raise UserError(f"{where}: sends elsewhere (HTTP {status}, {target}); set endpoint.base_url to where it is")
        if status == 404:
            raise UserError(f"{where}: HTTP 404 ({told}); see that endpoint.base_url ends before /chat/completions and "
                            f"that the model {self.settings.model} is there")
        with self._changed:
            self._refused += 1
            hopeless = self._refused >= REFUSALS and not self._answered
        if hopeless:
            raise UserError(f"{where}: refuses every question (HTTP {status}, {told}); see the fields of endpoint")
        return Reply(failure=f"http_{status}")

    # ---- time

    def _wait(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Closed

    def _pace(self) -> None:
        """Wait for this request's turn: at most `requests_per_minute`, none while the server wants to be left alone."""
        if self._stopped.is_set():
            raise Closed
        with self._changed:
            mine = max(time.monotonic(), self._free_at)
            self._free_at = mine
            if rate := self.settings.requests_per_minute:
                self._free_at += 60 / rate
        if (seconds := mine - time.monotonic()) > 0:
            self._wait(seconds)

    def _pause(self, headers: dict) -> float:
        """The seconds for which a server asks to be left alone, by all threads."""
        seconds = retry_after(headers.get("retry-after", ""))
        if seconds > LONGEST_WAIT:
            raise UserError(f"endpoint {self.settings.base_url}: asks to wait for {seconds:.0f} s; run the same "
                            "command later to go on")
        with self._changed:
            self._free_at = max(self._free_at, time.monotonic() + seconds)
        return seconds

    # ---- texts of the server

    def _told(self, content: bytes) -> str:
        """What a server says of an error: one short line without keys."""
        text = content[:LARGEST].decode("utf-8", "replace")
        with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
            text = str(json.loads(text)["error"]["message"])
        if self._key:
            text = text.replace(self._key, "[key]")
        text = re.sub(r"(?i)bearer\s+\S+", "Bearer [key]", text)
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= 200 else text[:197] + "..."

    def _without_key(self, content: bytes) -> bytes:
        """A proxy may repeat the header; then the key would stand in artifacts."""
        return content.replace(self._key.encode(), b"[key]") if len(self._key) >= SECRET else content

    def _count(self, name: str) -> None:
        with self._changed:
            setattr(self.counts, name, getattr(self.counts, name) + 1)


def summary_of(settings: Endpoint, read: Sequence[int], written: Sequence[int], failures: Sequence[str]) -> dict:
    """What the answers that stand in a stage's rows took, for its summary: the same however often the run was killed.

    `read` and `written` are their tokens; `failures` name what came to nothing, "" is none. What was sent, repeated and
    found on disk depends on how the run went: `Client.report` is for timing.json.
    """
    spent = Spent(0, sum(read), sum(written))
    named = Counter(failure for failure in failures if failure)
    return {
        "model": settings.model, "base_url": settings.base_url, "answers": len(read), "tokens_read": spent.read,
        "tokens_written": spent.written, "cost": spent.cost(settings), "failures": dict(sorted(named.items())),
    }  # fmt: skip


# ---------------------------------------------------------------- answers and waits


def _took(content: bytes, most: Spent) -> Spent:
    """What an answer took; where the server does not say, the most that it can have taken."""
    reply = parse_reply(content)
    read, written = (most.read if reply.read is None else reply.read), reply.written
    return Spent(1, read, most.written if written is None else written)


def _kept(path: Path) -> Reply | None:
    """The reply in a file of answers; None where there is none that can be read."""
    try:
        return Reply(**json.loads(path.read_text(encoding="utf-8"))["reply"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, a number or a date; 0 where it says nothing one can read."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _backoff(attempt: int) -> float:
    """Seconds before a further try: doubling from one half to at most a minute, a random half of it taken off."""
    return min(60.0, 0.5 * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


# ---------------------------------------------------------------- the door


def read_key(settings: Endpoint) -> str:
    """The key, from the environment; "" where the config names no variable."""
    if not settings.key_env:
        return ""
    key = os.environ.get(settings.key_env, "").strip()
    if not key:
        raise UserError(f"endpoint.key_env={settings.key_env}: this environment variable is not set; export it, or "
                        "set endpoint.key_env= for an endpoint without keys")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"endpoint.key_env={settings.key_env}: what it holds is no key (spaces, line breaks or letters "
                        "beyond ASCII); export it again")
    return key


def check_endpoint(settings: Endpoint, asked_by: str) -> None:
    """Raise UserError where the endpoint that the config field `asked_by` needs cannot be asked; sends no question."""
    for name in ("base_url", "model"):
        if not getattr(settings, name):
            raise UserError(f"{asked_by} is {EXTERNAL} and needs endpoint.{name}: set it")
    httpx, key = _httpx(), read_key(settings)
    url, patience = settings.base_url.rstrip("/"), min(10.0, settings.timeout)
    try:
        with httpx.stream("GET", f"{url}/models", headers=_headers(key), timeout=patience) as response:
            status = response.status_code
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        why = " ".join(str(error).split())[:200] or "no connection in time"
        raise UserError(f"endpoint.base_url={url}: cannot be reached ({why}); start it or mend the address") from None
    except httpx.HTTPError:
        return  # it is there, and may have no such page
    if status in (401, 403):
        raise UserError(f"endpoint.base_url={url}: HTTP {status}, the key is not accepted; {_key_hint(settings)}")


def _key_hint(settings: Endpoint) -> str:
    if settings.key_env:
        return f"see what {settings.key_env} holds"
    return "set endpoint.key_env to the environment variable that holds it"


def _headers(key: str) -> dict:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _httpx():
    """The HTTP library, which only runs with an endpoint need."""
    if importlib.util.find_spec("httpx2") is None:
        raise UserError("an endpoint needs the package httpx2: pip install 'cai-jax[external]'")
    import httpx2

    return httpx2
