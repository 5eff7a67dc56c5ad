"""DIST: distillation from a stronger teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch.nn.functional as F

from lkd import functional as KF
from lkd.losses import DIST
from tests.losses import parity
from tests.losses.cases import LogitCase
from tests.losses.parity import Hyper, Values

CASES = {
    "DIST": LogitCase(DIST, batch_mean=False),
    "DIST-4": LogitCase(lambda: DIST(beta=2.0, gamma=0.5, temperature=4.0), batch_mean=False),
}


def _dist(inputs: Values, hyper: Hyper) -> Values:
    criterion = DIST(hyper["beta"], hyper["gamma"], hyper["tau"], hyper["eps"])
    parts = parity.terms(DIST(1.0, 1.0, hyper["tau"], hyper["eps"]), inputs)
    return {**parity.weighted(criterion, inputs), "inter": parts["inter"], "intra": parts["intra"]}


PARITY = {"dist": _dist}


def test_dist_equals_numpys_correlation(logits) -> None:
    student, teacher = (F.softmax(tensor / 4, dim=1).numpy() for tensor in logits)
    rows = [np.corrcoef(student[i], teacher[i])[0, 1] for i in range(8)]
    columns = [np.corrcoef(student[:, c], teacher[:, c])[0, 1] for c in range(5)]
    expected = 16 * (2 * (1 - np.mean(rows)) + 3 * (1 - np.mean(columns)))
    assert KF.dist_loss(*logits, beta=2.0, gamma=3.0, temperature=4.0, eps=0.0).item() == pytest.approx(expected)


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        DIST(temperature=0.0)
