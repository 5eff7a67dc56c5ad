"""Criteria of relations between samples against their definitions, by loops."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from lkd import Batch, Outputs, Probe
from lkd import functional as KF
from lkd.losses import CC, PKT, RKD, SP


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(6, size, generator=generator, dtype=torch.float64) for size in (5, 7))


def _huber(x: float) -> float:
    return x**2 / 2 if abs(x) < 1 else abs(x) - 0.5


@pytest.mark.parametrize("squared", [False, True])
def test_rkd_distance_by_a_loop(features, squared: bool) -> None:
    relative = []
    for rows in features:
        distance = np.array([[np.linalg.norm(x - y) for x in rows.numpy()] for y in rows.numpy()])
        distance = distance**2 if squared else distance
        relative.append(distance / (distance.sum() / 30))
    expected = np.mean([_huber(x) for x in (relative[0] - relative[1]).flatten()])
    assert KF.rkd_distance_loss(*features, squared).item() == pytest.approx(expected, rel=1e-12)


def test_rkd_angle_by_a_loop(features) -> None:
    total = 0.0
    for i, j, k in product(range(6), repeat=3):
        cosines = []
        for rows in features:
            first, second = rows[j] - rows[i], rows[k] - rows[i]
            lengths = float(first.norm() * second.norm())
            cosines.append(float(first @ second) / lengths if lengths else 0.0)
        total += _huber(cosines[0] - cosines[1])
    assert KF.rkd_angle_loss(*features).item() == pytest.approx(total / 6**3, rel=1e-12)


def test_rkd_is_blind_to_scale_shift_and_rotation(features) -> None:
    feature = features[1]
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    moved = 3 * feature @ rotation + 5
    assert KF.rkd_distance_loss(moved, feature) < 1e-25
    assert KF.rkd_angle_loss(moved, feature) < 1e-25


def test_rkd_of_near_samples_far_from_the_origin() -> None:
    """In single precision, too, distances are those of the differences."""
    near = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert KF.rkd_distance_loss(near + 4096, near) < 1e-12


def test_rkd_leaves_out_what_weighs_nothing(features) -> None:
    ours, theirs = (Outputs(torch.zeros(6, 2), {"x": feature}) for feature in features)
    for weights, name in (((1.0, 0.0), "distance"), ((0.0, 1.0), "angle")):
        terms = RKD(["x"], ["x"], *weights)(ours, theirs, Batch(None, torch.zeros(6)))
        assert set(terms) == {name}


def test_identical_samples_count_as_the_least_distance() -> None:
    rows = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    loss = KF.rkd_distance_loss(rows, other)
    mean = (2 * 2 + 2e-6) / 6
    expected = 2 * (_huber(1e-6 / mean - 0.75) + _huber(1 / mean - 1.5) + _huber(1 / mean - 0.75)) / 9
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert rows.grad.isfinite().all()


def test_sp_by_a_loop(features) -> None:
    grams = []
    for rows in features:
        gram = (rows @ rows.T).numpy()
        grams.append(gram / np.linalg.norm(gram, axis=1, keepdims=True))
    expected = ((grams[0] - grams[1]) ** 2).sum() / 36
    assert KF.sp_loss(*features).item() == pytest.approx(expected, rel=1e-12)


def test_sp_flattens_maps() -> None:
    maps = [torch.randn(4, channels, 3, 3) for channels in (2, 5)]
    torch.testing.assert_close(KF.sp_loss(*maps), KF.sp_loss(*(feature.flatten(1) for feature in maps)))


def test_pkt_by_a_loop(features) -> None:
    student, teacher = (_neighbours(rows.tolist()) for rows in features)
    expected = sum(
        q * math.log((q + 1e-7) / (p + 1e-7))
        for ours, theirs in zip(student, teacher, strict=True)
        for p, q in zip(ours, theirs, strict=True)
    )
    assert KF.pkt_loss(*features).item() == pytest.approx(expected / 36, rel=1e-6)


def _neighbours(rows: list[list[float]]) -> list[list[float]]:
    kernel = [[(np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) + 1) / 2 for y in rows] for x in rows]
    return [[value / sum(row) for value in row] for row in kernel]


def test_cc_is_nearly_the_gaussian_kernel(features) -> None:
    """The Taylor series of high order is exp(-gamma |x - y|²) of embeddings of length 1."""
    kernels = []
    for rows in features:
        unit = rows / rows.norm(dim=1, keepdim=True)
        kernels.append(torch.exp(-0.7 * (unit.unsqueeze(0) - unit.unsqueeze(1)).square().sum(2)))
    expected = (kernels[0] - kernels[1]).square().sum() / 36
    torch.testing.assert_close(KF.cc_loss(*features, gamma=0.7, order=30), expected)
    assert not torch.isclose(KF.cc_loss(*features, gamma=0.7, order=2), expected, rtol=1e-6)


def test_cc_bilinear(features) -> None:
    expected = (features[0] @ features[0].T - features[1] @ features[1].T).square().mean()
    torch.testing.assert_close(KF.cc_loss(*features, kernel="bilinear", normalize=False), expected)


def test_cc_neighbours_by_a_loop(features) -> None:
    student, teacher = features[0], features[1][:, :5]
    difference = (student - teacher).abs()
    expected = sum(float((difference[i] * difference[i + 1]).sum()) for i in range(5)) / 5
    assert KF.cc_neighbour_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert KF.cc_neighbour_loss(student[:1], teacher[:1]) == 0


def test_several_layers_are_added(features) -> None:
    names = ["x", "y"]
    ours, theirs = (Outputs(torch.zeros(6, 2), {"x": feature, "y": feature.flip(1).exp()}) for feature in features)
    for make in (SP, PKT, lambda *layers: RKD(*layers, angle_weight=0.0), lambda *layers: CC(*layers, feat_dim=None)):
        batch = Batch(None, torch.zeros(6))
        both, *single = (make(layers, layers)(ours, theirs, batch) for layers in (names, ["x"], ["y"]))
        if isinstance(both, dict):
            both, *single = (terms["distance"] for terms in (both, *single))
        torch.testing.assert_close(both, sum(single))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RKD(angle_weight=-1.0), "angle_weight must not be negative, got -1.0"),
        (lambda: RKD(distance_weight=0.0, angle_weight=0.0), "distance_weight and angle_weight are both 0"),
        (lambda: CC(gamma=0.0), "gamma must be greater than 0, got 0.0"),
        (lambda: CC(order=0), "order must be at least 1, got 0"),
        (lambda: CC(feat_dim=0), "feat_dim must be at least 1, got 0"),
    ],
)
def test_mistakes(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_neighbours_need_features_of_one_size(features) -> None:
    probes = [Probe(torch.nn.Identity(), Outputs(torch.zeros(1, 2), {"x": feature[:1]})) for feature in features]
    CC(["x"], ["x"], feat_dim=None).build(*probes)
    with pytest.raises(ValueError, match=r"got \(1, 5\) from the student and \(1, 7\) from the teacher; set feat_dim"):
        CC(["x"], ["x"], feat_dim=None, form="neighbours").build(*probes)
