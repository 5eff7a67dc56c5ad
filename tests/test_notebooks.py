"""Notebooks run from top to bottom, offline, in their own kernels, and reproduce their stored outputs."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from tests.notebooks import FOLDER, differences, execute, printed, read

NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
MACHINE = re.compile(r"(?<![\w.:/<])/\w[\w.-]*/|site-packages|[A-Z]:\\|\d s\b| ms\b|images/s")
"""Absolute paths and durations, which depend on the machine."""


def executed(name: str) -> str:
    """Execute a notebook in the test's folder and return what it prints."""
    notebook = execute(name, Path.cwd())
    assert not differences(read(name), notebook)
    return "".join(map(printed, notebook.cells))


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs(name: str) -> None:
    """Outputs are stored, are small and do not depend on the machine."""
    notebook = read(name)
    nbformat.validate(notebook)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 200_000
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len(outputs) >= 3
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    for cell in notebook.cells:
        assert not MACHINE.search(printed(cell)), cell.id
        assert "execution" not in cell.metadata


@pytest.mark.parametrize(
    ("cell", "old", "new"),
    [("cell-03", "(1, 4, 8, 8)", "(1, 4, 8, 9)"), ("cell-09", "Look ", "See "), ("cell-09", "9", "1")],
)
def test_changed_outputs_are_detected(cell: str, old: str, new: str) -> None:
    notebook = read("own_loss")
    (changed,) = (each for each in notebook.cells if each.id == cell)
    changed.outputs[0].text = changed.outputs[0].text.replace(old, new)
    assert len(differences(notebook, read("own_loss"))) == 1


def figure(text: str, before: str) -> float:
    """Return the first number after some words."""
    return float(re.search(rf"{before} *(-?[\d.]+)", text)[1])


def test_all_notebooks_are_tested() -> None:
    tested = set(re.findall(r'executed\("(\w+)"\)', Path(__file__).read_text()))
    assert set(NAMES) == tested


def test_quick_start() -> None:
    shown = executed("quick_start")
    assert figure(shown, "distilled") > figure(shown, "alone")


def test_own_loss() -> None:
    shown = executed("own_loss")
    assert "adapter trains: True\nteacher trains: False\nlogits at equality: 0.0" in shown
    assert all(figure(shown, name) > 80 for name in ("KD", "Look"))


def test_what_a_student_learned() -> None:
    shown = executed("what_a_student_learned")
    assert figure(shown, "distilled +accuracy [^K]*KL") < figure(shown, "alone +accuracy [^K]*KL")
    stages = re.findall(r"stage by stage: ([\d., ]+)", shown)
    assert len(stages) == 2
    assert all(0 < float(value) <= 1 for line in stages for value in line.split(","))


def test_temperature_and_weight() -> None:
    shown = executed("temperature_and_weight")
    assert "8 trials: 8 complete" in shown
    assert figure(shown, "8 trials, the best") >= figure(shown, "the worst")
    assert "test/agreement" in shown


def test_segmentation() -> None:
    shown = executed("segmentation")
    assert figure(shown, "teacher ") > figure(shown, "distilled ") > figure(shown, "alone ")
