"""CTKD: curriculum temperature for knowledge distillation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lkd import Batch, DistillLoss, Outputs, Probe
from lkd import functional as KF
from lkd.losses import CTKD, InstanceCTKD
from tests.losses import parity
from tests.losses.cases import FeatureCase, LogitCase
from tests.losses.parity import Hyper, Values

CASES = {
    "InstanceCTKD": FeatureCase(InstanceCTKD, zero_at_equality=True, batch_mean=True, lr=0.2),
    "CTKD": LogitCase(CTKD),
}


def _ctkd(inputs: Values, hyper: Hyper) -> Values:
    criterion = CTKD(hyper["t_start"], hyper["t_end"], reversal=-hyper["lambda_"])
    return {"loss": parity.terms(criterion, inputs, theta=inputs["params.global_T"])["loss"]}


PARITY = {"ctkd_global": _ctkd}


def _call(criterion: DistillLoss, student: Tensor, teacher: Tensor, target: Tensor | None = None):
    return criterion(Outputs(student, {}), Outputs(teacher, {}), Batch(None, target))


def test_ctkd_reverses_the_gradient_of_the_temperature(logits) -> None:
    def loss(theta: float, reversal: float = 1.0) -> tuple[float, float]:
        criterion = CTKD(min_temperature=2.0, temperature_range=6.0, reversal=reversal).double()
        torch.nn.init.constant_(criterion.theta, theta)
        value = _call(criterion, *logits)
        value.backward()
        assert criterion.theta.grad is not None
        assert criterion.temperature.item() == pytest.approx(2 + 6 / (1 + math.exp(-theta)))
        return value.item(), criterion.theta.grad.item()

    slope = (loss(0.5 + 1e-4)[0] - loss(0.5 - 1e-4)[0]) / 2e-4
    assert loss(0.5)[1] == pytest.approx(-slope, rel=1e-6)
    assert loss(0.5, reversal=0.25)[1] == pytest.approx(-0.25 * slope, rel=1e-6)
    assert loss(0.5, reversal=0.0)[1] == 0


def _instance_ctkd(logits: tuple[Tensor, Tensor], **settings: float) -> InstanceCTKD:
    torch.manual_seed(0)
    criterion = InstanceCTKD(**settings)
    criterion.build(*(Probe(criterion, Outputs(tensor[:1], {})) for tensor in logits))
    return criterion.double()


def test_instance_ctkd_starts_with_the_global_temperature(logits) -> None:
    begun = _instance_ctkd(logits, min_temperature=2.0, temperature_range=6.0)
    torch.testing.assert_close(_call(begun, *logits), _call(CTKD(2.0, 6.0).double(), *logits))


def test_instance_ctkd_is_kd_with_one_temperature_per_sample(logits) -> None:
    criterion = _instance_ctkd(logits, min_temperature=2.0, temperature_range=6.0)
    torch.nn.init.normal_(criterion.mlp[-1].weight)
    temperatures = criterion.temperatures(*logits).flatten().tolist()
    assert min(temperatures) >= 2
    assert max(temperatures) <= 8
    assert max(temperatures) - min(temperatures) > 1
    single = [KF.kd_loss(*(tensor[i : i + 1] for tensor in logits), temperatures[i]) for i in range(8)]
    torch.testing.assert_close(_call(criterion, *logits), torch.stack(single).mean())


def test_instance_ctkd_reverses_only_its_own_gradient(logits) -> None:
    """The gradient of the temperature network is reversed; the student's equals that of KD with fixed temperatures."""
    criterion = _instance_ctkd(logits, reversal=0.25)
    torch.nn.init.normal_(criterion.mlp[-1].weight)
    student, teacher = logits[0].clone().requires_grad_(), logits[1]
    _call(criterion, student, teacher).backward()
    fixed = logits[0].clone().requires_grad_()
    theta = criterion.mlp(torch.cat([fixed.detach(), teacher], dim=1))
    temperature = 1 + 20 * theta.sigmoid()
    KF.kd_loss(fixed, teacher, temperature.detach()).backward()
    torch.testing.assert_close(student.grad, fixed.grad)
    parameters = list(criterion.parameters())
    straight = torch.autograd.grad(KF.kd_loss(logits[0], teacher, temperature), parameters)
    for parameter, slope in zip(parameters, straight, strict=True):
        assert slope.any()
        torch.testing.assert_close(parameter.grad, -0.25 * slope)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CTKD(temperature_range=0.0), "temperature_range must be greater than 0"),
        (lambda: InstanceCTKD(temperature_range=-1.0), "temperature_range must be greater than 0"),
        (lambda: InstanceCTKD(min_temperature=0.0), "temperature must be greater than 0"),
        (lambda: InstanceCTKD(hidden_dim=0), "hidden_dim must be at least 1, got 0"),
    ],
)
def test_invalid_settings(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
