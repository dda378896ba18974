"""The client of HTTP endpoints against a real server process that misbehaves on request."""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from endpoints import KEY, KEY_ENV, serving

from cai_jax import endpoint
from cai_jax.budget import Spent
from cai_jax.config import Config, CritiqueRevision, Endpoint, Model, Sampling
from cai_jax.config_rules import validate
from cai_jax.endpoint import Client, check_endpoint, question, retry_after
from cai_jax.errors import UserError
from cai_jax.replies import parse_reply

FEW = Sampling(max_new_tokens=20)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "server").mkdir()
    with serving(tmp_path / "server") as server:
        yield server


@pytest.fixture
def quick(monkeypatch):
    """Backoff without its waits; what a server asks for is waited for."""
    monkeypatch.setattr(endpoint, "_backoff", lambda attempt: 0.01)


def body(settings: Endpoint, text: str = "Hello", **fields) -> dict:
    return question(settings, [{"role": "user", "content": text}], FEW, **fields)


def asked(server, tmp_path, model: str, **fields):
    """(reply, client) of one question to one of the server's models."""
    settings = server.settings(model, **fields)
    with Client(settings, tmp_path / "run") as client:
        return client.ask(body(settings)), client


def no_key_in(folder) -> None:
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


# ---------------------------------------------------------------- answers


def test_an_answer_is_kept_and_asked_for_once(server, tmp_path):
    reply, client = asked(server, tmp_path, "ok")
    assert reply.text == "A remark on 5 characters." and not reply.failure and not reply.truncated
    assert (reply.model, reply.read, reply.written) == ("served-1", 100, 10)
    assert client.report() | {"spent_by_run": 0} == {
        "asked": 1, "cached": 0, "sent": 1, "retries": 0, "failures": {}, "spent_by_run": 0}
    again, client = asked(server, tmp_path, "ok")
    assert again == reply and client.counts.cached == 1 and client.counts.sent == 0
    assert len(server.requests()) == 1 and server.requests()[0]["authorized"]
    no_key_in(tmp_path / "run")


def test_model_address_and_every_field_tell_questions_apart(server, tmp_path):
    settings = server.settings("ok")
    with Client(settings, tmp_path / "run") as client:
        for other in (body(settings), body(settings, seed=1), body(settings, seed=2), body(settings, "Other")):
            client.ask(other)
    other = server.settings("ok", base_url=server.url + "/")
    with Client(other, tmp_path / "run") as client:
        client.ask(body(other))
    assert len(server.requests()) == 5


def test_equal_questions_at_the_same_time_are_one_request(server, tmp_path):
    settings = server.settings("slow")
    with Client(settings, tmp_path / "run") as client, ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: client.ask(body(settings)), range(8)))
    assert len(set(reply.text for reply in replies)) == 1 and len(server.requests()) == 1


def test_a_shared_cache_serves_another_run_and_a_torn_file_is_asked_again(server, tmp_path):
    cache = tmp_path / "shared"
    asked(server, tmp_path / "a", "ok", cache=str(cache))
    _, client = asked(server, tmp_path / "b", "ok", cache=str(cache))
    assert client.counts.cached == 1
    [kept] = cache.rglob("*.json")
    kept.write_bytes(kept.read_bytes()[:50])
    reply, client = asked(server, tmp_path / "b", "ok", cache=str(cache))
    assert reply.text and client.counts.cached == 0 and len(server.requests()) == 2
    assert not list(cache.rglob("*.tmp"))


def test_a_body_says_what_is_asked_and_leaves_defaults_out():
    settings = Endpoint(model="m", limit_field="max_completion_tokens")
    turn = [{"role": "user", "content": "x"}]
    assert question(settings, turn, FEW) == {"model": "m", "messages": turn, "max_completion_tokens": 20}
    sampling = Sampling(temperature=0.0, top_p=0.9, stop=("\n",), max_new_tokens=3)
    assert question(Endpoint(model="m"), turn, sampling, seed=2**63, logprobs=4) == {
        "model": "m", "messages": turn, "max_tokens": 3, "temperature": 0.0, "top_p": 0.9, "stop": ["\n"], "seed": 0,
        "logprobs": True, "top_logprobs": 4,
    }  # fmt: skip


