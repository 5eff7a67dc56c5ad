"""TfKD: teacher-free knowledge distillation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lkd import functional as KF
from lkd.losses import TfKD
from tests.losses.cases import LogitCase


def _virtual(teacher: Tensor, target: Tensor) -> Tensor:
    """Return the virtual teacher's logits: probability 0.9 for the label, the rest spread over the other classes."""
    rest = torch.full_like(teacher, 0.1 / (teacher.shape[1] - 1))
    return rest.scatter(1, target.unsqueeze(1), 0.9).log()


CASES = {
    "TfKD": LogitCase(lambda: TfKD(correct_probability=0.9), best=_virtual, reads_target=True),
}


def test_tfkd_at_temperature_1_is_label_smoothing(logits, target) -> None:
    student = logits[0]
    smoothing = 0.2
    correct = 1 - smoothing + smoothing / 5
    entropy = -correct * math.log(correct) - (1 - correct) * math.log((1 - correct) / 4)
    expected = F.cross_entropy(student, target, label_smoothing=smoothing) - entropy
    torch.testing.assert_close(KF.tfkd_loss(student, target, 1.0, correct), expected)


def test_tfkd_is_kd_with_a_virtual_teacher(logits, target) -> None:
    virtual = torch.full((8, 5), 0.01 / 4, dtype=torch.float64).scatter(1, target.unsqueeze(1), 0.99).log()
    torch.testing.assert_close(KF.tfkd_loss(logits[0], target, 20.0, 0.99), KF.kd_loss(logits[0], virtual, 20.0))


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match=r"correct_probability must be between 0 and 1, got 1\.0"):
        TfKD(correct_probability=1.0)
