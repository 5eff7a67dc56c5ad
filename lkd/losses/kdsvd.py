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
    """About 1 / x where x is not nearly 0, and 0 where it is: at most 1450 in single precision."""
    return number / (number.square() + torch.finfo(number.dtype).eps)


def _right_vectors(feature: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors `(B, C, number)` of the matrix pixels x channels, and the singular values.

    The gradient of `torch.linalg.svd` is not finite where singular values are equal, or 0. So the vectors are computed
    without gradient, and what is added to them is their change to first order, whose value is 0.
    """
    matrix = feature.flatten(2).mT
    # What is not finite, LAPACK refuses by an error of its own; left out here, it comes back in the change.
    finite = matrix.detach().nan_to_num(0, 0, 0)
    _, values, basis = torch.linalg.svd(finite, full_matrices=False)  # basis: vectors in its rows
    scale = values[:, :1].clamp(min=1e-12)  # the gradient grows with 1 / scale, and is to stay finite
    matrix, squares = matrix / scale.unsqueeze(2), (values / scale).square()
    vectors = basis.mT[..., :number]
    moved = matrix.mT @ (matrix @ vectors)
    inside = basis @ moved
    gaps = squares[:, None, :number] - squares[:, :, None]
    change = basis.mT @ (inside * _inverse(gaps)) + (moved - basis.mT @ inside) * _inverse(squares[:, None, :number])
    return vectors + (change - change.detach()), values[:, :number]


def _aligned(student: Tensor, teacher: Tensor) -> Tensor:
    """For each of the teacher's vectors the student's that is most like it, or its negative: `(B, C, number)`."""
    cosines = student.mT @ teacher
    nearest = cosines.abs().argmax(1, keepdim=True)
    sign = torch.where(cosines.gather(1, nearest) < 0, -1.0, 1.0)
    return student.gather(2, nearest.expand(-1, student.shape[1], -1)) * sign


def _affinity(vectors: Tensor, others: Tensor) -> Tensor:
    """How near each entry of a layer's vectors is to each of the next one's: `(B, C, D, number)`."""
    return torch.exp(-(vectors.unsqueeze(2) - others.unsqueeze(1)).square() / 8)


@check_shapes(student_features="B C_l H_l W_l", teacher_features="B C_l H'_l W'_l")
@full_precision
def kdsvd_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], num_vectors: int = 1) -> Tensor:
    r"""Squared differences of the affinities between the singular vectors of each layer and of the next.

    $$ \sum_l \frac{1}{B} \sum_{i,j} \left( e^{-(v^s_{l,i} - v^s_{l+1,j})^2 / 8} - e^{-(v^t_{l,i} - v^t_{l+1,j})^2 / 8}
       \right)^2 $$

    Here $v^t_l$ are the first right singular vectors (one entry for each channel) of a sample's matrix pixels x
    channels, times their singular values, which are scaled to length 1. $v^s_l$ are those of the student's first
    `num_vectors` + 3 that are most like the teacher's, with their signs, times the teacher's singular values.

    Args:
        student_features: `(B, C_l, H_l, W_l)` for each layer l, at least two layers.
        teacher_features: `(B, C_l, H'_l, W'_l)` for each layer l, as many layers.
        num_vectors: How many of the teacher's vectors count; at most C_l, and H'_l * W'_l.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    Raises:
        ValueError: If there are fewer than two layers, the shapes do not agree, or a feature of the teacher has fewer
            channels or pixels than `num_vectors`.

    References:
        Lee, Kim, Song: Self-supervised Knowledge Distillation Using Singular Value Decomposition, ECCV 2018
        (arXiv 1807.06819). The sign of a singular vector is arbitrary. The CIFAR-100 benchmark takes the teacher's as
        the library gives them, and its value is this loss with some signs; here each of the teacher's vectors has its
        largest entry positive, as behind a ReLU the first one has all.
    """
    check_layers("kdsvd_loss", student_features)
    ours, theirs = [], []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        if min(teacher.shape[1], teacher[0, 0].numel()) < num_vectors:
            raise ValueError(
                f"kdsvd_loss compares {num_vectors} singular vectors, got a teacher's feature of shape "
                f"{tuple(teacher.shape)}, which has fewer channels or pixels; lower num_vectors"
            )
        wanted, values = _right_vectors(teacher.detach(), num_vectors)
        wanted = wanted * wanted.gather(1, wanted.abs().argmax(1, keepdim=True)).sign()
        found, _ = _right_vectors(student, num_vectors + 3)
        lengths = unit_vectors(values, dim=1).unsqueeze(1)
        ours.append(_aligned(found, wanted) * lengths)
        theirs.append(wanted * lengths)
    losses = [
        (_affinity(*student) - _affinity(*teacher)).square().sum() / len(student[0])
        for student, teacher in zip(pairwise(ours), pairwise(theirs), strict=True)
    ]
    return total(losses)


class KDSVD(FlowLoss):
    """Singular vectors of each layer's features, and how they change from layer to layer.

    Args:
        student_layers: Layers of the student whose feature maps it reads, two at least, in their order.
        teacher_layers: The teacher's, as many, with as many channels; sizes may differ.
        num_vectors: How many singular vectors of the teacher count.
        connect: Whether, where channels differ, the student's map goes through a 1x1 convolution with BatchNorm; the
            paper has none.

    Raises:
        ValueError: If `num_vectors` is less than 1, or, in training, there are fewer than two layers, a layer returns
            no feature map or one with fewer channels or pixels than `num_vectors`, or channels differ and `connect` is
            false.

    References:
        Lee, Kim, Song: Self-supervised Knowledge Distillation Using Singular Value Decomposition, ECCV 2018
        (arXiv 1807.06819), without its auxiliary task. Signs of singular vectors are settled: see `kdsvd_loss`.
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
            raise ValueError(f"num_vectors must be at least 1, got {num_vectors}; 1 is usual")
        self.num_vectors = num_vectors

    def build(self, student: Probe, teacher: Probe) -> None:
        """Check the layers, and make the connectors."""
        super().build(student, teacher)
        for layer in self.teacher_layers:
            _, channels, height, width = teacher.outputs.features[layer].shape
            if min(channels, height * width) < self.num_vectors:
                raise ValueError(
                    f"KDSVD compares {self.num_vectors} singular vectors, and the teacher's {layer} has {channels} "
                    f"channels of {height}x{width} pixels: lower num_vectors, or name another layer"
                )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `kdsvd_loss`."""
        return kdsvd_loss(*self.connected(student, teacher), num_vectors=self.num_vectors)
