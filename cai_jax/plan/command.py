"""`--plan` at the door: measure, print, write, refuse."""

import json
import sys
from pathlib import Path

from cai_jax.accelerators import ACCELERATORS, Accelerator, Slice, parse_slice
from cai_jax.config import Config
from cai_jax.errors import UserError
from cai_jax.plan.topology import check_compiler, set_environment


def plan_run(name: str, config: Config, target: str, json_path: str | None, price: float | None) -> None:
    """Print the plan of a config on `target`: a slice (`v4-32`), or a chip (`v4`) for the smallest slice that holds it.

    Raises UserError, after the table, for a run that does not fit, with the nearest change that does.
    """
    chip = ACCELERATORS.get(target.strip().lower())
    wanted: Accelerator | Slice = chip or parse_slice(target)
    platform = chip.platform if chip else wanted.chip.platform
    check_compiler(target, platform)
    if price is not None and not price >= 0:
        raise UserError(f"--price={price}: give the price of one chip and hour, at least 0")
    if json_path and not Path(json_path).expanduser().absolute().parent.is_dir():
        raise UserError(f"--plan_json={json_path}: there is no such folder; make it, or name another")
    set_environment()
    # These import JAX, which reads the environment.
    from cai_jax.plan.measure import Measurer
    from cai_jax.plan.plan import find_change, make_plan, smallest_plan
    from cai_jax.plan.table import as_json, as_text, refusal

    measurer = Measurer(platform == "tpu", lambda line: print(line, file=sys.stderr, flush=True))
    plan = smallest_plan(config, chip, measurer) if chip else make_plan(config, wanted, measurer)
    print(as_text(name, plan, price), flush=True)
    found = find_change(plan, measurer) if plan.too_large else None
    if json_path:
        Path(json_path).expanduser().write_text(json.dumps(as_json(name, plan, price, found), indent=1) + "\n")
    if plan.too_large:
        raise UserError(refusal(plan, found))
