"""CSKD: class-wise self-knowledge distillation."""

from __future__ import annotations

import pytest
import torch

from lkd import Batch, Outputs
from lkd import functional as KF
from lkd.losses import CSKD
from lkd.types import IGNORE_INDEX
from tests.losses import parity
from tests.losses.cases import FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import draw

CLASSES = 7

TARGET = torch.arange(5) % CLASSES

CASES = {
    "CSKD": FeatureCase(CSKD, views=2, batch_mean=True, reads_target=True),
}


def _cskd(inputs: Values, hyper: Hyper) -> Values:
    """The partners' logits form the second view.

    The fixture has no labels. CSKD reads only whether an image is labelled, so any labels will do.
    """
    logits = torch.cat([inputs["student"], inputs["teacher"]])
    target = torch.zeros(len(logits), dtype=torch.int64)
    return parity.terms(CSKD(hyper["temperature"]), {"student_logits": logits, "target": target})


PARITY = {"cskd": _cskd}


def test_cskd_is_kd_with_the_partner_as_teacher() -> None:
    logits = draw(10, CLASSES, scale=2).requires_grad_()
    batch = Batch(None, torch.cat([TARGET, torch.full((5,), IGNORE_INDEX)]), views=2)
    loss = CSKD(temperature=3.0)(Outputs(logits, {}), Outputs(torch.empty(0), {}), batch)
    torch.testing.assert_close(loss, KF.kd_loss(logits[:5], logits[5:], 3.0))
    loss.backward()
    assert logits.grad[:5].all()
    assert not logits.grad[5:].any()


def test_cskd_ignores_unlabelled_images() -> None:
    logits, target = draw(10, CLASSES, scale=2), TARGET.clone()
    target[3:] = IGNORE_INDEX
    expected = KF.kd_loss(logits[:3], logits[5:8], 4.0)
    torch.testing.assert_close(KF.cskd_loss(logits[:5], logits[5:], target), expected)


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        CSKD(0.0)
