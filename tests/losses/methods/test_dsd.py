"""DSD: double similarity distillation."""

from __future__ import annotations

import pytest
import torch

from lkd import Batch, Outputs
from lkd import functional as KF
from lkd.losses import DSD
from tests.losses import parity
from tests.losses.cases import LAYERS, SegmentationCase
from tests.losses.parity import Hyper, Values

STUDENT = {"a": (4, 8, 8), "b": (6, 4, 6)}

OTHER = {"c": (5, 8, 4), "d": (7, 6, 8)}

CASES = {
    "DSD": SegmentationCase(
        lambda: DSD(*LAYERS),
        student={"a": (4, 4, 6), "b": (6, 4, 6)},
        teacher={"c": (4, 4, 6), "d": (6, 4, 6)},
        zero_at_equality=True,
        batch_mean=True,
    ),
    "DSD-sizes": SegmentationCase(
        lambda: DSD(*LAYERS), student=STUDENT, teacher=OTHER, teacher_logits=(5, 7), batch_mean=True
    ),
}


def _dsd(inputs: Values, hyper: Hyper) -> Values:
    """The fixture's last map contains the logits."""
    last = str(max(int(name.split(".")[1]) for name in inputs))
    given = {}
    for name, value in inputs.items():
        network, number = name.split(".")
        given[f"{network}_logits" if number == last else f"{network}_features.{number}"] = value
    names = ([f"{network}.{number}" for number in range(int(last))] for network in ("student", "teacher"))
    weights = hyper["pixel_weight"], hyper["category_weight"]
    found = parity.terms(parity.built(DSD(*names, *weights), given), given)
    return {"loss": found["loss"], "pixel": found["pixel"] / weights[0], "category": found["category"] / weights[1]}


PARITY = {"dsd": _dsd}


def test_two_layers_are_required() -> None:
    with pytest.raises(ValueError, match="dsd_pixel_loss compares pairs of layers and requires at least two, got 1"):
        KF.dsd_pixel_loss([torch.ones(1, 2, 3, 3)], [torch.ones(1, 2, 3, 3)])
    both = Outputs(torch.zeros(1, 3, 2, 2), {"a": torch.ones(1, 2, 3, 3)})
    with pytest.raises(ValueError, match="no layers are set"):
        DSD([], [])(both, both, Batch(None, None))
