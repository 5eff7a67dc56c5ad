"""Neuron selectivity transfer (NST)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lkd.losses._adapters import same_size
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


def _mean_kernel(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean squared inner product over the batch and all pairs of channels of `(B, C, N)` and `(B, D, N)`."""
    channels, other_channels, pixels = first.shape[1], second.shape[1], first.shape[2]
    if pixels >= max(channels, other_channels):
        return torch.bmm(first, second.mT).square().mean()
    # |A B'|^2 = <A'A, B'B> avoids the matrix of all pairs of channels.
    moments = torch.bmm(first.mT, first) / channels, torch.bmm(second.mT, second) / other_channels
    return (moments[0] * moments[1]).sum((1, 2)).mean()


@check_shapes(student_feature="B C H W", teacher_feature="B D H' W'")
@full_precision
def nst_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Squared maximum mean discrepancy between the activation patterns of the channels of two features.

    $$ \frac{1}{B} \sum_i \Big[ \frac{1}{C^2} \sum_{c, c'} k(s_{ic}, s_{ic'})
       + \frac{1}{D^2} \sum_{d, d'} k(t_{id}, t_{id'}) - \frac{2}{C D} \sum_{c, d} k(s_{ic}, t_{id}) \Big],
       \quad k(a, b) = (a \cdot b)^2 $$

    Here s and t are the spatial maps of the channels, normalized to unit length. The larger map is average-pooled to
    the size of the smaller one first.

    Args:
        student_feature: Student feature map `(B, C, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H', W')`.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017 (arXiv 1707.01219),
        with the polynomial kernel (degree 2, constant 0).

    Example:
        >>> feature = torch.rand(2, 8, 4, 4)
        >>> abs(nst_loss(feature.flip(1), 3 * feature).item()) < 1e-6
        True
    """
    student, teacher = (unit_vectors(f.flatten(2), dim=2) for f in same_size(student_feature, teacher_feature))
    return _mean_kernel(student, student) + _mean_kernel(teacher, teacher) - 2 * _mean_kernel(student, teacher)


class NST(DistillLoss):
    """Neuron selectivity transfer: match channel patterns.

    The loss is the maximum mean discrepancy between the spatial patterns of the channels, regardless of their order
    (see `nst_loss`), summed over the layers. The numbers of channels and the sizes of the maps may differ.

    Args:
        student_layers: Student layers whose feature maps are compared.
        teacher_layers: Teacher layers, one for each student layer.

    Raises:
        ValueError: At the start of training, if a layer does not return a feature map.

    References:
        Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017 (arXiv 1707.01219).
        The CIFAR-100 benchmark uses the weight 50.
    """

    needs_build = False  # `build` only checks the layers
    reads_logits = False

    def __init__(
        self, student_layers: Sequence[str] = ("@stages",), teacher_layers: Sequence[str] = ("@stages",)
    ) -> None:
        super().__init__(student_layers, teacher_layers)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Check the shapes of the features."""
        self.pairs(student.outputs, teacher.outputs, dims=4)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `nst_loss` over the layers."""
        return total([nst_loss(*pair) for pair in self.pairs(student, teacher)])
