"""The sampler against its peers, in one table.

    python benchmarks/sampler.py [--repeats 3] [--json FILE] [--engines ours,llama.cpp] [--parts plain] ...

Two pieces of work on SmolLM2-135M-Instruct: the critique-revision chain (32 red-team prompts, the constitution's
worked critiques as preamble, a response and two rounds of critique and revision, 64 tokens each) and plain decoding
(128 tokens after 128, for 1, 8 and 32 rows). Every engine samples at temperature 1 without filters and writes exactly
as many tokens. Each measurement is a process of its own with two threads; engines take turns, and all of them repeat.
Loading, compiling and a warm-up are not counted. Peers get environments of their own, made where they are missing.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(HERE / "peers"), str(ROOT)]  # a checkout need not be installed

from environments import ENVIRONMENTS, python_of  # noqa: E402
from machine import decode_limit  # noqa: E402
from table import OURS, tables  # noqa: E402

from cai_jax.config import cache_folder  # noqa: E402
from cai_jax.errors import UserError, exit_code  # noqa: E402

SCRIPTS = {
    OURS: "ours.py",
    "transformers": "peers/transformers_generate.py",
    "llama.cpp": "peers/llama_server.py",
    "tunix": "peers/tunix_sampler.py",
}
PARTS = ("chain", "plain")
PRECISIONS = ("float32", "bfloat16")
LOUD = 0.1  # cores that others may use during a measurement; above, it is made once more


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; lists are comma-separated names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, known in (("engines", tuple(SCRIPTS)), ("parts", PARTS), ("precisions", PRECISIONS)):
        parser.add_argument(f"--{name}", type=names_of(known), default=known, help=f"of {','.join(known)}")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each, medians are shown")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for every single measurement")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads are at least 1")
    return options


def names_of(known: tuple[str, ...]):
    def names(text: str) -> tuple[str, ...]:
        wanted = tuple(part.strip() for part in text.split(","))
        if unknown := [name for name in wanted if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return wanted

    return names


def schedule(options) -> list[tuple[str, str, str]]:
    """(engine, part, precision) of all measurements in order: engines take turns. Tunix does plain float32 only."""
    turns = [
        (engine, part, precision)
        for part in options.parts
        for precision in options.precisions
        for engine in options.engines
        if engine != "tunix" or (part, precision) == ("plain", "float32")
    ]
    return turns * options.repeats


def main() -> int:
    options = parse()
    folder = cache_folder() / "bench"
    model = cache_folder() / "SmolLM2-135M-Instruct"
    if not (model / "model.safetensors").exists():
        raise UserError(f"{model}: is not there; run make model")
    pythons = {name: python_of(name, folder) if name in ENVIRONMENTS else sys.executable for name in options.engines}
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    work = prepare(folder, model)
    machine = last_json([sys.executable, HERE / "machine.py"], folder / "machine.log")
    runs = []
    turns = schedule(options)
    for number, turn in enumerate(turns, start=1):
        run = measured(turn, pythons[turn[0]], folder, options.threads)
        runs.append(run)
        print(f"[{number}/{len(turns)}] {json.dumps(run)}", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n")
    print(summary(machine, runs, limits(model, machine, work)))
    return int(any("failed" in run for run in runs))


def prepare(folder: Path, model: Path) -> dict:
    """The work file and the GGUF files, in `folder`; returns the work."""
    from transformers import AutoTokenizer
    from work import make_work
    from write_gguf import write_gguf

    from cai_jax import load_constitution

    for precision in PRECISIONS:
        if not gguf_path(folder, precision).exists():
            write_gguf(model, gguf_path(folder, precision), precision)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return make_work(model, tokenizer, load_constitution("harmless_helpful"), folder / "work.json")


def gguf_path(folder: Path, precision: str) -> Path:
    return folder / f"SmolLM2-135M-Instruct.{precision}.gguf"


def limits(model: Path, machine: dict, work: dict) -> dict:
    """Precision -> rows -> milliseconds a step at which the machine ends, the cache as full as on average."""
    config = json.loads((model / "config.json").read_text())
    return {
        precision: {
            point["rows"]: decode_limit(
                config, machine, point["rows"], len(point["sets"][2]["ids"][0]) + point["new_tokens"] // 2, precision
            )
            for point in work["plain"]
        }
        for precision in PRECISIONS
    }


def measured(turn: tuple[str, str, str], python, folder: Path, threads: int) -> dict:
    """One measurement in a quiet moment; made once more if it was not quiet after all, and the quieter one counts."""
    engine, part, precision = turn
    command = [
        python, HERE / SCRIPTS[engine], folder / "work.json", "--part", part, "--precision", precision,
        "--threads", threads, "--gguf", gguf_path(folder, precision),
    ]  # fmt: skip
    log = folder / f"{engine}.{part}.{precision}.log"
    tried = []
    while len(tried) < 2 and (not tried or tried[-1]["others"] > LOUD):
        waited = wait_for_quiet()
        others = OthersUse()
        try:
            result = last_json(command, log)
        except UserError as error:
            return {"engine": engine, "part": part, "precision": precision, "failed": str(error)}
        tried.append(result | {"others": others.cores(), "waited": waited})
    quietest = min(tried, key=lambda run: run["others"])
    return {"engine": engine, "part": part, "precision": precision, **quietest}


def last_json(command: list, log: Path) -> dict:
    """What a process prints in the last line of its output, read as JSON. The rest goes to `log`."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT) if command[0] == sys.executable else "",
        "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(log.parent / "xla"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with log.open("wb") as stream:
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=stream, env=environment)
        stream.write(done.stdout)
    lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
    if done.returncode or not lines:
        raise UserError(f"{Path(str(command[1])).name} ended with {done.returncode}; see {log}")
    return json.loads(lines[-1])


