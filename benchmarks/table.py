"""The measured runs as one table of plain text: medians, ratios, goals and the machine's limit."""

from statistics import median

OURS = "ours"
# Ours over the peer, at least: (part, peer, precision, rows) -> ratio.
GOALS = {
    ("chain", "transformers", "float32", 32): 6.0,
    ("chain", "llama.cpp", "float32", 32): 1.0,
    ("chain", "llama.cpp", "bfloat16", 32): 1.0,
    ("plain", "transformers", "float32", 1): 2.0,
    ("plain", "transformers", "float32", 8): 2.0,
    ("plain", "transformers", "float32", 32): 2.0,
    ("plain", "tunix", "float32", 1): 1.2,
    ("plain", "tunix", "float32", 8): 1.4,
    ("plain", "tunix", "float32", 32): 1.8,
    ("plain", "llama.cpp", "float32", 8): 1.0,
    ("plain", "llama.cpp", "float32", 32): 1.0,
}


def chain_speed(run: dict) -> float:
    """Rows a second, the whole work."""
    return run["rows"] / run["seconds"]


def plain_speed(point: dict) -> float:
    """Generated tokens a second, prefill included."""
    return point["rows"] * point["new_tokens"] / point["seconds"]


def step_milliseconds(point: dict) -> float:
    """A decoding step, prefill and first token taken off."""
    return 1000 * (point["seconds"] - point["first_seconds"]) / (point["new_tokens"] - 1)


def medians(runs: list[dict], part: str, precision: str) -> dict[str, dict]:
    """Engine -> rows -> {"speed", "step" (plain only), "times" (how often measured), "spread" of the speed}.

    Spread: (largest - smallest) / median.
    """
    found: dict[str, dict] = {}
    for run in runs:
        if (run["part"], run["precision"]) == (part, precision) and "failed" not in run:
            for point in run["points"] if part == "plain" else [run]:
                speed = plain_speed(point) if part == "plain" else chain_speed(point)
                at = found.setdefault(run["engine"], {}).setdefault(point["rows"], {"speeds": [], "steps": []})
                at["speeds"].append(speed)
                if part == "plain":
                    at["steps"].append(step_milliseconds(point))
    return {
        engine: {rows: _middle(at["speeds"], at["steps"]) for rows, at in by_rows.items()}
        for engine, by_rows in found.items()
    }


def _middle(speeds: list[float], steps: list[float]) -> dict:
    middle = {"speed": median(speeds), "times": len(speeds), "spread": (max(speeds) - min(speeds)) / median(speeds)}
    return middle | ({"step": median(steps)} if steps else {})


def tables(runs: list[dict], limits: dict) -> str:
    """All tables. `limits`: precision -> rows -> milliseconds a step at which the machine ends."""
    blocks = []
    for part, title in (("chain", "Critique-revision chain, whole work"), ("plain", "Plain decoding")):
        for precision in ("float32", "bfloat16"):
            if found := medians(runs, part, precision):
                blocks.append("\n".join([f"{title}, {precision}", *_lines(found, part, precision, limits)]))
    failed = [run for run in runs if "failed" in run]
    return "\n\n".join([*blocks, *("failed: {engine}, {part}, {precision}: {failed}".format(**run) for run in failed)])


def _lines(found: dict, part: str, precision: str, limits: dict) -> list[str]:
    unit = "rows/s" if part == "chain" else "tokens/s"
    cells = [("rows", "engine", unit, "ms a step", "ours / it", "goal", "spread", "n")]
    for rows in sorted({rows for by_rows in found.values() for rows in by_rows}):
        ours = found.get(OURS, {}).get(rows)
        for engine, by_rows in found.items():
            if at := by_rows.get(rows):
                goal = GOALS.get((part, engine, precision, rows))
                cells.append((
                    str(rows), engine, f"{at['speed']:.4f}" if part == "chain" else f"{at['speed']:.1f}",
                    f"{at['step']:.1f}" if "step" in at else "",
                    f"{ours['speed'] / at['speed']:.2f}" if ours and engine != OURS else "",
                    f"{goal:.1f}" if goal else "", f"{at['spread']:.0%}", str(at["times"]),
                ))  # fmt: skip
        if part == "plain" and rows in limits.get(precision, {}):
            cells.append((str(rows), "machine's limit", "", f"{limits[precision][rows]:.1f}", "", "", "", ""))
    return aligned(cells)


def aligned(cells: list[tuple[str, ...]]) -> list[str]:
    """Columns of equal width: names on the left, numbers on the right."""
    columns = []
    for column in zip(*cells, strict=True):
        width = max(map(len, column))
        columns.append([text.ljust(width) if column[0] == "engine" else text.rjust(width) for text in column])
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
