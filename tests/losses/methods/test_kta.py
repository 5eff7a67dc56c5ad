"""KTA: knowledge translation and adaptation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lkd import functional as KF
from lkd.losses import KTA
from tests.losses import parity
from tests.losses.cases import FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, draw, output_pair

CASES = {
    "KTA": FeatureCase(
        lambda: KTA(["a", "b"], ["c", "d"]),
        student={"a": (4, 4, 4), "b": (6, 8, 8)},
        teacher={"c": (4, 4, 4), "d": (5, 4, 4)},
        batch_mean=True,
    ),
    "KTA-p2": FeatureCase(
        lambda: KTA(["a"], ["c"], p=2.0), student={"a": (4, 4, 4)}, teacher={"c": (5, 8, 8)}, batch_mean=True
    ),
}


def _terms(inputs: Values, p: float, q: float) -> Values:
    criterion = parity.built(KTA(*parity.layers(inputs), p=p, q=q, adaptation_weight=1.0), inputs)
    criterion.feature_adapters[0] = criterion.affinity_adapters[0] = nn.Identity()
    return parity.terms(criterion, inputs)


def _kta(inputs: Values, hyper: Hyper) -> Values:
    """The fixture contains the student's feature after the adapters; `kta_p2` uses p = 2."""
    found, squared = (_terms(inputs, p, hyper["q"]) for p in (hyper["p"], 2))
    return {"kta": found["adaptation"], "kta_p2": squared["adaptation"], "affinity": found["affinity"]}


PARITY = {"kta": _kta}


def test_affinity_by_outer_products() -> None:
    """This includes channels that are zero in one network or in both."""
    student, teacher = draw(2, 5, 3, 4), draw(2, 5, 3, 4, seed=1)
    student[0, 1] = teacher[1, 2] = 0
    student[0, 3] = teacher[0, 3] = 0
    student[1, 4] = teacher[1, 4]
    student.requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for own, other in zip(student.flatten(0, 1).flatten(1), teacher.flatten(0, 1).flatten(1), strict=True):
        a, b = (F.normalize(row, dim=0) for row in (own, other))
        total = total + torch.linalg.matrix_norm(torch.outer(a, a) - torch.outer(b, b)) / 12
    loss = KF.affinity_loss(student, teacher)
    torch.testing.assert_close(loss, total / 2, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(value, student)[0] for value in (loss, total / 2)]
    assert grads[0].isfinite().all()
    alive = (student != 0) & (student != teacher)  # elsewhere the loss is not differentiable
    torch.testing.assert_close(grads[0][alive], grads[1][alive], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_kta_by_a_loop(p: float) -> None:
    student, teacher = draw(3, 2, 2, 2), draw(3, 2, 2, 2, seed=1)
    total = 0.0
    for own, other in zip(student.flatten(1), teacher.flatten(1), strict=True):
        difference = own / own.norm(3) - other / other.norm(3)
        total += difference.abs().mean() if p == 1 else difference.norm(p)
    torch.testing.assert_close(KF.kta_loss(student, teacher, p=p, q=3.0), total / 3)


def test_invalid_layers() -> None:
    form = draw(4, 6)
    with pytest.raises(ValueError, match=r"KTA reads .*, but the student layer returns .*; use another"):
        built(KTA(["a"], ["c"]), *output_pair(form, form))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"q": 0.0}, "q must be at least 1, got 0.0"),
        ({"affinity_weight": -1.0}, "affinity_weight must not be negative, got -1.0"),
    ],
)
def test_invalid_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KTA(**settings)
