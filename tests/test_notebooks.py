"""The notebooks run from top to bottom, offline."""

from __future__ import annotations

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "notebooks"


def test_quick_start(capsys) -> None:
    names: dict[str, object] = {}
    notebook = json.loads((FOLDER / "quick_start.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), "quick_start.ipynb", "exec"), names)
    shown = capsys.readouterr().out
    alone, distilled = (float(re.search(rf"{name} +([\d.]+)%", shown)[1]) for name in ("alone", "distilled"))
    assert distilled > alone
