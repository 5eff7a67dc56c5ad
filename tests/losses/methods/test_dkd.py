"""DKD: decoupled knowledge distillation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lkd import Batch, Outputs
from lkd import functional as KF
from lkd.callbacks import Schedule
from lkd.losses import DKD
from tests.losses import parity
from tests.losses.cases import LogitCase
from tests.losses.parity import Hyper, Values

CASES = {
    "DKD": LogitCase(DKD, reads_target=True),
}


def _dkd(inputs: Values, hyper: Hyper) -> Values:
    warmup = Schedule("distill_weight", hyper["warmup_epochs"]).factor(hyper["epoch_for_weighted"] - 1)
    criterion = DKD(hyper["alpha"], hyper["beta"], hyper["temperature"])
    parts = parity.terms(DKD(1.0, 1.0, hyper["temperature"]), inputs)
    values = parity.weighted(criterion, inputs, distill=warmup, hard=hyper["ce_weight"])
    return {**values, "tckd": parts["target"], "nckd": parts["nontarget"]}


PARITY = {"dkd": _dkd}


def test_dkd_decomposes_kd(logits, target) -> None:
    """For each sample, KD = TCKD + (1 - teacher probability of the target) * NCKD."""
    for student, teacher, label in zip(*(tensor.split(1) for tensor in (*logits, target)), strict=True):
        rest = 1 - F.softmax(teacher / 4, dim=1)[0, label]
        parts = KF.tckd_loss(student, teacher, label, 4.0) + rest * KF.nckd_loss(student, teacher, label, 4.0)
        torch.testing.assert_close(parts.squeeze(), KF.kd_loss(student, teacher, 4.0))


def test_two_classes_are_rejected() -> None:
    student, teacher = torch.zeros(2, 4, 2)
    with pytest.raises(ValueError, match="at least 3 classes, got logits with 2; use KD"):
        DKD()(Outputs(student, {}), Outputs(teacher, {}), Batch(None, torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -1.0}, "beta must not be negative, got -1.0"),
        ({"beta": float("inf")}, "beta must not be negative, got inf; .* finite"),
    ],
)
def test_invalid_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DKD(**settings)
