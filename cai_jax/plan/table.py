"""A plan as a table for people and as JSON for programs."""

import dataclasses

from cai_jax.accelerators import GIB
from cai_jax.plan.measure import COMPILER
from cai_jax.plan.mend import as_flags
from cai_jax.plan.plan import EXPECTED_SHARE_OF_PEAK, Line, Plan

_HEADER = ("program", "arguments", "temporaries", "beside", "total", "TFLOP", "ms", "bound by", "calls")


def as_text(name: str, plan: Plan, price: float | None) -> str:
    """The table, the shares, and what is whose number. `price` is that of one chip and hour."""
    piece, chip = plan.piece, plan.piece.chip
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    rows = [_HEADER, *(_cells(line, chip.usable) for line in plan.lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]
    machines = f"{piece.machines} machine{'s' if piece.machines > 1 else ''}"
    return "\n".join([
        f"{name} on {piece.name}: {piece.chips} chips on {machines}, {chip.usable / GIB:.1f} of "
        f"{chip.memory / GIB:.1f} GiB a chip to plan with, mesh {mesh}",
        *(f"  {field}: {shape.n_layers} layers of {shape.d_model}, {known}" for field, (shape, known) in
          plan.models.items()),
        "",
        "GiB a chip; TFLOP of all chips and ms at the published peaks, a call",
        *aligned,
        "",
        *_time(plan, price),
        "",
        *_sources(plan),
    ])  # fmt: skip


def as_json(name: str, plan: Plan, price: float | None, change) -> dict:
    """The plan in plain values. Bytes are those of one chip, FLOPs those of all, times are at the published peaks."""
    chip = plan.piece.chip
    return {
        "config": name,
        "slice": {
            "name": plan.piece.name, "chips": plan.piece.chips, "machines": plan.piece.machines, "mesh": plan.mesh,
        },
        "chip": dataclasses.asdict(chip),
        "limit_bytes": chip.usable,
        "fits": not plan.too_large,
        "models": {field: {"source": known, **dataclasses.asdict(shape)} for field, (shape, known) in
                   plan.models.items()},
        "programs": [_line(line, chip.usable) for line in plan.lines],
        "stages": {
            stage: {"hours_at_peak": plan.seconds(stage) / 3600, "shares": plan.shares(stage)}
            for stage in _stages(plan)
        },
        "total": {
            "hours_at_peak": plan.seconds() / 3600,
            "hours_expected": _expected_hours(plan),
            "expected_share_of_peak": EXPECTED_SHARE_OF_PEAK,
            "shares": plan.shares(),
            "tokens": plan.tokens,
            "tokens_per_second_expected": plan.tokens / max(_expected_hours(plan) * 3600, 1e-9),
            "price_per_chip_hour": price,
            "cost_expected": None if price is None else _cost(plan, price),
        },
        "change": change and {
            "set": list(change[0][0]), "slice": change[0][1].name, "largest_bytes": _largest(change[1]).total,
        },
        "sources": {
            "bytes": sorted({line.memory.source for line in plan.lines}),
            "flops": "arithmetic",
            "seconds": "arithmetic from published peaks",
        },
        "assumptions": list(plan.assumptions),
    }  # fmt: skip


def refusal(plan: Plan, found) -> str:
    """What does not fit, and the nearest change with which everything does, in one line."""
    worst = max(plan.too_large, key=lambda line: line.total)
    what = (
        f"{plan.piece.name}: {worst.program.stage}, {worst.program.name} needs {gib(worst.total)} a chip and "
        f"{gib(plan.piece.chip.usable)} are there"
    )
    if found is None:
        return f"{what}: no change that was tried fits; take a smaller model"
    change, mended = found
    largest = _largest(mended)
    return (
        f"{what}: {as_flags(change, plan.piece)} fits, with {gib(largest.total)} at most ({largest.program.name}, "
        f"by the {largest.memory.source})"
    )


def gib(count: float) -> str:
    """2.00 GiB"""
    return f"{count / GIB:.2f} GiB"


def _cells(line: Line, usable: int) -> tuple[str, ...]:
    program, memory = line.program, line.memory
    over = " !" if line.total > usable else ""
    mark = "" if memory.source == COMPILER else "~"
    return (
        f"{program.stage}: {program.name}", f"{memory.arguments / GIB:.2f}",
        f"{mark}{(memory.temporaries + memory.outputs) / GIB:.2f}", f"{program.resident / GIB:.2f}",
        f"{line.total / GIB:.2f}{over}", _short(program.work.flops / 1e12), _short(line.seconds * 1e3), line.bound,
        f"{program.calls:,.0f}",
    )  # fmt: skip


def _short(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def _time(plan: Plan, price: float | None) -> list[str]:
    lines = []
    for stage in _stages(plan):
        shares = ", ".join(f"{share} {part:.0%}" for share, part in plan.shares(stage).items() if part)
        lines.append(f"{stage}: {_hours(plan.seconds(stage) / 3600)} at peak ({shares})")
    hours = _expected_hours(plan)
    lines.append(
        f"expected, at {EXPECTED_SHARE_OF_PEAK:.0%} of the peaks: {_hours(hours)}, "
        f"{plan.tokens / max(hours * 3600, 1e-9):,.0f} tokens/s"
        + (f", cost {_cost(plan, price):,.0f} at {price:g} a chip and hour" if price is not None else "")
    )
    return lines


def _sources(plan: Plan) -> list[str]:
    by_compiler = any(line.memory.source == COMPILER for line in plan.lines)
    whose = (
        "arguments and temporaries are the TPU compiler's (where marked ~, arithmetic)" if by_compiler else
        "all bytes are arithmetic (marked ~ where they are a model of what XLA holds): no compiler for this chip here"
    )  # fmt: skip
    return [
        f"whose numbers: {whose}; beside (what the stage holds while the program runs), FLOPs and times are "
        "arithmetic. Nothing was run.",
        *(f"assumed: {assumption}" for assumption in plan.assumptions),
    ]


def _line(line: Line, usable: int) -> dict:
    program, memory = line.program, line.memory
    return {
        "stage": program.stage,
        "name": program.name,
        "share": program.share,
        "arguments_bytes": memory.arguments,
        "outputs_bytes": memory.outputs,
        "temporaries_bytes": memory.temporaries,
        "beside_bytes": program.resident,
        "total_bytes": line.total,
        "fits": line.total <= usable,
        "bytes_source": memory.source,
        "compile_seconds": memory.seconds,
        "flops": program.work.flops,
        "memory_bytes_moved": program.work.memory,
        "link_bytes_moved": program.work.link,
        "seconds_at_peak": line.seconds,
        "bound": line.bound,
        "calls": program.calls,
    }


def _stages(plan: Plan) -> list[str]:
    return list(dict.fromkeys(line.program.stage for line in plan.lines))


def _largest(plan: Plan) -> Line:
    return max(plan.lines, key=lambda line: line.total)


def _expected_hours(plan: Plan) -> float:
    return plan.seconds() / 3600 / EXPECTED_SHARE_OF_PEAK


def _cost(plan: Plan, price: float) -> float:
    return _expected_hours(plan) * plan.piece.chips * price


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
