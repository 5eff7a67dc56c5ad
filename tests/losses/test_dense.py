"""Criteria of logit maps, and class masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lkd import Outputs, Probe
from lkd.losses import CWD, DSD, DistillLoss, MasKD
from lkd.losses._dense import class_masks
from lkd.types import IGNORE_INDEX


def test_class_masks() -> None:
    masks = class_masks(torch.tensor([[[0, 2], [IGNORE_INDEX, 1]]]), 3)
    assert masks.int().tolist() == [[[[1, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 1], [0, 0]]]]
    with pytest.raises(ValueError, match=r"a label is out of range .* the network has 3 classes, so labels must lie"):
        class_masks(torch.tensor([[[3]]]), 3)


@pytest.mark.parametrize("kind", [CWD, DSD, MasKD])
def test_image_logits_are_rejected(kind: type[DistillLoss]) -> None:
    outputs = Outputs(torch.zeros(2, 5), {"@stages": torch.zeros(2, 3, 4, 4)})
    probe = Probe(nn.Identity(), outputs)
    with pytest.raises(ValueError, match=r"reads maps of logits \(B, K, H, W\), but the student returns \(2, 5\); use"):
        kind().build(probe, probe)
