"""TTM: transformed teacher matching."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lkd import functional as KF
from lkd.losses import TTM, WTTM
from tests.losses import parity
from tests.losses.cases import LogitCase

CASES = {
    "TTM": LogitCase(TTM, best=lambda teacher, target: teacher / 10),
    "WTTM": LogitCase(WTTM, best=lambda teacher, target: teacher / 5),
}

PARITY = {
    "ttm": lambda inputs, hyper: parity.logits(TTM(1 / hyper["exponent"]), inputs),
    "wttm": lambda inputs, hyper: parity.logits(WTTM(1 / hyper["exponent"]), inputs),
}


def test_ttm_softens_only_the_teacher(logits) -> None:
    student, teacher = logits
    torch.testing.assert_close(KF.ttm_loss(student, teacher, 5.0), KF.kd_loss(student * 5, teacher, 5.0) / 25)


def test_wttm_gives_flat_teachers_more_weight(logits) -> None:
    student, teacher = logits
    weights = (F.softmax(teacher, dim=1) ** 0.2).sum(1)
    single = [KF.ttm_loss(student[i : i + 1], teacher[i : i + 1], 5.0) for i in range(8)]
    torch.testing.assert_close(KF.wttm_loss(student, teacher, 5.0), (weights * torch.stack(single)).mean())
