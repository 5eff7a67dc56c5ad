"""Every criterion in several processes: equal afterwards, and with the gradient of one where that is promised.

Two processes; `LKD_PROCESSES=4 pytest tests/losses/test_processes.py` takes four.
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
    """The gradient differs where it is not a mean over the images, or one over those that have a label."""
    case, here = table()[name], found[name]
    assert here["equal"]
    assert here["memories"]
    as_one = {"all": case.batch_mean, "few": case.batch_mean and case.criterion().skips_unlabelled is False}
    for labels, promised in as_one.items():
        assert here[labels] < EQUAL if promised else here[labels] > DIFFERENT


def test_what_is_listed_is_so(found: dict[str, dict[str, Any]]) -> None:
    """The README's column: as one means equal in every form; what each process does by itself, different in one."""
    differences: dict[tuple[type, str], list[float]] = {}
    for name, case in table().items():
        criterion = case.criterion()
        differences.setdefault((type(criterion), criterion.per_process), []).append(found[name]["all"])
    for (_, per_process), values in differences.items():
        assert max(values) > DIFFERENT if per_process else max(values) < EQUAL