@pytest.mark.parametrize("model, failure", [
    ("malformed", "malformed"), ("list", "malformed"), ("no-choices", "no_choices"), ("no-text", "no_text"),
    ("filtered", "filtered"), ("400", "http_400"),
])  # fmt: skip
def test_what_is_no_answer_is_a_named_failure_and_is_not_kept(server, tmp_path, quick, model, failure):
    reply, client = asked(server, tmp_path, model)
    assert reply.failure == failure and reply.text == ""
    assert client.counts.failures == {failure: 1} and client.counts.retries == 0
    asked(server, tmp_path, model)
    assert len(server.requests()) == 2  # asked anew, once each time


def test_a_cut_answer_says_so(server, tmp_path):
    reply, _ = asked(server, tmp_path, "long")
    assert reply.truncated and reply.text == "cut at the lim"


@pytest.mark.parametrize("content", [
    b"", b"null", b"[" * 100_000, b'{"choices": {}}', b'{"choices": [null]}', b'{"choices": [{"message": []}]}',
    b'{"choices": [{"message": {"content": 5}}]}', b'\xff\xfe{"choices"', b'{"choices": [{}]}',
])  # fmt: skip
def test_no_body_breaks_the_reader(content):
    assert parse_reply(content).failure in ("malformed", "no_choices", "no_text")


def test_strange_numbers_are_left_out():
    place = {"token": "A", "logprob": float("nan"), "top_logprobs": [
        {"token": "A", "logprob": "x"}, {"token": "B", "logprob": -2}, {"token": 3, "logprob": -1}, None,
        {"token": "C", "logprob": float("-inf")}, {"token": "D", "logprob": 10**400}, {"token": "E", "logprob": True},
    ]}  # fmt: skip
    choice = {"message": {"content": "A"}, "logprobs": {"content": [place]}}
    content = {"choices": [choice], "usage": {"prompt_tokens": -1, "completion_tokens": True}, "model": 7}
    reply = parse_reply(json.dumps(content).encode())
    assert reply.logprobs == [["A", [["B", -2.0]]]]
    assert (reply.read, reply.written, reply.model) == (None, None, "")
    assert parse_reply(b'{"choices": [{"message": {"content": "A"}, "logprobs": {"content": [5]}}]}').logprobs == []


# ---------------------------------------------------------------- trouble


def test_a_server_that_wants_to_be_left_alone_is(server, tmp_path, quick):
    reply, client = asked(server, tmp_path, "429-once")
    first, second = (line["at"] for line in server.requests())
    assert reply.text and client.counts.retries == 1 and second - first >= 1.0


def test_a_wait_of_hours_ends_the_run(server, tmp_path, quick):
    with pytest.raises(UserError, match="asks to wait for 7200 s"):
        asked(server, tmp_path, "429-for-hours")
    assert len(server.requests()) == 1


@pytest.mark.parametrize("model", ["500-once", "hang-once", "drip-once", "cut-once"])
def test_what_may_pass_is_tried_again(server, tmp_path, quick, model):
    began = time.monotonic()
    reply, client = asked(server, tmp_path, model, timeout=0.5)
    assert reply.text.startswith("A remark") and client.counts.retries == 1 and len(server.requests()) == 2
    assert time.monotonic() - began < 2.5


def test_trouble_that_lasts_ends_the_run_in_one_line(server, tmp_path, quick):
    with pytest.raises(UserError, match="no answer after 3 tries .HTTP 500 <html>oops</html>.; run the same") as error:
        asked(server, tmp_path, "500", retries=2)
    assert "\n" not in str(error.value) and len(server.requests()) == 3


def test_waits_between_tries_double_with_jitter():
    waits = [[endpoint._backoff(attempt) for _ in range(200)] for attempt in (1, 2, 3, 20)]
    for longest, drawn in zip((0.5, 1.0, 2.0, 60.0), waits, strict=True):
        assert longest / 2 <= min(drawn) < 0.6 * longest and 0.9 * longest < max(drawn) <= longest


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("3") == 3.0 and retry_after("0.5") == 0.5 and retry_after("-4") == 0.0
    assert 50 < retry_after(format_datetime(datetime.now(UTC) + timedelta(minutes=1), usegmt=True)) <= 60
    assert retry_after("") == retry_after("soon") == retry_after("nan") == retry_after("Wed, 99 Foo") == 0.0


def test_a_server_that_refuses_everything_ends_the_run(server, tmp_path):
    settings = server.settings("400")
    with Client(settings, tmp_path / "run") as client:
        replies = [client.ask(body(settings, str(i))) for i in range(endpoint.REFUSALS - 1)]
        assert {reply.failure for reply in replies} == {"http_400"}
        with pytest.raises(UserError, match="refuses every question .HTTP 400, context too long"):
            client.ask(body(settings, "last"))


