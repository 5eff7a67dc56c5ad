"""Every criterion in two processes: equal afterwards, and with the gradient of one where that is promised."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.losses.processes import table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, bool]]:
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.losses.processes", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", table())
def test_two_processes(name: str, found: dict[str, dict[str, bool]]) -> None:
    case = table()[name]
    promised = {"equal": True, "gradient of one process": case.batch_mean, "memories of one process": case.memories}
    assert found[name] == {what: True for what, is_promised in promised.items() if is_promised}
