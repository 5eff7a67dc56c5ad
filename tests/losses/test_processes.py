"""Every criterion in several processes: equal states, and the gradient of one process where this is guaranteed.

There are two processes; `LKD_PROCESSES=4 pytest tests/losses/test_processes.py` runs four.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.warm import ranks
from tests.losses.processes import PROCESSES, table, work

EQUAL, DIFFERENT = 1e-10, 1e-3


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    for done in ranks(PROCESSES, work, str(folder)):
        assert done.code == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", table())
def test_several_processes(name: str, found: dict[str, dict[str, Any]]) -> None:
    """The gradient of one process is guaranteed only for means over all images, or over all labelled images."""
    case, here = table()[name], found[name]
    assert here["equal"]
    assert here["memories"]
    as_one = {"all": case.batch_mean, "few": case.batch_mean and case.criterion().skips_unlabelled is False}
    for labels, promised in as_one.items():
        assert here[labels] < EQUAL if promised else here[labels] > DIFFERENT


def test_per_process_matches_the_gradients(found: dict[str, dict[str, Any]]) -> None:
    """The method table's column `per_process` is filled exactly for criteria whose gradient differs in some case."""
    differences: dict[tuple[type, str], list[float]] = {}
    for name, case in table().items():
        criterion = case.criterion()
        differences.setdefault((type(criterion), criterion.per_process), []).append(found[name]["all"])
    for (_, per_process), values in differences.items():
        assert max(values) > DIFFERENT if per_process else max(values) < EQUAL
