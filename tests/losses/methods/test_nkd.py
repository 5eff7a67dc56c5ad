"""NKD: normalized knowledge distillation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lkd import Batch, Outputs
from lkd import functional as KF
from lkd.losses import NKD
from tests.losses import parity
from tests.losses.cases import LogitCase
from tests.losses.parity import Hyper, Values


def _confident(teacher: Tensor, target: Tensor) -> Tensor:
    """Return the teacher's logits with a probability of nearly 1 for the label."""
    return teacher.scatter(1, target.unsqueeze(1), 60.0)


CASES = {
    "NKD": LogitCase(NKD, best=_confident, zero_at_best=False, reads_target=True),
}


def _nkd(inputs: Values, hyper: Hyper) -> Values:
    criterion = NKD(hyper["gamma"], hyper["temperature"])
    return {**parity.weighted(criterion, inputs), "target_part": parity.terms(criterion, inputs)["target"]}


PARITY = {"nkd": _nkd}


def test_nkd_by_a_loop(logits, target) -> None:
    total = 0.0
    for student, teacher, label in zip(*(tensor.tolist() for tensor in (*logits, target)), strict=True):
        q, p = (np.exp(row) / np.exp(row).sum() for row in (student, teacher))
        total -= p[label] * math.log(q[label])
        q, p = (np.exp(np.delete(row, label) / 2) for row in (student, teacher))
        total -= 1.5 * 4 * (p / p.sum() * np.log(q / q.sum())).sum()
    assert KF.nkd_loss(*logits, target, gamma=1.5, temperature=2.0).item() == pytest.approx(total / 8, rel=1e-12)


def test_two_classes_are_rejected() -> None:
    student, teacher = torch.zeros(2, 4, 2)
    with pytest.raises(ValueError, match="at least 3 classes, got logits with 2; use KD"):
        NKD()(Outputs(student, {}), Outputs(teacher, {}), Batch(None, torch.zeros(4, dtype=torch.int64)))


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="gamma must not be negative, got nan"):
        NKD(gamma=float("nan"))
