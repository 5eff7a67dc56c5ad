"""RKD: relational knowledge distillation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from lkd import Batch, Outputs
from lkd import functional as KF
from lkd.losses import RKD
from tests.losses import parity
from tests.losses.cases import FeatureCase
from tests.losses.parity import Hyper, Values

SAME = {"student": {"a": (6,)}, "teacher": {"c": (6,)}}

MAPS = {"student": {"a": (4, 8, 8), "b": (6, 4, 4)}, "teacher": {"c": (4, 8, 8), "d": (6, 4, 4)}}

VECTORS = {"student": {"a": (6,)}, "teacher": {"c": (9,)}}

CASES = {
    "RKD": FeatureCase(lambda: RKD(["a"], ["c"]), **SAME, zero_at_equality=True),
    "RKD-maps": FeatureCase(lambda: RKD(["a", "b"], ["c", "d"], squared=True), **MAPS, zero_at_equality=True),
    "RKD-sizes": FeatureCase(lambda: RKD(["a"], ["c"]), **VECTORS),
}


def _rkd(inputs: Values, hyper: Hyper) -> Values:
    squared, eps = bool(hyper["squared"]), hyper["eps"]
    weights = hyper["distance_weight"], hyper["angle_weight"]
    parts = parity.terms(RKD(*parity.layers(inputs), 1.0, 1.0, squared, eps), inputs)
    loss = parity.terms(RKD(*parity.layers(inputs), *weights, squared, eps), inputs)["loss"]
    same = {f"loss.{peer}": loss for peer in ("repdistiller", "torchdistill", "authors")}
    return {"distance": parts["distance"], "angle": parts["angle"], "loss": loss, **same}


PARITY = {"rkd": _rkd}


def _huber(x: float) -> float:
    return x**2 / 2 if abs(x) < 1 else abs(x) - 0.5


@pytest.mark.parametrize("squared", [False, True])
def test_rkd_distance_by_a_loop(vectors, squared: bool) -> None:
    relative = []
    for rows in vectors:
        distance = np.array([[np.linalg.norm(x - y) for x in rows.numpy()] for y in rows.numpy()])
        distance = distance**2 if squared else distance
        relative.append(distance / (distance.sum() / 30))
    expected = np.mean([_huber(x) for x in (relative[0] - relative[1]).flatten()])
    assert KF.rkd_distance_loss(*vectors, squared).item() == pytest.approx(expected, rel=1e-12)


def test_rkd_angle_by_a_loop(vectors) -> None:
    total = 0.0
    for i, j, k in product(range(6), repeat=3):
        cosines = []
        for rows in vectors:
            first, second = rows[j] - rows[i], rows[k] - rows[i]
            lengths = float(first.norm() * second.norm())
            cosines.append(float(first @ second) / lengths if lengths else 0.0)
        total += _huber(cosines[0] - cosines[1])
    assert KF.rkd_angle_loss(*vectors).item() == pytest.approx(total / 6**3, rel=1e-12)


def test_rkd_is_invariant_to_scale_shift_and_rotation(vectors) -> None:
    feature = vectors[1]
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    moved = 3 * feature @ rotation + 5
    assert KF.rkd_distance_loss(moved, feature) < 1e-25
    assert KF.rkd_angle_loss(moved, feature) < 1e-25


def test_rkd_of_near_samples_far_from_the_origin() -> None:
    """Distances are computed from the differences, so they are also precise in float32."""
    near = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert KF.rkd_distance_loss(near + 4096, near) < 1e-12


def test_rkd_skips_terms_with_zero_weight(vectors) -> None:
    ours, theirs = (Outputs(torch.zeros(6, 2), {"x": feature}) for feature in vectors)
    for weights, name in (((1.0, 0.0), "distance"), ((0.0, 1.0), "angle")):
        terms = RKD(["x"], ["x"], *weights)(ours, theirs, Batch(None, torch.zeros(6)))
        assert set(terms) == {name}


def test_identical_samples_have_the_minimum_distance() -> None:
    rows = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    loss = KF.rkd_distance_loss(rows, other)
    mean = (2 * 2 + 2e-6) / 6
    expected = 2 * (_huber(1e-6 / mean - 0.75) + _huber(1 / mean - 1.5) + _huber(1 / mean - 0.75)) / 9
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert rows.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"angle_weight": -1.0}, "angle_weight must not be negative, got -1.0"),
        ({"distance_weight": 0.0, "angle_weight": 0.0}, "distance_weight and angle_weight are both 0"),
    ],
)
def test_invalid_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RKD(**settings)
