import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from cai_jax import launch
from cai_jax.config import OPTIONAL, STAGES
from cai_jax.errors import UserError
from cai_jax.named_runs import load_config
from cai_jax.overrides import apply_overrides, flatten
from cai_jax.progress import Progress, duration
from cai_jax.provenance import locked_run_folder, read_json

_ROOT = Path(launch.__file__).parent.parent


def command(*arguments: str, cwd=None, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "cai_jax.launch", *arguments], capture_output=True, text=True, cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(_ROOT), **environment},
    )


# ---------------------------------------------------------------- flags, --list, --show

_WITHOUT_JAX = """
import sys
from absl import app
from cai_jax import launch
try:
    app.run(launch.main, argv=["launch", *sys.argv[1:]], flags_parser=launch._parse_flags)
finally:
    heavy = {"jax", "numpy", "transformers", "datasets", "matplotlib", "rich"} & set(sys.modules)
    print("heavy:", sorted(heavy))
"""


def without_jax(*arguments: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", _WITHOUT_JAX, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *lines, heavy = result.stdout.splitlines()
    assert heavy == "heavy: []"
    return lines


def test_list_names_every_run_in_one_line_without_importing_jax():
    lines = without_jax("--list")
    names = [line.split()[0] for line in lines]
    assert names == sorted(path.stem for path in (_ROOT / "configs").glob("*.py"))
    assert all(load_config(line.split()[0])[1].description in line for line in lines)


def test_show_prints_what_set_takes_without_importing_jax():
    title, *lines = without_jax("--config=tiny", "--show", "--set=ppo.kl_coef=0.5", "--set", "seed=3",
                                "--stages=sft,ppo", "--run_dir=elsewhere")
    _, tiny = load_config("tiny")
    assert title == f"# tiny: {tiny.description}"
    expected = apply_overrides(tiny, ["ppo.kl_coef=0.5", "seed=3", "stages=sft,ppo", "run_dir=elsewhere"])
    assert flatten(apply_overrides(tiny, lines)) == flatten(expected)
    assert len(lines) == len(flatten(tiny))


def test_show_names_the_run_folder_that_would_be_used():
    assert "run_dir=runs/tiny" in without_jax("--config=tiny", "--show")


@pytest.mark.parametrize("arguments, told", [
    ([], "--config=NAME is missing; the named runs are cai_7b"),
    (["--confg=tiny"], "did you mean --config?"),
    (["--config"], "Missing value for flag --config"),
    (["--config=tyni"], "did you mean tiny?"),
    (["--config=tiny", "ppo.updates=3"], "'ppo.updates=3' belongs to no flag"),
    (["--config=tiny", "--set=ppo.kl_coeff=1"], "did you mean ppo.kl_coef?"),
    (["--config=tiny", "--set=ppo.clip=0"], "ppo.clip must be above 0"),
    (["--config=tiny", "--stages=sft,pppo"], "did you mean ppo?"),
    (["--config=tiny", "--stages="], "names no stage"),
    (["--config=tiny", "--run_dir=/dev/null/run"], "/dev/null/run: cannot be written"),
])
def test_a_mistake_is_one_line_and_exit_code_2(arguments, told, tmp_path):
    result = command(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert told in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_says_how_and_is_no_error():
    result = command("--help")
    assert result.returncode == 0
    assert "--stages" in result.stdout and "Exit codes" in result.stdout


# ---------------------------------------------------------------- running

_PACKAGES = {"cai_jax.report": "write_report", "cai_jax.stages.context": "prepare"}


class FakeContext:
    """Stands in for the stages: notes what was asked of it."""

    def __init__(self, fail_in: str = "", error: BaseException | None = None):
        self.calls, self.fail_in, self.error = [], fail_in, error

    def prepare(self, name, config, run_dir, fresh, progress):
        self.calls.append(("prepare", name, str(run_dir), fresh))
        self._fail("prepare")
        return self

    def describe(self):
        return {"parameters": 7}

    def run_stage(self, stage):
        self.calls.append(stage)
        self._fail(stage)

    def write_report(self, run_dir):
        self.calls.append("report")
        return Path(run_dir) / "report.html"

    def _fail(self, where):
        if where == self.fail_in:
            raise self.error


@pytest.fixture
def start(monkeypatch, tmp_path):
    """start(fake, *flags) runs the launcher in this process and in an empty folder; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_set_environment", lambda: None)

    def start(fake: FakeContext, *arguments: str) -> int:
        for module, function in _PACKAGES.items():
            stand_in = types.ModuleType(module)
            setattr(stand_in, function, getattr(fake, function))
            monkeypatch.setitem(sys.modules, module, stand_in)
        argv = launch._parse_flags(["launch", *arguments])
        return launch.main(argv)

    yield start
    launch.flags.FLAGS.unparse_flags()
    for flag in launch.flags.FLAGS.get_key_flags_for_module("cai_jax.launch"):
        flag.unparse()
        flag.present = 0


def test_stages_run_in_order_then_the_report_is_named(start, tmp_path, capsys):
    fake = FakeContext()
    assert start(fake, "--config=tiny", "--set=seed=5") == 0
    default = [stage for stage in STAGES if stage not in OPTIONAL]
    assert fake.calls == [("prepare", "tiny", "runs/tiny", False), *default, "report"]
    assert capsys.readouterr().out == "report: runs/tiny/report.html\n"
    written = read_json(tmp_path / "runs" / "tiny" / "config.json")
    assert written["name"] == "tiny" and written["parameters"] == 7
    assert written["command"] == "python -m cai_jax.launch --config=tiny --set=seed=5"
    assert written["config"]["seed"] == 5 and written["config"]["run_dir"] == "runs/tiny"
    assert written["environment"]["cpu_count"] >= 1 and written["environment"]["devices"]


def test_selected_stages_and_fresh_are_passed_on(start):
    fake = FakeContext()
    assert start(fake, "--config=tiny", "--stages=sft, ppo", "--run_dir=here", "--fresh") == 0
    assert fake.calls == [("prepare", "tiny", "here", True), "sft", "ppo", "report"]


@pytest.mark.parametrize("where", ["prepare", "ppo"])
def test_a_users_mistake_in_a_stage_ends_the_run(start, capsys, where):
    fake = FakeContext(where, UserError("no\nsuch model"))
    assert start(fake, "--config=tiny") == 2
    assert capsys.readouterr().err == "error: no such model\n"
    if where == "prepare":
        assert fake.calls[-1][0] == "prepare"
        assert not Path("runs/tiny/config.json").exists(), "the record of the run before must stay true"
    else:  # the report of what there is
        assert fake.calls[-2:] == [where, "report"]


@pytest.mark.parametrize("name", ["report.html", "log.txt", "config.json", "lock"])
def test_a_folder_in_the_place_of_a_file_is_one_line(start, tmp_path, capsys, monkeypatch, name):
    fake = FakeContext()
    monkeypatch.setattr(fake, "write_report", lambda run_dir: (run_dir / "report.html").write_text(""))
    monkeypatch.setattr(fake, "run_stage", lambda stage: Progress(tmp_path / "runs" / "tiny").log(stage))
    (tmp_path / "runs" / "tiny" / name).mkdir(parents=True)
    assert start(fake, "--config=tiny") == 2
    told = "runs/tiny" if name == "lock" else name
    assert re.search(rf"error: \S*{told}: cannot be written \(Is a directory\).*\n\Z", capsys.readouterr().err)


def test_a_full_disk_in_a_stage_is_one_line(start, capsys):
    fake = FakeContext("sft", OSError(errno.ENOSPC, "No space left on device", "model.safetensors"))
    assert start(fake, "--config=tiny") == 2
    assert capsys.readouterr().err.startswith("error: model.safetensors: no space left")


def test_a_fault_of_ours_keeps_its_traceback(start):
    with pytest.raises(FileNotFoundError):
        start(FakeContext("sft", FileNotFoundError(errno.ENOENT, "x")), "--config=tiny")


@pytest.mark.parametrize("arguments, told", [
    ((), "run the same command to go on"), (("--fresh",), "run the same command without --fresh to go on")])
def test_an_interrupt_says_how_to_go_on(start, capsys, arguments, told):
    assert start(FakeContext("sft", KeyboardInterrupt()), "--config=tiny", *arguments) == 130
    assert told in capsys.readouterr().err


def test_a_machine_taken_away_is_one_line_and_143(start, capsys, monkeypatch):
    fake = FakeContext()
    monkeypatch.setattr(fake, "run_stage", lambda stage: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5)))
    before = signal.getsignal(signal.SIGTERM)
    assert start(fake, "--config=tiny") == 143
    assert capsys.readouterr().err == "terminated; run the same command to go on\n"
    assert fake.calls[-1] == "report" and signal.getsignal(signal.SIGTERM) == before


def test_a_folder_in_use_is_refused_before_anything_is_loaded(start, capsys):
    fake = FakeContext()
    with locked_run_folder("busy"):
        assert start(fake, "--config=tiny", "--run_dir=busy") == 2
    assert "busy: in use by process" in capsys.readouterr().err
    assert fake.calls == []


def test_the_environment_of_the_user_stands(monkeypatch, tmp_path):
    for variable in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(variable, raising=False)
    code = "from cai_jax import launch; launch._set_environment(); import jax, os, json; print(json.dumps([" \
           "jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs, " \
           "os.environ['TF_CPP_MIN_LOG_LEVEL']]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            env={**os.environ, "CAI_JAX_CACHE": str(tmp_path), "TF_CPP_MIN_LOG_LEVEL": "0"})
    assert json.loads(result.stdout) == [str(tmp_path / "xla"), 0.5, "0"], result.stderr


# ---------------------------------------------------------------- progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_at_the_start_the_end_and_every_ten_seconds(tmp_path, capsys):
    clock = Clock()
    progress = Progress(tmp_path, clock=clock)
    with progress.task("critique", total=8) as task:
        for _ in range(8):
            clock.now += 4
            task.advance(1, tokens=100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "critique: 0/8 rows",
        "critique: 3/8 rows, 25 tokens/s, 20s left",
        "critique: 6/8 rows, 25 tokens/s, 8s left",
        "critique: 8/8 rows, 25 tokens/s, 32s in all",
    ]
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in logged] == lines


def test_work_of_an_earlier_command_does_not_count_in_the_rate():
    clock = Clock()
    progress = Progress(clock=clock)
    with progress.task("sft", total=100, unit="steps", done=90) as task:
        assert str(task) == "sft: 90/100 steps"
        clock.now += 10
        task.advance(5, note="loss 2.5")
        assert str(task) == "sft: 95/100 steps, loss 2.5, 10s left"


def test_a_task_that_fails_does_not_say_that_it_is_done(tmp_path):
    progress = Progress(tmp_path)
    with pytest.raises(ZeroDivisionError), progress.task("sft", total=2):
        raise ZeroDivisionError
    assert (tmp_path / "log.txt").read_text().count("\n") == 1


def test_any_text_can_be_logged(tmp_path):
    Progress(tmp_path).log("\ud800 [bold]x[/nope] é")
    assert "[bold]x[/nope] é" in (tmp_path / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("seconds, text", [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m")])
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


_ON_TERMINAL = """
import sys
from cai_jax.progress import Progress
progress = Progress(sys.argv[1])
with progress.task("ppo [x]", total=2, unit="updates") as task:
    task.advance(1)
    progress.log("a [line]")
    task.advance(1, note="kl 0.1")
"""


def test_a_terminal_shows_a_live_line_and_the_log_gets_plain_ones(tmp_path):
    parent, child = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", _ON_TERMINAL, str(tmp_path)], stdin=child, stdout=child,
                               stderr=child, env={**os.environ, "TERM": "xterm", "COLUMNS": "80"})
    os.close(child)
    shown = b""
    try:
        while chunk := os.read(parent, 65536):
            shown += chunk
    except OSError:  # how Linux says that the other side has closed
        pass
    os.close(parent)
    assert process.wait() == 0, shown
    assert b"a [line]" in shown and b"ppo [x]: 2/2 updates, kl 0.1" in shown
    assert b"\x1b[?25l" in shown and b"\x1b[?25h" in shown  # the cursor is hidden, and comes back
    logged = (tmp_path / "log.txt").read_text()
    assert "a [line]" in logged and "2/2 updates" in logged and "\x1b" not in logged


def test_interrupting_the_command_itself_ends_in_130(tmp_path):
    """Through the real process: a config that waits stands in for work under way."""
    path = tmp_path / "slow.py"
    path.write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "-m", "cai_jax.launch", f"--config={path}"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=_ROOT,
                               # a job in the background is started with SIGINT ignored
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err == "interrupted; run the same command to go on\n"
