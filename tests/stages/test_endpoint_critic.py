"""Critiques from a model behind HTTP: a run as a user starts it, killed, out of budget, and with nothing of the key."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from endpoints import KEY, KEY_ENV, serving
from run_folders import artifacts

from cai_jax import endpoint
from cai_jax.errors import UserError
from cai_jax.named_runs import load_config
from cai_jax.overrides import apply_overrides
from cai_jax.progress import Progress
from cai_jax.replies import Reply
from cai_jax.stages.context import prepare

ROUNDS, ROWS = 2, 4


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server


def command(server, run_dir: Path, *flags: str, model: str = "slow") -> list[str]:
    fields = {
        "critique_revision.critic": "external", "critique_revision.reviser": "external",
        "endpoint.base_url": server.url, "endpoint.model": model, "endpoint.key_env": KEY_ENV,
        "endpoint.price_read": 1000, "endpoint.timeout": 20, "endpoint.requests_at_once": 1,
        "critique_revision.rows_per_shard": 1,
    }  # fmt: skip
    sets = [f"--set={name}={value}" for name, value in fields.items()]
    start = [sys.executable, "-m", "cai_jax.launch", "--config=tiny", "--stages=critique_revision"]
    return [*start, f"--run_dir={run_dir}", *sets, *flags]


def environment(**changes) -> dict:
    return os.environ | {KEY_ENV: KEY, "NO_PROXY": "127.0.0.1"} | changes


def launch(server, run_dir: Path, *flags: str, model: str = "slow", **changes) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(server, run_dir, *flags, model=model), capture_output=True, text=True, timeout=300,
        env=environment(**changes),
    )  # fmt: skip


def stage_artifacts(run_dir: Path) -> dict[str, bytes]:
    return {name: content for name, content in artifacts(run_dir).items() if name.startswith("critique_revision/")}


def asked(server, since: int) -> Counter:
    """How often each question was sent since a place in the server's log."""
    return Counter(json.dumps(line["body"], sort_keys=True) for line in server.requests()[since:])


@pytest.fixture(scope="module")
def finished(server, tmp_path_factory) -> Path:
    run_dir, before = tmp_path_factory.mktemp("runs") / "undisturbed", len(server.requests())
    result = launch(server, run_dir)
    assert result.returncode == 0, result.stderr
    assert KEY not in result.stdout + result.stderr
    assert len(server.requests()) - before == 2 * ROUNDS * ROWS
    return run_dir


def test_rows_say_who_wrote_them_and_the_summary_what_it_took(finished, server):
    rows = [json.loads(line) for path in sorted((finished / "critique_revision").glob("rows-*")) for line in open(path)]
    assert len(rows) == ROWS
    for row in rows:
        who = f"slow at {server.url}"
        assert row["provenance"]["critic"] == row["provenance"]["reviser"] == who
        assert row["flags"]["endpoint_failed"] is False and len(row["rounds"]) == ROUNDS
        for entry in row["rounds"]:
            assert entry["critique"]["model"] == "served-1" and entry["critique"]["text"].startswith("A remark on")
            assert entry["critique"]["tokens"] > 0 and not entry["flags"]["critique_truncated"]
    summary = json.loads((finished / "critique_revision" / "summary.json").read_text())["endpoint"]
    assert summary == {
        "model": "slow", "base_url": server.url, "answers": 16, "tokens_read": 1600, "tokens_written": 160, "cost": 1.6,
        "failures": {},
    }  # fmt: skip
    done = json.loads((finished / "critique_revision" / "timing.json").read_text())["endpoint"]
    assert done["asked"] == done["sent"] == 16 and done["cached"] == done["retries"] == 0
    assert done["spent_by_run"] == {"requests": 16, "read": 1600, "written": 160, "cost": 1.6}
    report = (finished / "report.html").read_text()
    assert "16 answers" in report and "it sent 16 requests" in report


def test_the_key_is_in_no_file_of_the_run(finished):
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert len(files) > 20 and finished / "log.txt" in files
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_a_run_out_of_budget_and_then_killed_ends_with_the_same_bytes_and_asks_nothing_twice(
    finished, server, tmp_path
):
    run_dir, before = tmp_path / "broken", len(server.requests())
    result = launch(server, run_dir, "--set=endpoint.max_requests=4")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: endpoint.max_requests=4: the next request could pass it")
    assert "(spent: 4 requests, 440 tokens)" in last
    assert len(server.requests()) - before == 4

    larger = "--set=endpoint.max_requests=17"  # one for the request under way at the kill
    process = subprocess.Popen(
        command(server, run_dir, larger), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    answers = run_dir / "endpoint" / "answers"
    while len(list(answers.rglob("*.json"))) < 8:
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run_dir / "critique_revision" / "done.json").exists()
    kept = {json.dumps(json.loads(path.read_text())["question"], sort_keys=True) for path in answers.rglob("*.json")}
    result = launch(server, run_dir, larger)
    assert result.returncode == 0, result.stderr
    times = asked(server, before)
    assert len(times) == 16 and all(times[body] == 1 for body in kept) and sum(times.values()) <= 17
    assert stage_artifacts(run_dir) == stage_artifacts(finished)


