import os
import re
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_jax import run_folder
from cai_jax.errors import UserError
from cai_jax.provenance import read_json, write_json
from cai_jax.run_folder import MetricsFile, StageFolder, locked_run_folder, shard_name

# Texts that a careless writer or reader of lines would lose: line breaks of every kind, controls, halves
# of surrogate pairs, marks and template fragments.
_HOSTILE = ["a\nb\r\nc\x85d\u2028e\u2029f\x0b\x0c", "\x00\x1f\x7f", "\U0001f600\ufeff", '"\\}{', "<|im_start|>system"]


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as raised:
        function(*args, **kwargs)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    return message


# ---------------------------------------------------------------- the lock

_HOLDER = """
import sys
from cai_jax.run_folder import locked_run_folder
with locked_run_folder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_command_in_one_folder_is_refused_until_the_first_is_dead(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(folder)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        message = error_of(locked_run_folder(folder).__enter__)
        assert str(folder) in message and str(holder.pid) in message
        with locked_run_folder(tmp_path / "other"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with locked_run_folder(folder) as held:
        assert held == folder


def test_a_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked_run_folder(tmp_path):
        raise ZeroDivisionError
    with locked_run_folder(tmp_path):
        pass


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    assert f"{tmp_path}/config.json: cannot be written" in error_of(write_json, tmp_path / "config.json", {})


def test_a_run_folder_that_is_a_file_or_below_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/no_such_folder", tmp_path / ("x" * 300)):
        assert "cannot be written" in error_of(locked_run_folder(folder).__enter__)


def test_a_disk_that_is_as_good_as_full_is_refused(tmp_path, monkeypatch):
    usage = run_folder.shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage)
    message = error_of(locked_run_folder(tmp_path).__enter__)
    assert str(tmp_path) in message and "1 MiB left" in message


# ---------------------------------------------------------------- stage folders


def finished_stage(run_dir) -> StageFolder:
    folder = StageFolder(run_dir, "sft")
    folder.begin({"config.sft.epochs": 1})
    folder.write_shard(0, 1, [{"id": "a"}])
    folder.write_summary({"rows": 1})
    write_json(folder.path / "model" / "config.json", {"x": 1})
    write_json(folder.path / "checkpoints" / "7" / "state", 1)
    folder.finish({"seconds": 1.5})
    return folder


def test_a_stage_is_new_then_resumed_then_done(tmp_path):
    folder = StageFolder(tmp_path, "sft")
    assert folder.begin({"a": 1}) == "new"
    assert folder.begin({"a": 1}) == "resume"
    assert folder.done() is None
    digest = folder.finish({"seconds": 1})
    assert folder.begin({"a": 1}) == "done"
    assert folder.done()["hash"] == digest


def test_done_names_every_artifact_and_nothing_that_differs_between_runs(tmp_path):
    folder = finished_stage(tmp_path)
    assert set(folder.done()["artifacts"]) == {
        "fingerprint.json", "rows-00000-of-00001.jsonl", "summary.json", "model/config.json"}
    assert not (folder.path / "checkpoints").exists()
    assert read_json(folder.path / "timing.json") == {"seconds": 1.5}


def test_time_does_not_change_the_hash_and_rows_do(tmp_path):
    hashes = []
    for number, (row, seconds) in enumerate([("a", 1), ("a", 2), ("b", 1)]):
        folder = StageFolder(tmp_path / str(number), "sft")
        folder.begin({"a": 1})
        folder.write_shard(0, 1, [{"id": row}])
        hashes.append(folder.finish({"seconds": seconds}))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("seal", [False, True])
def test_what_changed_is_named_with_both_values(tmp_path, seal):
    folder = StageFolder(tmp_path, "ppo")
    earlier = {"config.ppo.updates": 2, "input.sft": "a" * 64, "gone": "x" * 500, "z": 0, "same": "y"}
    folder.begin(earlier)
    if seal:
        folder.finish({})
    message = error_of(folder.begin, {"config.ppo.updates": 3, "input.sft": "b" * 64, "z": 1, "same": "y"})
    assert "config.ppo.updates 2 -> 3" in message
    assert f"input.sft {'a' * 12} -> {'b' * 12}" in message
    assert "-> (absent)" in message and "x" * 60 not in message
    assert "and 1 more" in message and "same" not in message
    assert "--fresh --stages=ppo" in message and str(tmp_path) in message
    assert folder.begin(earlier) == ("done" if seal else "resume")


def test_a_check_refuses_what_begin_refuses_and_touches_nothing(tmp_path):
    folder = StageFolder(tmp_path, "ppo")
    folder.check({"a": 1})
    assert os.listdir(tmp_path) == []
    folder.begin({"a": 1, "input.sft": "x"})
    (folder.path / "rows.tmp").write_text("")
    folder.check({"a": 1.0, "input.sft": "x"})
    folder.check({"a": 1, "input.sft": None})  # still to be made
    assert "a 1 -> 2" in error_of(folder.check, {"a": 2, "input.sft": None})
    assert "input.sft" in error_of(folder.check, {"a": 1})
    assert sorted(os.listdir(folder.path)) == ["fingerprint.json", "rows.tmp"]


@pytest.mark.parametrize("content", ["[1]", "3", "null"])
def test_a_fingerprint_that_is_none_is_named(tmp_path, content):
    folder = finished_stage(tmp_path)
    (folder.path / "fingerprint.json").write_text(content)
    assert "fingerprint.json: was altered" in error_of(folder.begin, {"config.sft.epochs": 1})


def test_a_fingerprint_may_hold_tuples_and_whole_floats(tmp_path):
    folder = StageFolder(tmp_path, "ppo")
    folder.begin({"stages": ("a", "b"), "x": 1})
    assert folder.begin({"stages": ["a", "b"], "x": 1.0}) == "resume"


def test_discarding_makes_a_stage_new(tmp_path):
    folder = finished_stage(tmp_path)
    folder.discard()
    assert os.listdir(tmp_path) == []
    folder.discard()
    assert folder.begin({"other": 1}) == "new"


def test_what_a_killed_discard_has_left_is_removed(tmp_path):
    folder = finished_stage(tmp_path)
    os.rename(folder.path, tmp_path / ".sft.discarded")
    assert folder.begin({"other": 1}) == "new"
    assert os.listdir(tmp_path) == ["sft"]


@pytest.mark.parametrize("name", ["rows-00000-of-00001.jsonl", "model/config.json"])
def test_an_artifact_altered_or_missing_after_the_end_is_named(tmp_path, name):
    folder = finished_stage(tmp_path)
    path = folder.path / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b"a", b"b").replace(b"1", b"2"))
    message = error_of(folder.begin, {"config.sft.epochs": 1})
    assert str(path) in message and "altered" in message
    path.unlink()
    message = error_of(folder.begin, {"config.sft.epochs": 1})
    assert str(path) in message and "missing" in message
    path.write_bytes(content)
    assert folder.begin({"config.sft.epochs": 1}) == "done"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"artifacts": {}, "hash": "0"}'])
def test_an_altered_seal_is_noticed(tmp_path, content):
    folder = finished_stage(tmp_path)
    (folder.path / "done.json").write_text(content)
    assert "done.json" in error_of(folder.begin, {"config.sft.epochs": 1})


def test_artifacts_without_a_fingerprint_are_not_taken_over(tmp_path):
    folder = finished_stage(tmp_path)
    (folder.path / "fingerprint.json").unlink()
    assert "fingerprint.json: is missing" in error_of(folder.begin, {"config.sft.epochs": 1})


# ---------------------------------------------------------------- shards


@settings(max_examples=40, deadline=None)  # every example writes to disk and waits for it
@given(st.lists(st.dictionaries(st.text(max_size=5), st.text() | st.sampled_from(_HOSTILE))))
def test_rows_come_back_as_they_were(tmp_path_factory, rows):
    folder = StageFolder(tmp_path_factory.mktemp("shards"), "sft")
    folder.write_shard(0, 1, rows)
    assert folder.read_shards() == rows


def test_halves_of_surrogate_pairs_become_replacement_characters(tmp_path):
    folder = StageFolder(tmp_path, "sft")
    folder.write_shard(0, 1, [{"id": "\ud83d\ude00 \ud800 x \udfff"}])
    assert folder.read_shards() == [{"id": "\U0001f600 \ufffd x \ufffd"}]


def test_datasets_reads_what_we_write(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = StageFolder(tmp_path, "sft")
    for index in range(2):
        folder.write_shard(index, 2, [{"id": f"{index}-{n}", "text": text, "p": 0.5, "list": [{"a": n}]}
                                      for n, text in enumerate([*_HOSTILE, "\ud800"])])
    files = [str(folder.path / shard_name(index, 2)) for index in range(2)]
    read = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert read.to_list() == folder.read_shards()


def test_prefixes_are_apart_and_order_is_by_number(tmp_path):
    folder = StageFolder(tmp_path, "sft")
    for index in (2, 0, 1):
        folder.write_shard(index, 3, [{"n": index}])
    folder.write_shard(0, 1, [{"n": "s"}], prefix="samples")
    assert folder.read_shards() == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert folder.read_shards("samples") == [{"n": "s"}]
    assert folder.finished_shards() == {0, 1, 2} and folder.finished_shards("other") == set()


def test_a_missing_shard_is_named_with_the_stage_to_run(tmp_path):
    folder = StageFolder(tmp_path, "sft")
    assert "run stage sft first" in error_of(folder.read_shards)
    folder.write_shard(0, 3, [])
    folder.write_shard(2, 3, [])
    assert folder.finished_shards() == {0, 2}
    assert "rows-00001-of-00003.jsonl" in error_of(folder.read_shards)


def test_shards_of_two_runs_are_not_mixed(tmp_path):
    folder = StageFolder(tmp_path, "sft")
    folder.write_shard(0, 2, [])
    folder.write_shard(0, 3, [])
    assert "of 2, of 3" in error_of(folder.finished_shards)


@pytest.mark.parametrize("content, line", [
    (b'{"a": 1}\n{"a": 2', 2), (b'{"a": 1}\n{"a" 2}\n', 2), (b'\n{"a": 1}\n', 1), (b'{"a": "\xff"}\n', 1),
    (b'{"a": 1}\n[1]\n', 2), (b"null\n", 1),
])
def test_a_malformed_shard_is_never_taken_for_whole(tmp_path, content, line):
    folder = StageFolder(tmp_path, "sft")
    folder.write_shard(0, 1, [{"a": 1}])
    path = folder.path / shard_name(0, 1)
    path.write_bytes(content)
    assert f"{path}:{line}: " in error_of(folder.read_shards)
    assert f"{path}:{line}: " in error_of(folder.finished_shards)


# ---------------------------------------------------------------- metrics


def test_truncating_gives_the_bytes_of_the_checkpoint(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    contents = [b""]
    for step in range(1, 6):
        metrics.append({"step": step, "loss": 1 / step})
        contents.append(metrics.path.read_bytes())
    for tail in (b"", b'{"step": 6, "lo'):
        for step in (5, 3, 0):
            metrics.path.write_bytes(contents[5] + tail)
            metrics.truncate_to("step", step)
            assert metrics.path.read_bytes() == contents[step]
    metrics.truncate_to("step", 0)
    assert metrics.read() == []


def test_metrics_behind_their_checkpoint_are_refused(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.truncate_to("step", 0)
    assert not metrics.path.exists() and metrics.read() == []
    assert "the checkpoint is of step 3" in error_of(metrics.truncate_to, "step", 3)
    metrics.append({"step": 2})
    metrics.path.write_bytes(metrics.path.read_bytes() + b'{"step": 3')
    assert "ends at step 2" in error_of(metrics.truncate_to, "step", 3)


def test_a_malformed_line_in_the_middle_is_named(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    assert f"{metrics.path}:2: " in error_of(metrics.truncate_to, "step", 3)
    assert f"{metrics.path}:2: " in error_of(metrics.read)


def test_a_loss_that_is_no_number_is_null_and_readable(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1, "loss": float("nan")})
    assert metrics.read() == [{"step": 1, "loss": None}]


# ---------------------------------------------------------------- kill -9

_STAGE = """
import os, signal, sys
from pathlib import Path
from cai_jax.provenance import read_json, write_json
from cai_jax.run_folder import MetricsFile, StageFolder

