"""Tune a method's settings on validation images, with `lkd sweep` on the first seed."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results.cell import arguments, enter
from benchmarks.results.plan import Cell, Config, Plan, Row
from benchmarks.results.store import Store
from benchmarks.results.work import Clock, in_process
from lkd.io.yaml import load_yaml

_STUDY = "sweep"
_WEIGHT = "model.init_args.distill_weight"


def tune(
    plan: Plan, rows: Sequence[Row], method: str, trials: int, store: Store, data: Path | None, clock: Clock
) -> int:
    """Search the settings of a method for each pair and recipe; the best ones are reported in an additional row.

    The search space is that of the plan for this method; by default, the distillation weight from a tenth to ten times
    its value. An interrupted study is continued.

    Args:
        plan: The plan.
        rows: Its rows.
        method: The method's name.
        trials: Number of trials for each pair and recipe.
        store: The store.
        data: Folder of the images; `None` uses that of the config.
        clock: The time limit.

    Returns:
        The exit code: 0, also if the time limit is reached, or that of a failed sweep.

    Raises:
        ValueError: If the plan does not contain the method or a teacher is missing.
    """
    if method not in plan.methods:
        raise ValueError(f"--tune requires a method of the plan ({', '.join(plan.methods)}), got {method!r}")
    code = 0
    for cell in (row.cells[0] for row in rows if row.method == method):
        if not store.is_ready(cell):
            raise ValueError(f"{cell.teacher} is not finished; train it before tuning its students")
        with store.claimed(f"{cell.id}-{_STUDY}") as is_free:
            if is_free and not clock.is_over and cell.id not in store.tuned():
                space = plan.methods[method].space or _default_space(cell)
                failed = in_process(_sweep, (cell, space, trials, store, data), clock)
                if failed and not clock.is_over:
                    print(f"{cell.id}: failed with exit code {failed}: see {store.run(cell.id)}/{_STUDY}.txt")
                code = failed or code
            elif cell.id in store.tuned():
                print(f"{cell.id}: already tuned; delete {store.folder}/tuned/{cell.id}.json to repeat it")
    return 0 if clock.is_over else code


def _default_space(cell: Cell) -> Config:
    weights = [weight for config in cell.configs if (weight := _weight(config)) is not None]
    return {_WEIGHT: {"low": 0.1 * weights[-1], "high": 10 * weights[-1], "log": True}}


def _weight(config: Config) -> float | None:
    weight = config.get("model", {}).get("init_args", {}).get("distill_weight")
    return None if weight is None else float(weight)


def _sweep(cell: Cell, space: Config, trials: int, store: Store, data: Path | None) -> None:
    """Run the sweep and write the settings of the best trial. Must run in its own process."""
    from lkd.sweep import main

    enter(store, store.run(cell.id) / f"{_STUDY}.txt")
    root = [] if data is None else [f"--data.init_args.root={data}"]
    searched = [f"--space.{name}={json.dumps(values)}" for name, values in space.items()]
    main([*arguments(cell, Path("runs") / cell.id), *root, *searched, f"--trials={trials}", f"--study={_STUDY}"])
    best = _best(store.run(cell.id) / _STUDY / "trials.csv", list(space))
    store.save("tuned", cell.id, {"cell": cell.id, "method": cell.method, "space": space, **best})


def _best(table: Path, names: list[str]) -> dict[str, Any]:
    """Read the settings and the validation accuracy of the best trial."""
    with table.open(newline="") as file:
        trials = [row for row in csv.DictReader(file) if row["state"] == "complete"]
    best = max(trials, key=lambda row: float(row["value"]))
    settings = {name: load_yaml(best[name]) for name in names}
    return {"settings": settings, "val": 100 * float(best["value"]), "trials": len(trials)}
