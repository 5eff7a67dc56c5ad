"""DISTPlus: distillation from a stronger adaptive teacher (DIST+)."""

from __future__ import annotations

import pytest
import torch

from lkd import Batch
from lkd import functional as KF
from lkd.losses import DISTPlus
from tests.losses import parity
from tests.losses.cases import CLASSES, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, outputs

MAPS = {"student": {"a": (4, 8, 8)}, "teacher": {"c": (6, 4, 4)}}

IMAGES = 6

CASES = {
    "DISTPlus": FeatureCase(  # with 16 channels, no pixel is 0 in all of them: a constant has no correlation
        lambda: DISTPlus(["a"], ["c"]), student={"a": (16, 4, 4)}, teacher={"c": (16, 4, 4)}, zero_at_equality=True
    ),
    "DISTPlus-channels": FeatureCase(lambda: DISTPlus(["a"], ["c"]), **MAPS),
}


def _dist_plus(inputs: Values, hyper: Hyper) -> Values:
    found = parity.terms(parity.built(DISTPlus(*parity.layers(inputs), temperature=hyper["tau"]), inputs), inputs)
    return {"spatial": found["spatial"], "channel_torchdistill": 1 - found["channel"]}


PARITY = {"dist_plus": _dist_plus}


def _batch(samples: int = IMAGES) -> Batch:
    return Batch(None, torch.arange(samples) % CLASSES)


def test_dist_plus_maximizes_the_correlation_of_channels() -> None:
    """The loss decreases as the correlation of the channels increases.

    torchdistill uses the opposite sign, which would favour the negative of the teacher's features.
    """
    feature = torch.randn(IMAGES, 6, 4, 4)
    assert KF.channel_relation_loss(2 * feature + 1, feature).item() == pytest.approx(0, abs=1e-6)
    assert KF.channel_relation_loss(-feature, feature).item() == pytest.approx(2, abs=1e-6)
    assert KF.spatial_relation_loss(-feature, feature).item() == pytest.approx(2, abs=1e-6)


def test_dist_plus_includes_dist() -> None:
    logits = torch.randn(IMAGES, CLASSES), torch.randn(IMAGES, CLASSES)
    student, teacher = (outputs(values, a=torch.randn(IMAGES, 6, 4, 4)) for values in logits)
    terms = built(DISTPlus(["a"], ["a"], temperature=4.0), student, teacher)(student, teacher, _batch())
    torch.testing.assert_close(terms["inter"] + terms["intra"], KF.dist_loss(*logits, temperature=4.0))
    assert set(terms) == {"inter", "intra", "channel", "spatial"}


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="channel_weight must not be negative"):
        DISTPlus(channel_weight=-1)
