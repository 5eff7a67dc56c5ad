"""The notebooks run from top to bottom, offline, in a kernel of their own."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"


def executed(name: str) -> str:
    """What a notebook prints; its folder is the test's."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(Path.cwd())}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")


def figure(text: str, before: str) -> float:
    """The first number behind some words."""
    return float(re.search(rf"{before} *(-?[\d.]+)", text)[1])


def test_all_notebooks_are_tested() -> None:
    names = {path.stem for path in FOLDER.glob("*.ipynb")}
    tested = set(re.findall(r'executed\("(\w+)"\)', Path(__file__).read_text()))
    assert names == tested


def test_quick_start() -> None:
    shown = executed("quick_start")
    assert figure(shown, "distilled") > figure(shown, "alone")


def test_own_loss() -> None:
    shown = executed("own_loss")
    assert "adapter trains: True\nteacher trains: False\nlogits at equality: 0.0" in shown
    assert all(figure(shown, name) > 80 for name in ("KD", "Look"))


def test_what_a_student_learned() -> None:
    shown = executed("what_a_student_learned")
    assert figure(shown, "distilled +right [^K]*KL") < figure(shown, "alone +right [^K]*KL")
    stages = re.findall(r"stage by stage: ([\d., ]+)", shown)
    assert len(stages) == 2
    assert all(0 < float(value) <= 1 for line in stages for value in line.split(","))


def test_temperature_and_weight() -> None:
    shown = executed("temperature_and_weight")
    assert "8 trials: 8 complete" in shown
    assert figure(shown, "8 trials, the best") >= figure(shown, "the worst")
    assert "test/agreement" in shown