def busy_seconds() -> float:
    """Seconds that all cores together have been busy since the machine started, time taken by other guests included."""
    user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split(None, 9)[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


class OthersUse:
    """The cores that other processes use from now on: what is busy, less what our children have used."""

    def __init__(self):
        self._start = self._now()

    def cores(self) -> float:
        elapsed, busy = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return round(max(0.0, busy / elapsed), 3)

    def _now(self):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.monotonic(), busy_seconds() - used.ru_utime - used.ru_stime


def wait_for_quiet(limit: float = 60) -> float:
    """Wait until others use less than LOUD cores in a second, `limit` seconds at most; returns how long it took."""
    start = time.monotonic()
    while time.monotonic() - start < limit:
        others = OthersUse()
        time.sleep(1)
        if others.cores() < LOUD:
            break
    return round(time.monotonic() - start, 1)


def summary(machine: dict, runs: list[dict], limits_by_precision: dict) -> str:
    """The machine, the versions and the tables."""
    versions = {run["engine"]: run["version"] for run in runs if "version" in run}
    loudest = max((run["others"] for run in runs if "others" in run), default=0.0)
    return "\n".join([
        f"{processor()}: reads {machine['bytes_per_second'] / 1e9:.1f} GB/s, multiplies "
        f"{machine['float32_flops_per_second'] / 1e9:.0f} GFLOP/s in float32, "
        f"{machine['bfloat16_flops_per_second'] / 1e9:.0f} with bfloat16 operands",
        *(f"{engine}: {version}" for engine, version in versions.items()),
        f"others used at most {loudest:.2f} cores during a measurement",
        "",
        tables(runs, limits_by_precision),
    ])  # fmt: skip


def processor() -> str:
    """The name of the processor, and which of the instructions that matter here it has."""
    text = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(named.get("flags", "").split())
    has = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{named.get('model name', 'unknown processor')} ({', '.join(has) or 'no vector instructions known here'})"


if __name__ == "__main__":
    sys.exit(exit_code(main))
