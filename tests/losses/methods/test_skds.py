"""SKDS: structured knowledge distillation for segmentation (pair-wise term)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lkd import Batch, Outputs
from lkd import functional as KF
from lkd.losses import SKDS, DistillLoss
from tests.losses import parity
from tests.losses.cases import LAYERS, SegmentationCase
from tests.losses.parity import Hyper, Values

STUDENT = {"a": (4, 8, 8), "b": (6, 4, 6)}

EQUAL = {"c": (4, 8, 8), "d": (6, 4, 6)}

OTHER = {"c": (5, 8, 4), "d": (7, 6, 8)}

CASES = {
    "SKDS": SegmentationCase(
        lambda: SKDS(*LAYERS), student=STUDENT, teacher=EQUAL, zero_at_equality=True, batch_mean=True
    ),
    "SKDS-pixels": SegmentationCase(
        lambda: SKDS(*LAYERS, pool_scale=None), student=STUDENT, teacher=OTHER, batch_mean=True
    ),
}


def _skds(inputs: Values, hyper: Hyper) -> Values:
    """`loss` has lkd's gradient only if it includes the gradient of the norms. CIRKD pools windows of 2x2 pixels."""
    loss = parity.layer_terms(SKDS(["student"], ["teacher"], hyper["pool_scale"]), inputs)["loss"]
    pooled = (F.max_pool2d(inputs[network], 2, ceil_mode=True) for network in ("student", "teacher"))
    name = "loss" if hyper["norm_gradient"] else "loss.full_gradient"
    return {name: loss, "loss.cirkd": KF.skds_loss(*pooled)}


PARITY = {"skds": _skds}


def _features(feature: Tensor, classes: int = 3) -> Outputs:
    return Outputs(torch.zeros(len(feature), classes, 2, 2), {"a": feature})


def _value(criterion: DistillLoss, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
    loss = criterion(_features(student), _features(teacher), Batch(None, target))
    assert isinstance(loss, Tensor)
    return loss


@pytest.mark.parametrize(("size", "regions"), [((8, 6), (2, 2)), ((9, 7), (3, 3)), ((1, 1), (1, 1))])
def test_regions_of_skds(size: tuple[int, int], regions: tuple[int, int]) -> None:
    student, teacher = torch.randn(2, 2, 4, *size)
    windows = [max(number // 2, 1) for number in size]
    pooled = [F.max_pool2d(feature, windows, windows, ceil_mode=True) for feature in (student, teacher)]
    assert pooled[0].shape[2:] == regions
    assert torch.equal(_value(SKDS(["a"], ["a"]), student, teacher), KF.skds_loss(*pooled))


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.5, float("nan")])
def test_invalid_settings(scale: float) -> None:
    with pytest.raises(ValueError, match=rf"pool_scale must be greater than 0 and at most 1, or None, got {scale}"):
        SKDS(pool_scale=scale)
