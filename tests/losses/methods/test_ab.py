"""AB: distillation of activation boundaries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lkd import functional as KF
from lkd.losses import AB
from lkd.models import resnet8
from tests.losses import parity
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import alike

CASES = {
    "AB": FeatureCase(
        lambda: AB(*LAYERS),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 8, 8), "d": (7, 4, 4)},
        batch_mean=True,
        signs_only=True,
    ),
    "AB-sizes": FeatureCase(
        lambda: AB(*LAYERS, margin=2.0, layer_weights=[0.5, 2.0]),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (4, 4, 4), "d": (6, 8, 6)},
        batch_mean=True,
        signs_only=True,
    ),
}


def _ab(inputs: Values, hyper: Hyper) -> Values:
    """The fixture contains the features after the connectors."""

    def loss(weights: str | list[float]) -> Values:
        criterion = parity.built(AB(*parity.layers(inputs), margin=hyper["margin"], layer_weights=weights), inputs)
        criterion.connectors = nn.ModuleList(nn.Identity() for _ in criterion.connectors)
        return parity.terms(criterion, inputs)["loss"]

    return {"loss": loss("equal"), "loss.repdistiller": 3 / 1000 * loss("doubling")}


PARITY = {"ab": _ab}


def test_ab_reads_only_the_teachers_sign() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(KF.ab_loss(student, teacher), KF.ab_loss(student, teacher.sign()))
    assert KF.ab_loss(1.01 * teacher.sign(), teacher) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: alike(AB(layer_weights=[1.0, 2.0]), resnet8(num_classes=5)), "compares 3 layers but has 2"),
        (lambda: AB(layer_weights=[-1.0]), "must not be negative"),
        (lambda: AB(layer_weights=[float("inf")]), r"must not be negative, got \[inf\]; use finite numbers"),
        (lambda: AB(margin=0.0), "margin must be greater than 0"),
    ],
)
def test_invalid_settings(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
