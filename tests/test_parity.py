"""Comparison of losses and gradients with values of the original implementations.

`LKD_FIXTURES=<folder>` selects another folder with the same layout; all its cases of lkd's methods are compared.
`PARITY` in a method's tests (tests/losses/methods/) maps the tensors of a file to the values of lkd's classes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.losses.collected import PARITY

FOLDER = Path(os.environ.get("LKD_FIXTURES", Path(__file__).parent / "reference"))


def _cases() -> list[tuple[Path, str]]:
    cases = []
    for method in PARITY:
        path = FOLDER / f"{method}.safetensors"
        if path.is_file():
            with safe_open(path, "pt") as file:
                cases += [(path, case) for case in json.loads(file.metadata()["meta"])["cases"]]
    return cases


@pytest.mark.parametrize(("path", "case"), _cases(), ids=lambda value: getattr(value, "stem", value))
def test_equals_the_original(path: Path, case: str) -> None:
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith(f"{case}.")}  # noqa: SIM118
    prefix = f"{case}.input."
    inputs = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    wanted = meta["cases"][case]["grad_wrt"]
    for name in wanted:
        inputs[name].requires_grad_()
    values = PARITY[path.stem](inputs, meta["cases"][case]["hyperparameters"])
    compared = [output for output in values if f"{case}.expected.{output}" in tensors]
    assert compared, f"{path} has none of {sorted(values)}"
    for output in compared:
        torch.testing.assert_close(values[output], tensors[f"{case}.expected.{output}"], rtol=1e-10, atol=1e-14)
        if values[output].dim():  # the files contain gradients of scalars only
            continue
        given = [inputs[name] for name in wanted]
        grads = [torch.zeros_like(tensor) for tensor in given]  # of values that were only stored
        if values[output].requires_grad:
            grads = torch.autograd.grad(values[output], given, retain_graph=True, materialize_grads=True)
        for name, grad in zip(wanted, grads, strict=True):  # a gradient that is missing in the file is 0
            expected = tensors.get(f"{case}.expected.grad.{output}.{name}", torch.zeros_like(grad))
            torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


def test_cases_exist() -> None:
    assert _cases(), f"no file in {FOLDER} is of a method that lkd has"


def test_every_file_is_compared() -> None:
    """The exceptions are the weights of a network, and KDSVD, whose tests choose the signs of the singular vectors."""
    files = (Path(__file__).parent / "reference").glob("*.safetensors")
    assert {path.stem for path in files} - set(PARITY) == {"akamaster_resnet20", "kdsvd"}
