"""Losses and gradients against values that the original implementations gave.

`LKD_FIXTURES=<folder>` reads another folder of the same layout: every file and case in it of a method that lkd has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lkd import Batch, DistillModule
from lkd.losses import KD, DistillLoss

FOLDER = Path(os.environ.get("LKD_FIXTURES", Path(__file__).parent / "reference"))


class Given(nn.Module):
    """A network that answers what stands in the fixture."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, input: dict[str, Tensor]) -> Tensor:
        return input[self.name]


def _hinton(inputs: dict[str, Tensor], hyper: dict[str, float]) -> dict[str, Tensor]:
    return _module(KD(hyper["temperature"]), inputs, hyper["kd_weight"], hyper["ce_weight"])


def _module(criterion: DistillLoss, inputs: dict[str, Tensor], distill: float, hard: float) -> dict[str, Tensor]:
    """The criterion and the cross-entropy as DistillModule weighs them."""
    student, teacher = Given("student_logits"), Given("teacher_logits")
    module = DistillModule(student, teacher, criterion, distill_weight=distill, hard_weight=hard)
    _, terms = module.losses(Batch(inputs, inputs["target"]))
    return {
        "loss": terms[criterion.name] / distill,
        "ce": terms["hard"] / hard,
        "weighted": torch.stack(list(terms.values())).sum(),
    }


METHODS: dict[str, Callable[[dict[str, Tensor], dict[str, float]], dict[str, Tensor]]] = {"kd": _hinton}


def _cases() -> list[tuple[Path, str]]:
    cases = []
    for method in METHODS:
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
    for output, value in METHODS[path.stem](inputs, meta["cases"][case]["hyperparameters"]).items():
        torch.testing.assert_close(value, tensors[f"{case}.expected.{output}"], rtol=1e-10, atol=1e-14)
        grads = torch.autograd.grad(value, [inputs[name] for name in wanted], retain_graph=True)
        for name, grad in zip(wanted, grads, strict=True):
            expected = tensors[f"{case}.expected.grad.{output}.{name}"]
            torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


def test_there_are_cases() -> None:
    assert _cases(), f"no file in {FOLDER} is of a method that lkd has"