# ---------------------------------------------------------------- the key


@pytest.mark.parametrize("wrong", ["sk-wrong-0123456789abcdef", "wrong-7"])
def test_a_wrong_key_is_not_repeated(server, tmp_path, monkeypatch, wrong):
    monkeypatch.setenv(KEY_ENV, wrong)
    with pytest.raises(UserError, match=f"HTTP 401, the key is not accepted; see what {KEY_ENV} holds") as error:
        asked(server, tmp_path, "ok")
    assert wrong not in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert len(server.requests()) == 1
    with pytest.raises(UserError, match="not accepted"):
        check_endpoint(server.settings("ok"), "critique_revision.critic")
    with pytest.raises(UserError, match="not accepted; set endpoint.key_env"):
        check_endpoint(server.settings("ok", key_env=""), "critique_revision.critic")


def test_a_redirect_is_not_followed(server, tmp_path):
    with pytest.raises(UserError, match="sends elsewhere .HTTP 307, http://127.0.0.1"):
        asked(server, tmp_path, "redirect")
    assert len(server.requests()) == 1


def test_a_key_that_a_proxy_repeats_is_taken_out(server, tmp_path):
    reply, _ = asked(server, tmp_path, "echo")
    assert reply.text == "you sent Bearer [key]"
    no_key_in(tmp_path / "run")


def test_a_placeholder_for_a_key_changes_no_text(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_ENV, "none")
    client = Client(Endpoint("http://127.0.0.1:1/v1", "m", KEY_ENV), tmp_path)
    assert client._without_key(b"none of it") == b"none of it"


@pytest.mark.parametrize("value", ["", "  ", "two words", "a\nb", "schl\u00fcssel"])
def test_no_key_or_one_that_cannot_be_is_refused_without_showing_it(value, monkeypatch):
    monkeypatch.setenv(KEY_ENV, value)
    with pytest.raises(UserError, match=f"endpoint.key_env={KEY_ENV}") as error:
        check_endpoint(Endpoint("http://127.0.0.1:1/v1", "m", KEY_ENV), "critique_revision.critic")
    assert not value.strip() or value not in str(error.value)


# ---------------------------------------------------------------- the door


def test_what_is_missing_is_said(server, monkeypatch):
    good = server.settings("ok")
    check_endpoint(good, "critique_revision.critic")  # GET /models is a 404 there
    for name in ("base_url", "model"):
        settings = replace(good, **{name: ""})
        with pytest.raises(UserError, match=f"critique_revision.critic is external and needs endpoint.{name}"):
            check_endpoint(settings, "critique_revision.critic")
    for url in ("http://127.0.0.1:1/v1", "http://no-such-host.invalid/v1"):
        with pytest.raises(UserError, match=f"endpoint.base_url={url}: cannot be reached") as error:
            check_endpoint(server.settings("ok", base_url=url), "critique_revision.critic")
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    monkeypatch.setattr(endpoint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cai-jax\[external\]'"):
        check_endpoint(good, "critique_revision.critic")


def test_a_config_never_holds_a_key_or_repeats_one():
    def config(**fields):
        return Config(Model("random:llama"), "x", endpoint=Endpoint(**fields))

    validate(config(base_url="https://host:8000/v1", key_env="OPENAI_API_KEY"))
    for secret in ("sk-abcDEF123", "abcdef0123456789", "$OPENAI_API_KEY"):
        with pytest.raises(UserError, match="never the key itself") as error:
            validate(config(key_env=secret))
        assert secret not in str(error.value)
    for url in ("http://me:hunter2@host/v1", "https://host/v1?key=hunter2", "host/v1", "ftp://host", "http://h:99999"):
        with pytest.raises(UserError, match="endpoint.base_url must be like") as error:
            validate(config(base_url=url))
        assert "hunter2" not in str(error.value)
    for fields, told in (({"max_cost": 1.0}, "needs endpoint.price_read"), ({"limit_field": "n"}, "limit_field"),
                         ({"timeout": 0.0}, "timeout"), ({"logprobs": 21}, "from 0 to 20")):
        with pytest.raises(UserError, match=told):
            validate(config(**fields))
    settings = CritiqueRevision(critic="external", critique=Sampling(top_k=3))
    with pytest.raises(UserError, match="critique_revision.critique.top_k must be 0 .off."):
        validate(Config(Model("random:llama"), "x", critique_revision=settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (CritiqueRevision(critic="external", critiques=False), "critiques=false asks for no critiques"),
        (CritiqueRevision(reviser="external", draws=2), "one revision is paid for"),
    ],
)
def test_what_an_endpoint_would_not_be_asked_is_not_set(settings, told):
    with pytest.raises(UserError, match=told):
        validate(Config(Model("random:llama"), "x", critique_revision=settings))


# ---------------------------------------------------------------- rate and spending


def test_no_more_requests_a_minute_than_allowed(server, tmp_path):
    settings = server.settings("ok", requests_per_minute=240.0)
    with Client(settings, tmp_path / "run") as client, ThreadPoolExecutor(5) as threads:
        list(threads.map(lambda i: client.ask(body(settings, str(i))), range(5)))
    times = sorted(line["at"] for line in server.requests())
    assert times[-1] - times[0] >= 4 * 0.25 - 0.1


def test_no_more_requests_at_once_than_allowed(server, tmp_path):
    settings, lock, most, now = server.settings("slow", requests_at_once=2), threading.Lock(), [0], [0]
    with Client(settings, tmp_path / "run") as client:
        post = client._post

        def counted(payload):
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            try:
                return post(payload)
            finally:
                with lock:
                    now[0] -= 1

        client._post = counted
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(lambda i: client.ask(body(settings, str(i))), range(6)))
    assert most[0] == 2


