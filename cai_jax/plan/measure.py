"""Bytes of a program on one chip: by the compiler where there is one, else by arithmetic."""

import re
import time
from dataclasses import dataclass

import jax

from cai_jax.plan.programs import Program

COMPILER, ARITHMETIC = "compiler", "arithmetic"


@dataclass(frozen=True)
class Memory:
    """Bytes a chip. `outputs` are those that take no argument's place; `seconds` is what compiling took."""

    arguments: int
    outputs: int
    temporaries: int
    source: str  # compiler | arithmetic
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """What the program needs while it runs."""
        return self.arguments + self.outputs + self.temporaries


class Measurer:
    """Measures programs, each once. Without a compiler all is arithmetic."""

    def __init__(self, compiles: bool, log=lambda line: None):
        self.compiles, self.log = compiles, log
        self._measured: dict[tuple, Memory] = {}

    def of(self, program: Program) -> Memory:
        """The bytes of a program, compiled at the first asking."""
        if not self.compiles:
            return by_arithmetic(program)
        if program.key not in self._measured:
            start = time.monotonic()
            memory = compiled(program)
            self._measured[program.key] = memory
            self.log(f"{program.stage}: {program.name}: compiled in {time.monotonic() - start:.0f} s")
        return self._measured[program.key]

    def guess(self, program: Program, like: dict[tuple[str, str], float]) -> Memory:
        """The bytes of a program without compiling it: measured before, or arithmetic times what the compiler made of
        it for the same stage and name in another form of the run (`like`)."""
        if program.key in self._measured:
            return self._measured[program.key]
        memory = by_arithmetic(program)
        scale = like.get((program.stage, program.name), 1.0)
        return Memory(memory.arguments, memory.outputs, int(memory.temporaries * scale), ARITHMETIC)


def by_arithmetic(program: Program) -> Memory:
    """Arguments and outputs from shapes and places, temporaries by the model in `arithmetic`."""
    return Memory(program.arguments, program.outputs, int(program.temporaries), ARITHMETIC)


def arrays_alone(program: Program) -> Memory:
    """What no compiler can go below: arguments and outputs."""
    return Memory(program.arguments, program.outputs, 0, ARITHMETIC)


def compiled(program: Program) -> Memory:
    """What the compiler reserves for a program.

    A program that does not fit the chip by itself is refused by the TPU compiler with a count of what it would use,
    arguments included; that count stands in for the analysis.
    """
    start = time.monotonic()
    try:
        analysis = program.lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        used = _used(str(error))
        if used is None:
            raise
        rest = max(0, used - program.arguments - program.outputs)
        return Memory(program.arguments, program.outputs, rest, COMPILER, time.monotonic() - start)
    return Memory(
        analysis.argument_size_in_bytes,
        max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        analysis.temp_size_in_bytes,
        COMPILER,
        time.monotonic() - start,
    )


def _used(message: str) -> int | None:
    """Bytes of `Used 41.52G of 30.75G hbm` or `HLO temporaries (41.52G) exceeds available HBM`, else None."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    found = found or re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
    return found and int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))
