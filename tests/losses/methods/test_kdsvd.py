"""KDSVD: knowledge distillation using singular value decomposition."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lkd import functional as KF
from lkd.losses import KDSVD
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.tools import built_stages, stages

STUDENT = {"a": (4, 8, 8), "b": (6, 4, 4)}

EQUAL = {"c": (4, 8, 8), "d": (6, 4, 4)}

OTHER = {"c": (5, 4, 4), "d": (7, 8, 6)}

CASES = {
    "KDSVD": FeatureCase(
        lambda: KDSVD(*LAYERS), student=STUDENT, teacher=EQUAL, zero_at_equality=True, batch_mean=True
    ),
    "KDSVD-vectors": FeatureCase(
        lambda: KDSVD(*LAYERS, num_vectors=3, connect=True), student=STUDENT, teacher=OTHER, batch_mean=True
    ),
}


def _by_numpy(ours: list[Tensor], theirs: list[Tensor], number: int, signs: Iterator[int], settle: bool) -> float:
    """Compute the loss of KDSVD with loops, given the signs of the teacher's singular vectors.

    With `settle`, each vector's largest entry is made positive.
    """
    total = 0.0
    for sample in range(3):
        vectors: list[tuple[np.ndarray, np.ndarray]] = []
        for student, teacher in zip(ours, theirs, strict=True):
            found = np.linalg.svd(student[sample].flatten(1).numpy().T)[2][: number + 3]
            _, values, wanted = np.linalg.svd(teacher[sample].flatten(1).numpy().T)
            aligned, wanted = [], wanted[:number]
            for vector in wanted:
                vector *= next(signs)
                vector *= np.sign(vector[np.abs(vector).argmax()]) if settle else 1
                nearest = max(found, key=lambda other, vector=vector: abs(other @ vector))
                aligned.append(nearest * np.sign(nearest @ vector))
            lengths = (values[:number] / np.linalg.norm(values[:number]))[:, None]
            vectors.append((np.stack(aligned) * lengths, wanted * lengths))
        for before, behind in pairwise(vectors):
            rbf = [
                np.exp(-((here[:, :, None] - there[:, None, :]) ** 2) / 8)
                for here, there in zip(before, behind, strict=True)
            ]
            total += ((rbf[0] - rbf[1]) ** 2).sum() / 3
    return total


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_signs_of_singular_vectors_have_no_effect(number: int, sign: int) -> None:
    ours, theirs = stages(10), stages(11)
    expected = _by_numpy(ours, theirs, number, repeat(sign), settle=True)
    assert float(KF.kdsvd_loss(ours, theirs, number)) == pytest.approx(expected, rel=1e-10)


def test_repdistiller_uses_some_choice_of_signs() -> None:
    """RepDistiller uses the signs that the SVD returns, so one of the 64 choices of signs gives its value."""
    values = load_file(Path(__file__).parents[2] / "reference" / "kdsvd.safetensors")
    ours, theirs = (
        [values[f"case0.input.{network}_features.{layer}"] for layer in (0, 1)] for network in ("student", "teacher")
    )
    found = [_by_numpy(ours, theirs, 1, iter(signs), settle=False) for signs in product((1, -1), repeat=6)]
    wanted = float(values["case0.expected.loss.repdistiller"])
    assert min(abs(value - wanted) for value in found) < 1e-12 * wanted
    settled = float(KF.kdsvd_loss(ours, theirs, 1))
    assert min(abs(value - settled) for value in found) < 1e-12 * settled


@pytest.mark.parametrize("number", [1, 2])
def test_gradient_of_kdsvd(number: int) -> None:
    """The gradient agrees with finite differences; for these features, that of `torch.linalg.svd` would, too."""
    shapes = ((3, 3, 3), (4, 3, 2), (3, 2, 2))
    ours, theirs = [feature.requires_grad_() for feature in stages(20, shapes)], stages(21, shapes)
    assert torch.autograd.gradcheck(lambda *features: KF.kdsvd_loss(features, theirs, number), ours, atol=1e-6)


def test_equal_singular_values_have_a_finite_gradient() -> None:
    square = torch.eye(9).view(1, 9, 3, 3).repeat(3, 1, 1, 1).requires_grad_()
    other = torch.ones(3, 9, 3, 3, requires_grad=True)  # all singular values except one are 0
    teacher = [torch.rand(3, 9, 3, 3), torch.rand(3, 9, 3, 3)]
    loss = KF.kdsvd_loss([square, other], teacher, 2)
    grads = torch.autograd.grad(loss, [square, other])
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


def test_kdsvd_requires_as_many_pixels_as_vectors() -> None:
    features = stages(0, ((4, 8, 8), (6, 1, 2)))
    with pytest.raises(ValueError, match="compares 3 singular vectors, but the teacher's layer1 has 6 channels of 1x2"):
        built_stages(KDSVD, features, features, num_vectors=3)


def test_different_channels_require_connect() -> None:
    ours, theirs = stages(0), stages(1, ((6, 5, 5), (9, 4, 4), (7, 3, 3)))
    with pytest.raises(ValueError, match=r"KDSVD requires the same number of channels .* got 8 \(layer1\) and 9"):
        built_stages(KDSVD, ours, theirs)
    criterion = built_stages(KDSVD, ours, theirs, connect=True)
    assert {name.partition(".")[2].partition(".")[0] for name, _ in criterion.named_parameters()} == {"1"}
    with pytest.raises(ValueError, match="requires at least two, got 1"):
        built_stages(KDSVD, ours[:1], ours[:1])