kill_at, after = int(sys.argv[2]), sys.argv[3] == "after"
calls, replace = 0, os.replace

def replace_or_die(source, target):
    global calls
    calls += 1
    if calls == kill_at:
        if after:
            replace(source, target)
        if metrics.path.exists() and target.name != "done.json":
            with open(metrics.path, "ab") as file:
                file.write(b'{"step": 99, "lo')
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_or_die
folder = StageFolder(sys.argv[1], "sft")
metrics = MetricsFile(folder.path / "metrics.jsonl")
if folder.begin({"a": 1}) != "done":
    finished = folder.finished_shards()
    for index in range(2):
        if index not in finished:
            folder.write_shard(index, 2, [{"id": f"{index}-{n}"} for n in range(3)])
    checkpoint = folder.path / "checkpoints" / "state"
    last = read_json(checkpoint) if checkpoint.exists() else 0
    metrics.truncate_to("step", last)
    for step in range(last + 1, 5):
        metrics.append({"step": step, "loss": 1 / step})
        if step % 2 == 0:
            metrics.sync()
            write_json(checkpoint, step)
    write_json(folder.path / "summary.json", {"steps": 4})
    folder.finish({"seconds": kill_at})
print(calls)
"""


def run_stage(run_dir, kill_at: int = 0, moment: str = "before") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", _STAGE, str(run_dir), str(kill_at), moment],
                          capture_output=True, text=True)


def artifact_bytes(run_dir) -> dict:
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.name != "timing.json"]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


def test_a_stage_killed_at_any_of_its_writes_ends_with_the_same_bytes(tmp_path):
    undisturbed = run_stage(tmp_path / "undisturbed")
    writes = int(undisturbed.stdout)
    expected = artifact_bytes(tmp_path / "undisturbed")
    assert writes >= 8 and len(expected) == 6
    for kill_at in range(1, writes + 1):
        for moment in ("before", "after"):
            run_dir = tmp_path / f"{kill_at}-{moment}"
            assert run_stage(run_dir, kill_at, moment).returncode == -signal.SIGKILL
            assert run_stage(run_dir).returncode == 0
            assert artifact_bytes(run_dir) == expected, (kill_at, moment)


def test_a_shard_killed_before_its_rename_does_not_count(tmp_path):
    run_stage(tmp_path, kill_at=3)  # the fingerprint, the first shard, then the second
    folder = StageFolder(tmp_path, "sft")
    assert (folder.path / (shard_name(1, 2) + ".tmp")).exists()
    assert folder.finished_shards() == {0}
    assert folder.begin({"a": 1}) == "resume"
    assert not list(folder.path.glob("*.tmp"))


def test_shards_are_named_as_the_map_says():
    assert re.fullmatch(r"rows-00003-of-00012\.jsonl", shard_name(3, 12))
