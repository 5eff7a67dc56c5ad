"""The cases and reference values of all methods, collected from their test files (tests/losses/methods/)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.losses.cases import FeatureCase, LogitCase
from tests.losses.parity import Reference

FILES: dict[str, ModuleType] = {
    path.stem.removeprefix("test_"): import_module(f"tests.losses.methods.{path.stem}")
    for path in sorted((Path(__file__).parent / "methods").glob("test_*.py"))
}
"""Test module of each method, by the name of the method's file."""


def _collected(attribute: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method, file in FILES.items():
        own = vars(file).get(attribute, {})
        if twice := found.keys() & own.keys():
            raise ValueError(f"{attribute} of test_{method}.py has {sorted(twice)} as another file has; rename them")
        found |= own
    return found


CASES: dict[str, FeatureCase | LogitCase] = _collected("CASES")
FEATURE_CASES = {name: case for name, case in CASES.items() if isinstance(case, FeatureCase)}
LOGIT_CASES = {name: case for name, case in CASES.items() if isinstance(case, LogitCase)}
PARITY: dict[str, Reference] = _collected("PARITY")
"""Functions that compute lkd's values, by the name of the file of reference values without its extension."""
