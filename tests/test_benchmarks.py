"""The benchmarks' own code; that they run is seen by running them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def methods():
    spec = importlib.util.spec_from_file_location("methods", FOLDER / "methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_schedules_shrink_with_the_run(methods) -> None:
    (warmup,) = methods.overlay("dkd", epochs=24)["trainer"]["callbacks+"]
    assert warmup["init_args"]["epochs"] == 2
    (warmup,) = methods.overlay("dkd", epochs=5)["trainer"]["callbacks+"]
    assert warmup["init_args"]["epochs"] == 1


def test_gains_are_those_of_the_same_seeds(methods) -> None:
    runs = [(methods.ALONE, 0, 40.0), (methods.ALONE, 1, 44.0), ("kd", 0, 43.0), ("kd", 1, 45.0), ("at", 1, 42.0)]
    results = [{"method": name, "seed": seed, "accuracy": accuracy} for name, seed, accuracy in runs]
    results.append({"method": "skd", "seed": 0, "error": "no"})
    _, _, *rows = methods.table(results)
    assert rows == [
        "| kd | 44.00 | 1.41 | 2 | +2.00 |",
        "| (student alone) | 42.00 | 2.83 | 2 | +0.00 |",
        "| at | 42.00 | - | 1 | -2.00 |",
        "| skd | failed | | | |",
    ]


def test_every_method_has_its_row(methods) -> None:
    """What was measured is every overlay but those that are left out."""
    table = (FOLDER / "methods.md").read_text()
    measured = {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")} - {"method"}
    overlays = {path.stem for path in methods.METHODS.glob("*.yaml")} - set(methods.LEFT_OUT)
    assert measured == overlays | {methods.ALONE}
