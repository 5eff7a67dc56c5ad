"""KD: knowledge distillation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lkd import Batch, Outputs
from lkd.losses import KD
from tests.losses import parity
from tests.losses.cases import LogitCase
from tests.losses.parity import Hyper, Values

CASES = {
    "KD": LogitCase(KD),
    "KD-1": LogitCase(lambda: KD(temperature=1.0)),
}


def _kd(inputs: Values, hyper: Hyper) -> Values:
    return parity.weighted(KD(hyper["temperature"]), inputs, hyper["kd_weight"], hyper["ce_weight"])


PARITY = {"kd": _kd}


def _value(temperature: float, student: Tensor, teacher: Tensor) -> Tensor:
    return KD(temperature)(Outputs(student, {}), Outputs(teacher, {}), Batch(None, None))


def test_kd_by_its_definition(logits) -> None:
    """Compute the definition term by term."""
    total = 0.0
    for ours, theirs in zip(*logits, strict=True):
        q, p = ((row / 4).exp() / (row / 4).exp().sum() for row in (ours, theirs))
        total += sum(float(p[c] * (p[c].log() - q[c].log())) for c in range(5))
    assert _value(4.0, *logits).item() == pytest.approx(16 * total / 8, rel=1e-12)


def test_gradient_does_not_depend_on_the_temperature() -> None:
    """For small logits, the factor T² makes the gradient independent of the temperature."""
    student, teacher = torch.tensor([[1e-3, 0, 0]], dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    grads = []
    for temperature in (2.0, 20.0):
        logits = student.clone().requires_grad_()
        _value(temperature, logits, teacher).backward()
        grads.append(logits.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        KD(temperature)
