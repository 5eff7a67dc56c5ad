"""RLD: refined logit distillation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lkd import functional as KF
from lkd.losses import RLD
from tests.losses import parity
from tests.losses.cases import LogitCase


def _corrected(teacher: Tensor, target: Tensor) -> Tensor:
    """Return the teacher's logits with those of the predicted class and the label exchanged."""
    first, label = teacher.argmax(1, keepdim=True), target.unsqueeze(1)
    swapped = teacher.scatter(1, first, teacher.gather(1, label))
    return swapped.scatter(1, label, teacher.gather(1, first))


CASES = {
    "RLD": LogitCase(RLD, best=_corrected, reads_target=True),
}

PARITY = {"rld": lambda inputs, hyper: parity.logits(RLD(**hyper), inputs)}


def test_rld_by_a_loop(logits, target) -> None:
    """Some teacher predictions are wrong, and one sample has no class below the label."""
    student, teacher = logits
    teacher = teacher.scatter(1, target[:1].unsqueeze(1), -20.0)
    total = 0.0
    for z_s, z_t, label in zip(student.numpy(), teacher.numpy(), target.tolist(), strict=True):
        q, p = (np.exp(row) / np.exp(row).sum() for row in (z_s, z_t))
        sure, wanted = q[label], p.max()
        total += wanted * math.log(wanted / sure) + (1 - wanted) * math.log((1 - wanted) / (1 - sure))
        below = [c for c in range(5) if z_t[c] < z_t[label]]
        q, p = (np.exp(row[below] / 4) for row in (z_s, z_t))
        total += 8 * 16 * float((p / p.sum() * np.log((p / p.sum()) / (q / q.sum()))).sum()) if below else 0.0
    value = KF.rld_loss(student, teacher, target, confidence_temperature=1.0)
    assert value.item() == pytest.approx(total / 8, rel=1e-12)


def test_rld_of_a_correct_teacher(logits) -> None:
    student, teacher = logits
    right = teacher.argmax(1)
    refined = KF.rld_loss(student, teacher, right, 1.0, 8.0, temperature=4.0, confidence_temperature=4.0)
    torch.testing.assert_close(refined, KF.dkd_loss(student, teacher, right, 1.0, 8.0, 4.0))


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        RLD(confidence_temperature=-1.0)