@pytest.mark.parametrize("bound, fits", [
    ({"max_requests": 3}, 3), ({"max_tokens_total": 700}, 5),
    ({"max_cost": 0.5, "price_read": 1000.0, "price_written": 10000.0}, 1),
])  # fmt: skip
def test_a_budget_ends_the_run_before_it_is_passed(server, tmp_path, bound, fits):
    settings = server.settings("ok", **bound)
    with Client(settings, tmp_path / "run") as client:
        first = [client.ask(body(settings, str(i))) for i in range(fits)]
        with pytest.raises(UserError, match=f"endpoint.{next(iter(bound))}=.*could pass it .spent: {fits} requests"):
            client.ask(body(settings, "one more"))
        assert client.budget.spent == Spent(fits, 100 * fits, 10 * fits)
    assert len(server.requests()) == fits
    with Client(settings, tmp_path / "run") as client:  # the bound is the run's: a further command has no more of it
        assert [client.ask(body(settings, str(i))) for i in range(fits)] == first  # what is on disk is free
        with pytest.raises(UserError, match="could pass it"):
            client.ask(body(settings, "one more"))
    assert len(server.requests()) == fits


def test_many_threads_together_do_not_pass_a_bound(server, tmp_path):
    settings = server.settings("slow", max_tokens_total=700)

    def ask(i):
        try:
            return client.ask(body(settings, str(i))).text
        except UserError as error:
            return str(error)

    with Client(settings, tmp_path / "run") as client, ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(ask, range(12)))
    assert sum(text.startswith("A remark") for text in texts) == len(server.requests()) == 5
    assert client.budget.spent.read + client.budget.spent.written == 550


def test_what_may_have_been_paid_for_counts(server, tmp_path, quick):
    _, client = asked(server, tmp_path, "no-usage")
    assert client.budget.spent.read > 100 and client.budget.spent.written == 20
    before = client.budget.spent
    _, client = asked(server, tmp_path, "hang-once", timeout=0.5)
    assert client.budget.spent.requests == before.requests + 2
    assert client.budget.spent.written == before.written + 20 + 10
    before = client.budget.spent
    _, client = asked(server, tmp_path, "500-once")
    assert client.budget.spent == before + Spent(2, 100, 10)


def test_a_ledger_that_is_no_ledger_is_named(server, tmp_path):
    asked(server, tmp_path, "ok")
    ledger = tmp_path / "run" / "spent.jsonl"
    assert len(ledger.read_text().splitlines()) == 2
    ledger.write_text(ledger.read_text() + "x\n")
    with pytest.raises(UserError, match="spent.jsonl:3"):
        asked(server, tmp_path, "ok")


def test_leaving_waits_for_answers_under_way_and_stops_those_that_wait(server, tmp_path):
    settings = server.settings("slow", requests_at_once=1)
    threads = ThreadPoolExecutor(3)
    with Client(settings, tmp_path / "run") as client:
        waiting = [threads.submit(client.ask, body(settings, str(i))) for i in range(3)]
        while not server.requests():
            time.sleep(0.01)
    ended = [future.exception() for future in waiting]
    assert ended.count(None) == 1 and sum(isinstance(error, endpoint.Closed) for error in ended) == 2
    assert len(list((tmp_path / "run" / "answers").rglob("*.json"))) == 1 == len(server.requests())
