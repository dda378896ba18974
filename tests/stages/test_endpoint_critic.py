"""Critiques from a model behind HTTP: a run as a user starts it, killed, out of budget, and with nothing of the key."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from endpoints import KEY, KEY_ENV, serving
from run_folders import artifacts

ROUNDS, ROWS = 2, 4


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server


def command(server, run_dir: Path, *flags: str, model: str = "slow") -> list[str]:
    fields = {
        "critique_revision.critic": "external", "critique_revision.reviser": "external", "endpoint.base_url": server.url,
        "endpoint.model": model, "endpoint.key_env": KEY_ENV, "endpoint.price_read": 1000, "endpoint.timeout": 20,
        "endpoint.requests_at_once": 1, "critique_revision.rows_per_shard": 1,
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


def test_a_killed_run_ends_with_the_same_bytes_and_asks_nothing_twice(finished, server, tmp_path):
    run_dir, before = tmp_path / "killed", len(server.requests())
    process = subprocess.Popen(
        command(server, run_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    answers = run_dir / "endpoint" / "answers"
    while len(list(answers.rglob("*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run_dir / "critique_revision" / "done.json").exists()
    kept = {json.dumps(json.loads(path.read_text())["question"], sort_keys=True) for path in answers.rglob("*.json")}
    result = launch(server, run_dir)
    assert result.returncode == 0, result.stderr
    times = asked(server, before)
    assert len(times) == 16 and all(times[body] == 1 for body in kept) and sum(times.values()) <= 17
    assert stage_artifacts(run_dir) == stage_artifacts(finished)
    timing = json.loads((run_dir / "critique_revision" / "timing.json").read_text())
    assert timing["endpoint"]["cached"] > 0 or timing["endpoint"]["asked"] < 16


def test_a_spent_budget_ends_the_run_in_one_line_and_a_larger_one_goes_on(finished, server, tmp_path):
    run_dir, before = tmp_path / "short", len(server.requests())
    result = launch(server, run_dir, "--set=endpoint.max_requests=6")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: endpoint.max_requests=6: the next request could pass it (spent: 6 requests, 660 tokens)")
    assert len(server.requests()) - before == 6
    result = launch(server, run_dir, "--set=endpoint.max_requests=16")
    assert result.returncode == 0, result.stderr
    assert max(asked(server, before).values()) == 1
    assert stage_artifacts(run_dir) == stage_artifacts(finished)


def test_the_door_says_what_is_missing_before_anything_is_computed(finished, server, tmp_path):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    result = launch(server, tmp_path / "new", **{KEY_ENV: ""})
    assert result.returncode == 2 and "sampler:" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: endpoint.key_env={KEY_ENV}: this environment variable")
    result = launch(server, copy, **{KEY_ENV: ""})  # a stage that is done asks nothing
    assert result.returncode == 0 and "done before, skipped" in result.stderr


def test_rows_of_an_endpoint_that_fails_are_counted(server, tmp_path):
    result = launch(server, tmp_path / "run", "--set=critique_revision.critic=", model="malformed")
    assert result.returncode == 2
    assert "no answer of the endpoint" in result.stderr.strip().splitlines()[-1], result.stderr
