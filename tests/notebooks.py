"""Run the notebooks; `python -m tests.notebooks [NAME ...]` stores their outputs."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
DETERMINISTIC = "deterministic"
"""Tag of a cell whose output is the same on every machine."""

_ANSI = re.compile(r"\x1b\[[\d;]*m")
_RESULT = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?|\b(yes|no)\b")
_PERCENT = re.compile(r"(-?\d+(?:\.\d+)?) ?%")


def read(name: str) -> Any:
    """Return a stored notebook."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(name: str, folder: Path) -> Any:
    """Run a notebook in a separate kernel.

    Args:
        name: Name of the notebook.
        folder: Working directory of the kernel.

    Returns:
        The notebook with its new outputs, except for those to stderr.
    """
    notebook = read(name)
    metadata = dict(notebook.metadata)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, record_timing=False, resources=resources).execute()
    notebook.metadata = nbformat.from_dict(metadata)  # without the Python version of this environment
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _merged(cell.outputs)
    return notebook


def _merged(outputs: Sequence[Any]) -> list[Any]:
    """Merge consecutive printed outputs, because a kernel splits them depending on timing."""
    merged: list[Any] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if merged and output.output_type == merged[-1].output_type == "stream":
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def printed(cell: Any) -> str:
    """Return the text and Markdown that a cell displays."""
    outputs = cell.get("outputs", [])
    texts = [output.get("text") or output.get("data", {}).get("text/markdown", "") for output in outputs]
    return _ANSI.sub("", "".join(texts)).replace("\r\n", "\n")


def differences(stored: Any, fresh: Any) -> list[str]:
    """Return the differences between stored and new outputs.

    Types of outputs and words must be equal. Percentages may differ by 3 percentage points, because results depend on
    the processor. Cells tagged `deterministic` must print the same text. Images are not compared.
    """
    found = []
    for old, new in zip(stored.cells, fresh.cells, strict=True):
        texts = printed(old), printed(new)
        words = [re.sub(r"[\s━─]+", " ", _RESULT.sub("#", text)) for text in texts]
        shares = [[float(number) for number in _PERCENT.findall(text)] for text in texts]
        equal = _kinds(old) == _kinds(new) and words[0] == words[1]
        equal = equal and all(abs(one - other) <= 3 for one, other in zip(*shares, strict=True))
        if not equal or (DETERMINISTIC in old.metadata.get("tags", []) and texts[0] != texts[1]):
            found.append(f"{old.id} shows\n{texts[1]}\nand stored is\n{texts[0]}")
    return found


def _kinds(cell: Any) -> list[Any]:
    return [(output.output_type, sorted(output.get("data", ()))) for output in cell.get("outputs", [])]


if __name__ == "__main__":
    for each in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as temporary:
            nbformat.write(execute(each, Path(temporary)), FOLDER / f"{each}.ipynb")
