"""SRD: simple recipe distillation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lkd import Batch
from lkd.losses import SRD
from tests.losses import parity
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, draw, output_pair

BATCH = Batch(None, torch.zeros(4, dtype=torch.int64))

CASES = {
    "SRD": FeatureCase(
        lambda: SRD(*LAYERS), student={"a": (6,), "b": (8,)}, teacher={"c": (6,), "d": (5,)}, min_samples=2
    ),
    "SRD-exponent": FeatureCase(
        lambda: SRD(["a"], ["c"], exponent=1.0, temperature=2.0),
        student={"a": (6,)},
        teacher={"c": (8,)},
        min_samples=2,
    ),
}


def _srd(inputs: Values, hyper: Hyper) -> Values:
    """The fixture contains the features after projector and BatchNorm."""
    criterion = parity.built(
        SRD(*parity.layers(inputs), exponent=hyper["exponent"], temperature=hyper["temperature"]), inputs
    )
    criterion.projectors[0] = criterion.teacher_norms[0] = nn.Identity()
    return parity.terms(criterion, inputs)


PARITY = {"srd": _srd}


def test_srd_normalizes_both_features() -> None:
    """The loss is invariant to scale and shift of both networks' features."""
    values = []
    for scale, shift in ((1.0, 0.0), (7.0, 3.0)):
        torch.manual_seed(0)
        student, teacher = output_pair(scale * draw(8, 6) + shift, scale * draw(8, 5, seed=1) + shift)
        criterion = built(SRD(["a"], ["c"]), student, teacher)
        values.append(criterion(student, teacher, BATCH)["features"])
    torch.testing.assert_close(*values, rtol=1e-3, atol=0)


def test_invalid_layers() -> None:
    form = draw(4, 6, 2)
    with pytest.raises(ValueError, match=r"SRD reads .*, but the student layer returns .*; use another"):
        built(SRD(["a"], ["c"]), *output_pair(form, form))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exponent": 0.5}, "exponent must be at least 1, got 0.5"),
        ({"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
    ],
)
def test_invalid_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SRD(**settings)
