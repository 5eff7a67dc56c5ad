"""NST: neuron selectivity transfer."""

from __future__ import annotations

import pytest
import torch

from lkd import functional as KF
from lkd.losses import NST
from tests.losses import parity
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, draw, output_pair

CASES = {
    "NST": FeatureCase(
        lambda: NST(*LAYERS),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (4, 8, 8), "d": (6, 4, 4)},
        zero_at_equality=True,
        batch_mean=True,
    ),
    "NST-sizes": FeatureCase(
        lambda: NST(["a"], ["c"]), student={"a": (20, 8, 8)}, teacher={"c": (6, 4, 4)}, batch_mean=True
    ),
}


def _nst(inputs: Values, hyper: Hyper) -> Values:
    loss = parity.terms(parity.built(NST(*parity.layers(inputs)), inputs), inputs)["loss"]
    return {"loss": loss, "weighted": hyper["feat_weight"] * loss}


PARITY = {"nst": _nst}


@pytest.mark.parametrize(("channels", "others", "size"), [(5, 3, 4), (5, 3, 2), (3, 5, 2), (20, 30, 4)])
def test_nst_by_a_loop(channels: int, others: int, size: int) -> None:
    """Features with more pixels than channels, and with fewer, use different formulas."""
    student, teacher = draw(2, channels, size, size), draw(2, others, size, size, seed=1)
    total = 0.0
    for own, other in zip(student.flatten(2), teacher.flatten(2), strict=True):
        own, other = ([row / row.norm() for row in rows] for rows in (own, other))
        for factor, left, right in ((1, own, own), (1, other, other), (-2, own, other)):
            kernel = [torch.dot(a, b).item() ** 2 for a in left for b in right]
            total += factor * sum(kernel) / len(kernel)
    assert KF.nst_loss(student, teacher).item() == pytest.approx(total / 2, rel=1e-12)


def test_nst_is_invariant_to_order_and_scale_of_channels() -> None:
    student, teacher = draw(2, 6, 4, 4), draw(2, 6, 4, 4, seed=1)
    scaled = student[:, torch.randperm(6)] * torch.rand(2, 6, 1, 1).add(0.1)
    torch.testing.assert_close(KF.nst_loss(scaled, teacher), KF.nst_loss(student, teacher))


def test_invalid_layers() -> None:
    form = draw(4, 6)
    with pytest.raises(ValueError, match=r"NST reads .*, but the student layer returns .*; use another"):
        built(NST(["a"], ["c"]), *output_pair(form, form))
