"""PKD: distillation with the Pearson correlation coefficient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lkd import Batch
from lkd import functional as KF
from lkd.losses import PKD
from tests.losses import parity
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, draw, outputs

BATCH = Batch(None, torch.zeros(2, dtype=torch.int64))

CASES = {
    "PKD": FeatureCase(
        lambda: PKD(*LAYERS),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (4, 8, 8), "d": (6, 4, 4)},
        zero_at_equality=True,
    ),
    "PKD-sizes": FeatureCase(
        lambda: PKD(*LAYERS, resize_student=False),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 4, 8), "d": (6, 8, 6)},
    ),
}


def _pkd(inputs: Values, hyper: Hyper) -> Values:
    named = parity.named(inputs)
    criterion = parity.built(PKD(*parity.layers(named), resize_student=bool(hyper["resize_student"])), named)
    loss = parity.terms(criterion, named)["loss"]
    return {"loss": loss, "loss.crosskd": loss}


PARITY = {"pkd": _pkd}


def test_pkd_is_one_minus_the_correlation() -> None:
    student, teacher = draw(3, 5, 4, 4), draw(3, 5, 4, 4, seed=1)
    rows = (feature.transpose(0, 1).flatten(1) for feature in (student, teacher))
    found = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*rows, strict=True)]
    expected = 47 / 48 * (1 - torch.stack(found).mean())
    torch.testing.assert_close(KF.pkd_loss(student, teacher), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(KF.pkd_loss(3 * student + 1, teacher / 7), expected, rtol=1e-5, atol=0)


def test_pkd_compares_logits_without_layers() -> None:
    student, teacher = draw(2, 3, 4, 4), draw(2, 3, 8, 8, seed=1)
    criterion = built(PKD((), ()), outputs(student), outputs(teacher))
    expected = KF.pkd_loss(F.interpolate(student, (8, 8), mode="bilinear"), teacher)
    assert torch.equal(criterion(outputs(student), outputs(teacher), BATCH), expected)


def test_invalid_layers() -> None:
    student, teacher = outputs(a=draw(2, 8, 4, 4)), outputs(p=draw(2, 6))
    with pytest.raises(ValueError, match=r"PKD reads feature maps .*, but the teacher layer returns \(2, 6\)"):
        built(PKD(["a"], ["p"]), student, teacher)


def test_correlation_requires_two_values() -> None:
    with pytest.raises(ValueError, match="pkd_loss requires at least 2 values in each channel, got 1; use larger maps"):
        KF.pkd_loss(torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1))
