"""Knowledge distillation with singular value decomposition (KD-SVD)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lkd.losses._flow import FlowLoss, check_layers
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import total
from lkd.types import Batch, Outputs, Probe


def _inverse(number: Tensor) -> Tensor:
    """Return approximately 1 / x, and 0 where x is close to 0; bounded by 1450 in single precision."""
    return number / (number.square() + torch.finfo(number.dtype).eps)


def _right_vectors(feature: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the first right singular vectors `(B, C, number)` of the pixels x channels matrix, and the values.

    The gradient of `torch.linalg.svd` is not finite for equal or zero singular values. The vectors are therefore
    computed without gradient, and a first-order correction term with value 0 provides the gradient.
    """
    matrix = feature.flatten(2).mT
    # LAPACK raises an error for non-finite values. They are replaced here and enter through the correction term.
    finite = matrix.detach().nan_to_num(0, 0, 0)
    _, values, basis = torch.linalg.svd(finite, full_matrices=False)  # the rows of `basis` are the vectors
    scale = values[:, :1].clamp(min=1e-12)  # keeps the gradient, proportional to 1 / scale, finite
    matrix, squares = matrix / scale.unsqueeze(2), (values / scale).square()
    vectors = basis.mT[..., :number]
    moved = matrix.mT @ (matrix @ vectors)
    inside = basis @ moved
    gaps = squares[:, None, :number] - squares[:, :, None]
    change = basis.mT @ (inside * _inverse(gaps)) + (moved - basis.mT @ inside) * _inverse(squares[:, None, :number])
    return vectors + (change - change.detach()), values[:, :number]


def _aligned(student: Tensor, teacher: Tensor) -> Tensor:
    """Return, for each teacher vector, the most similar student vector with matching sign `(B, C, number)`."""
    cosines = student.mT @ teacher
    nearest = cosines.abs().argmax(1, keepdim=True)
    sign = torch.where(cosines.gather(1, nearest) < 0, -1.0, 1.0)
    return student.gather(2, nearest.expand(-1, student.shape[1], -1)) * sign


def _affinity(vectors: Tensor, others: Tensor) -> Tensor:
    """Return the affinities between the entries of the vectors of consecutive layers `(B, C, D, number)`."""
    return torch.exp(-(vectors.unsqueeze(2) - others.unsqueeze(1)).square() / 8)


@check_shapes(student_features="B C_l H_l W_l", teacher_features="B C_l H'_l W'_l")
@full_precision
def kdsvd_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], num_vectors: int = 1) -> Tensor:
    r"""Squared difference of the affinities between singular vectors of consecutive layers.

    $$ \sum_l \frac{1}{B} \sum_{i,j} \left( e^{-(v^s_{l,i} - v^s_{l+1,j})^2 / 8} - e^{-(v^t_{l,i} - v^t_{l+1,j})^2 / 8}
       \right)^2 $$

    Here $v^t_l$ are the leading right singular vectors (with one entry for each channel) of a sample's pixels x
    channels matrix, multiplied by their singular values, which are normalized to unit length. $v^s_l$ are those among
    the student's first `num_vectors` + 3 vectors that are most similar to the teacher's, with aligned signs, multiplied
    by the teacher's singular values.

    Args:
        student_features: Student feature maps `(B, C_l, H_l, W_l)` of at least two layers l.
        teacher_features: Teacher feature maps `(B, C_l, H'_l, W'_l)` of the same number of layers.
        num_vectors: Number of singular vectors of the teacher, at most C_l and H'_l * W'_l.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    Raises:
        ValueError: If there are fewer than two layers, if the shapes do not match, or if a teacher feature has fewer
            channels or pixels than `num_vectors`.

    References:
        Lee, Kim, Song: Self-supervised Knowledge Distillation Using Singular Value Decomposition, ECCV 2018 (arXiv
        1807.06819). The sign of a singular vector is arbitrary. The CIFAR-100 benchmark uses the teacher's signs as
        returned by the library, so its value equals this loss for some choice of signs. Here, the largest entry of each
        teacher vector is made positive; after a ReLU, all entries of the first vector are.
    """
    check_layers("kdsvd_loss", student_features)
    student_vectors, teacher_vectors = [], []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        if min(teacher.shape[1], teacher[0, 0].numel()) < num_vectors:
            raise ValueError(
                f"kdsvd_loss compares {num_vectors} singular vectors, but a teacher feature of shape "
                f"{tuple(teacher.shape)} has fewer channels or pixels; reduce num_vectors"
            )
        wanted, values = _right_vectors(teacher.detach(), num_vectors)
        wanted = wanted * wanted.gather(1, wanted.abs().argmax(1, keepdim=True)).sign()
        found, _ = _right_vectors(student, num_vectors + 3)
        lengths = unit_vectors(values, dim=1).unsqueeze(1)
        student_vectors.append(_aligned(found, wanted) * lengths)
        teacher_vectors.append(wanted * lengths)
    losses = [
        (_affinity(*student) - _affinity(*teacher)).square().sum() / len(student[0])
        for student, teacher in zip(pairwise(student_vectors), pairwise(teacher_vectors), strict=True)
    ]
    return total(losses)


class KDSVD(FlowLoss):
    """SVD-based KD: match singular vectors across layers.

    The loss compares how the leading singular vectors of the feature maps change from layer to layer (see
    `kdsvd_loss`).

    Args:
        student_layers: Student layers whose feature maps are compared, at least two, in the order of the network.
        teacher_layers: Teacher layers, one for each student layer, with the same numbers of channels; sizes may differ.
        num_vectors: Number of singular vectors of the teacher, at least 1.
        connect: Whether a 1x1 convolution with BatchNorm adapts student maps to the teacher's number of channels, where
            the numbers differ; the paper has no such adapter.

    Raises:
        ValueError: If `num_vectors` is less than 1. At the start of training, if there are fewer than two layers, if a
            layer does not return a feature map or returns one with fewer channels or pixels than `num_vectors`, or if
            the numbers of channels differ and `connect` is false.

    References:
        Lee, Kim, Song: Self-supervised Knowledge Distillation Using Singular Value Decomposition, ECCV 2018 (arXiv
        1807.06819), without the paper's auxiliary task. The signs of the singular vectors are fixed: see `kdsvd_loss`.
    """

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stages",),
        teacher_layers: Sequence[str] = ("@stages",),
        num_vectors: int = 1,
        connect: bool = False,
    ) -> None:
        super().__init__(student_layers, teacher_layers, connect)
        if num_vectors < 1:
            raise ValueError(f"num_vectors must be at least 1, got {num_vectors}; typically 1")
        self.num_vectors = num_vectors

    def build(self, student: Probe, teacher: Probe) -> None:
        """Check the layers and create the connectors."""
        super().build(student, teacher)
        for layer in self.teacher_layers:
            _, channels, height, width = teacher.outputs.features[layer].shape
            if min(channels, height * width) < self.num_vectors:
                raise ValueError(
                    f"KDSVD compares {self.num_vectors} singular vectors, but the teacher's {layer} has {channels} "
                    f"channels of {height}x{width} pixels; reduce num_vectors or use another layer"
                )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute `kdsvd_loss`."""
        return kdsvd_loss(*self.connected(student, teacher), num_vectors=self.num_vectors)
