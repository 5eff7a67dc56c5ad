"""CC: correlation congruence for knowledge distillation."""

from __future__ import annotations

import pytest
import torch

from lkd import Outputs, Probe
from lkd import functional as KF
from lkd.losses import CC
from tests.losses import parity
from tests.losses.cases import FeatureCase
from tests.losses.parity import Hyper, Values

VECTORS = {"student": {"a": (6,)}, "teacher": {"c": (9,)}}

SAME = {"student": {"a": (6,)}, "teacher": {"c": (6,)}}

MAPS = {"student": {"a": (4, 8, 8), "b": (6, 4, 4)}, "teacher": {"c": (4, 8, 8), "d": (6, 4, 4)}}

CASES = {
    "CC": FeatureCase(lambda: CC(["a"], ["c"], feat_dim=5), **VECTORS),
    "CC-bilinear": FeatureCase(
        lambda: CC(["a"], ["c"], feat_dim=None, kernel="bilinear"), **SAME, zero_at_equality=True
    ),
    "CC-maps": FeatureCase(lambda: CC(["a", "b"], ["c", "d"], feat_dim=5, order=4), **MAPS),
    "CC-neighbours": FeatureCase(lambda: CC(["a"], ["c"], feat_dim=5, form="neighbours"), **VECTORS),
    "CC-plain": FeatureCase(lambda: CC(["a"], ["c"], feat_dim=None), **SAME, zero_at_equality=True),
}


def _cc(inputs: Values, hyper: Hyper) -> Values:
    """The mean of squares follows the paper; torchdistill divides the norm itself by B², without normalization."""
    settings = {"feat_dim": None, "gamma": hyper["gamma"], "order": int(hyper["max_p"]), "normalize": False}
    batch_size = len(inputs["student_features.0"])
    norms = {}
    for kernel in ("gaussian", "bilinear"):
        loss = parity.terms(CC(*parity.layers(inputs), kernel=kernel, **settings), inputs)["loss"]
        norms[kernel] = loss.sqrt() * batch_size
    return {
        "frobenius_gaussian_unnormalised": norms["gaussian"],
        **{f"loss.torchdistill_{kernel}": norm / batch_size**2 for kernel, norm in norms.items()},
        "loss.repdistiller": parity.terms(CC(*parity.layers(inputs), feat_dim=None, form="neighbours"), inputs)["loss"],
    }


PARITY = {"cc": _cc}


def test_cc_approximates_the_gaussian_kernel(vectors) -> None:
    """The Taylor series of high order approximates exp(-gamma |x - y|²) for embeddings of length 1."""
    kernels = []
    for rows in vectors:
        unit = rows / rows.norm(dim=1, keepdim=True)
        kernels.append(torch.exp(-0.7 * (unit.unsqueeze(0) - unit.unsqueeze(1)).square().sum(2)))
    expected = (kernels[0] - kernels[1]).square().sum() / 36
    torch.testing.assert_close(KF.cc_loss(*vectors, gamma=0.7, order=30), expected)
    assert not torch.isclose(KF.cc_loss(*vectors, gamma=0.7, order=2), expected, rtol=1e-6)


def test_cc_bilinear(vectors) -> None:
    expected = (vectors[0] @ vectors[0].T - vectors[1] @ vectors[1].T).square().mean()
    torch.testing.assert_close(KF.cc_loss(*vectors, kernel="bilinear", normalize=False), expected)


def test_cc_neighbours_by_a_loop(vectors) -> None:
    student, teacher = vectors[0], vectors[1][:, :5]
    difference = (student - teacher).abs()
    expected = sum(float((difference[i] * difference[i + 1]).sum()) for i in range(5)) / 5
    assert KF.cc_neighbour_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert KF.cc_neighbour_loss(student[:1], teacher[:1]) == 0


def test_neighbours_require_equal_feature_sizes(vectors) -> None:
    probes = [Probe(torch.nn.Identity(), Outputs(torch.zeros(1, 2), {"x": feature[:1]})) for feature in vectors]
    CC(["x"], ["x"], feat_dim=None).build(*probes)
    with pytest.raises(ValueError, match=r"got \(1, 5\) from the student and \(1, 7\) from the teacher; set feat_dim"):
        CC(["x"], ["x"], feat_dim=None, form="neighbours").build(*probes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0.0}, "gamma must be greater than 0, got 0.0"),
        ({"order": 0}, "order must be at least 1, got 0"),
        ({"feat_dim": 0}, "feat_dim must be at least 1, got 0"),
    ],
)
def test_invalid_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CC(**settings)
