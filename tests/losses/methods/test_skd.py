"""SKD: streamlined knowledge distillation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lkd import functional as KF
from lkd.losses import SKD
from tests.losses import parity
from tests.losses.cases import LogitCase
from tests.losses.parity import Hyper, Values

CASES = {
    "SKD": LogitCase(SKD, shift_invariant=False, batch_mean=False),
}


def _skd(inputs: Values, hyper: Hyper) -> Values:
    return parity.terms(SKD(hyper["temperature"], hyper["tikhonov"]), inputs)


PARITY = {"skd": _skd}


def test_skd_equals_numpys_mahalanobis_norm(logits) -> None:
    student, teacher = (tensor.numpy() / np.linalg.norm(tensor, axis=1, keepdims=True) for tensor in logits)
    difference = student @ student.T - teacher @ teacher.T
    inverse = np.linalg.inv(np.cov(difference, rowvar=False) + 0.3 * np.eye(8))
    expected = np.mean([np.sqrt(row @ inverse @ row) for row in difference])
    assert KF.skd_direction_loss(*logits, tikhonov=0.3).item() == pytest.approx(expected)


def test_skd_has_no_factor_t_squared(logits) -> None:
    torch.testing.assert_close(KF.skd_instance_loss(*logits, 4.0) * 16, KF.kd_loss(*logits, 4.0))


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match=r"tikhonov must be greater than 0, got 0\.0"):
        SKD(tikhonov=0.0)
