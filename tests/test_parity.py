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
from torch.func import functional_call

from lkd import Batch, DistillModule, Outputs, Probe
from lkd.callbacks import Schedule
from lkd.losses import (
    CTKD,
    DIST,
    DKD,
    KD,
    NKD,
    SKD,
    USKD,
    WSLD,
    DistillLoss,
    LogitStandardization,
    named_terms,
)

FOLDER = Path(os.environ.get("LKD_FIXTURES", Path(__file__).parent / "reference"))


class Given(nn.Module):
    """A network that answers what stands in the fixture."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, input: dict[str, Tensor]) -> Tensor:
        return input[self.name]


Values = dict[str, Tensor]
Hyper = dict[str, float]


def _module(criterion: DistillLoss, inputs: Values, distill: float = 1.0, hard: float = 1.0) -> Values:
    """The criterion and the cross-entropy as DistillModule weighs them."""
    student, teacher = Given("student_logits"), Given("teacher_logits")
    module = DistillModule(student, teacher, criterion, distill_weight=distill, hard_weight=hard)
    _, terms = module.losses(Batch(inputs, inputs["target"]))
    weighted = torch.stack(list(terms.values())).sum()
    return {"loss": (weighted - terms["hard"]) / distill, "ce": terms["hard"] / hard, "weighted": weighted}


def _terms(criterion: DistillLoss, inputs: Values, **parameters: Tensor) -> Values:
    """The criterion's terms, and their sum, with its parameters as given."""
    features = {layer: inputs[f"student_features.{number}"] for number, layer in enumerate(criterion.student_layers)}
    student = Outputs(inputs["student_logits"], features)
    teacher = Outputs(inputs.get("teacher_logits", student.logits), {})
    criterion.build(Probe(criterion, student), Probe(criterion, teacher))
    batch = Batch(None, inputs.get("target"))
    terms = named_terms("", functional_call(criterion, parameters, (student, teacher, batch)))
    return {**terms, "loss": torch.stack(list(terms.values())).sum()}


def _kd(inputs: Values, hyper: Hyper) -> Values:
    return _module(KD(hyper["temperature"]), inputs, hyper["kd_weight"], hyper["ce_weight"])


def _dkd(inputs: Values, hyper: Hyper) -> Values:
    warmup = Schedule("distill_weight", hyper["warmup_epochs"]).factor(hyper["epoch_for_weighted"] - 1)
    criterion = DKD(hyper["alpha"], hyper["beta"], hyper["temperature"])
    parts = _terms(DKD(1.0, 1.0, hyper["temperature"]), inputs)
    values = _module(criterion, inputs, distill=warmup, hard=hyper["ce_weight"])
    return {**values, "tckd": parts["target"], "nckd": parts["nontarget"]}


def _logit_std_kd(inputs: Values, hyper: Hyper) -> Values:
    temperature, eps = hyper["temperature"], hyper["eps"]
    criterion = LogitStandardization(KD(temperature), eps)
    dkd = LogitStandardization(DKD(hyper["dkd_alpha"], hyper["dkd_beta"], temperature), eps)
    values = _module(criterion, inputs, hyper["kd_weight"], hyper["ce_weight"])
    return {**values, "loss.dkd": _terms(dkd, inputs)["loss"]}


def _dist(inputs: Values, hyper: Hyper) -> Values:
    criterion = DIST(hyper["beta"], hyper["gamma"], hyper["tau"], hyper["eps"])
    parts = _terms(DIST(1.0, 1.0, hyper["tau"], hyper["eps"]), inputs)
    return {**_module(criterion, inputs), "inter": parts["inter"], "intra": parts["intra"]}


def _nkd(inputs: Values, hyper: Hyper) -> Values:
    criterion = NKD(hyper["gamma"], hyper["temperature"])
    return {**_module(criterion, inputs), "target_part": _terms(criterion, inputs)["target"]}


def _wsld(inputs: Values, hyper: Hyper) -> Values:
    values = _module(WSLD(hyper["temperature"]), inputs, distill=hyper["alpha"])
    return {"loss": values["weighted"] - values["ce"]}


def _ctkd(inputs: Values, hyper: Hyper) -> Values:
    criterion = CTKD(hyper["t_start"], hyper["t_end"], reversal=-hyper["lambda_"])
    return {"loss": _terms(criterion, inputs, theta=inputs["params.global_T"])["loss"]}


def _skd(inputs: Values, hyper: Hyper) -> Values:
    return _terms(SKD(hyper["temperature"], hyper["tikhonov"]), inputs)


def _uskd(inputs: Values, hyper: Hyper) -> Values:
    criterion = USKD("layer", hyper["alpha"], hyper["beta"], hyper["mu"])
    head = {f"head.{name}": inputs[f"params.fc.{name}"] for name in ("weight", "bias")}
    return {"loss": _terms(criterion, inputs, **head)["loss"]}


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {
    "kd": _kd,
    "dkd": _dkd,
    "logit_std_kd": _logit_std_kd,
    "dist": _dist,
    "nkd": _nkd,
    "wsld": _wsld,
    "ctkd_global": _ctkd,
    "skd": _skd,
    "uskd": _uskd,
}


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
    values = METHODS[path.stem](inputs, meta["cases"][case]["hyperparameters"])
    compared = [output for output in values if f"{case}.expected.{output}" in tensors]
    assert compared, f"{path} has none of {sorted(values)}"
    for output in compared:
        torch.testing.assert_close(values[output], tensors[f"{case}.expected.{output}"], rtol=1e-10, atol=1e-14)
        grads = torch.autograd.grad(
            values[output], [inputs[name] for name in wanted], retain_graph=True, materialize_grads=True
        )
        for name, grad in zip(wanted, grads, strict=True):  # a gradient that the file does not have is 0
            expected = tensors.get(f"{case}.expected.grad.{output}.{name}", torch.zeros_like(grad))
            torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


def test_there_are_cases() -> None:
    assert _cases(), f"no file in {FOLDER} is of a method that lkd has"