# ---------------------------------------------------------------- in this process


def opened(server, run_dir: Path, model: str, *overrides: str):
    run_dir.mkdir(exist_ok=True)
    fields = ["critique_revision.critic=external", f"endpoint.base_url={server.url}", f"endpoint.model={model}",
              f"endpoint.key_env={KEY_ENV}", *overrides]  # fmt: skip
    config = replace(apply_overrides(load_config("tiny")[1], fields), stages=("critique_revision",))
    return prepare("tiny", config, run_dir, False, Progress(run_dir))


def rows_and_summary(server, run_dir: Path, model: str, *overrides: str):
    opened(server, run_dir, model, *overrides).run_stage("critique_revision")
    stage = run_dir / "critique_revision"
    rows = [json.loads(line) for path in sorted(stage.glob("rows-*")) for line in open(path)]
    return rows, json.loads((stage / "summary.json").read_text())


@pytest.fixture
def with_key(monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return monkeypatch


def test_the_door_refuses_an_endpoint_that_cannot_be_asked(server, tmp_path, with_key):
    with pytest.raises(UserError, match="critique_revision.critic is external and needs endpoint.model"):
        opened(server, tmp_path, "")
    with pytest.raises(UserError, match="cannot be reached"):
        opened(server, tmp_path, "ok", "endpoint.base_url=http://127.0.0.1:1/v1")
    with_key.delenv(KEY_ENV)
    with pytest.raises(UserError, match=f"endpoint.key_env={KEY_ENV}: this environment variable is not set"):
        opened(server, tmp_path, "ok")


def test_another_model_is_another_input_and_a_stage_that_is_done_needs_no_key(server, tmp_path, with_key):
    rows_and_summary(server, tmp_path, "ok")
    with pytest.raises(UserError, match="endpoint.model"):
        opened(server, tmp_path, "long")
    with_key.delenv(KEY_ENV)
    opened(server, tmp_path, "ok", "endpoint.max_requests=3")


def test_cut_and_empty_critiques_are_flagged(server, tmp_path, with_key):
    rows, summary = rows_and_summary(server, tmp_path / "cut", "long")
    assert summary["counters"]["critique_truncated"] == summary["rounds"] == ROUNDS * ROWS
    assert rows[0]["provenance"]["reviser"] == "base" and "model" not in rows[0]["rounds"][0]["revision"]
    _, summary = rows_and_summary(server, tmp_path / "empty", "empty")
    assert summary["counters"]["critique_empty"] == ROUNDS * ROWS


def test_an_endpoint_that_fails_is_counted_and_never_papered_over(server, tmp_path, with_key):
    with pytest.raises(UserError, match="the endpoint gave no text for any row .malformed 4.; mend it and run with"):
        rows_and_summary(server, tmp_path / "all", "malformed")
    real, made = endpoint.Client.ask, []

    def sometimes(client, body):
        made.append(body)
        return Reply(failure="no_text") if len(made) % 5 == 0 else real(client, body)

    with_key.setattr(endpoint.Client, "ask", sometimes)
    rows, summary = rows_and_summary(server, tmp_path / "some", "ok")
    failed = [row["endpoint_failure"] for row in rows if row["flags"]["endpoint_failed"]]
    assert len(failed) + len(summary["skipped"]) == 1 and set(failed) <= {"no_text"}
    assert summary["endpoint"]["failures"] == dict(Counter(failed))
    assert summary["counters"]["endpoint_failed"] == len(failed)


def test_a_critique_longer_than_our_context_ends_the_rounds(server, tmp_path, with_key):
    with_key.setattr(endpoint.Client, "ask", lambda client, body: Reply("word " * 5000))
    with pytest.raises(UserError, match="no room in sampler.max_length"):
        rows_and_summary(server, tmp_path, "ok")


def test_what_others_wrote_is_quoted(finished, server):
    asked = server.requests()[0]["body"]["messages"]
    assert [turn["role"] for turn in asked] == ["user"]
    assert asked[0]["content"].startswith("Lines that begin with > are quoted") and "\nUser:\n> " in asked[0]["content"]
