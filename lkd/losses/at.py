"""Attention transfer (AT)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses._adapters import same_size
from lkd.losses._checks import check_positive
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


def _attention(feature: Tensor, p: float) -> Tensor:
    """Return the normalized spatial attention map of a feature `(B, H * W)`."""
    absolute = feature.abs()
    if p >= 1:
        return unit_vectors(absolute.pow(p).mean(1).flatten(1), dim=1)
    is_zero = absolute < torch.finfo(absolute.dtype).tiny  # where the power has an infinite gradient
    powers = absolute.masked_fill(is_zero, 1).pow(p).masked_fill(is_zero, 0)
    return unit_vectors(powers.mean(1).flatten(1), dim=1)


@check_shapes(student_feature="B C H W", teacher_feature="B D H' W'")
@full_precision
def at_loss(student_feature: Tensor, teacher_feature: Tensor, p: float = 2.0) -> Tensor:
    r"""Mean squared error between normalized spatial attention maps.

    $$ \frac{1}{B H W} \sum_i \lVert Q(F_{s,i}) - Q(F_{t,i}) \rVert^2, \quad
       Q(F) = \mathrm{vec}(A) / \lVert \mathrm{vec}(A) \rVert, \quad A = \mathrm{mean}_c |F_c|^p $$

    The larger map is average-pooled to the size of the smaller one first.

    Args:
        student_feature: Student feature map `(B, C, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H', W')`.
        p: Exponent of the absolute values, greater than 0. With an exponent below 1, zeros have no gradient.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017 (arXiv 1612.03928). The loss follows the
        authors' code; the paper sums the norm of the difference, not squared.

    Example:
        >>> import torch
        >>> feature = torch.rand(2, 8, 4, 4)
        >>> at_loss(feature, 3 * feature).item() < 1e-12
        True
    """
    student, teacher = same_size(student_feature, teacher_feature)
    return F.mse_loss(_attention(student, p), _attention(teacher, p))


class AT(DistillLoss):
    """Attention transfer: match spatial attention maps.

    The losses of the layers are summed (see `at_loss`). The numbers of channels and the sizes of the maps may differ.

    Args:
        student_layers: Student layers whose feature maps are compared.
        teacher_layers: Teacher layers, one for each student layer.
        p: Exponent of the absolute values, greater than 0.

    Raises:
        ValueError: If `p` is not greater than 0. At the start of training, if a layer does not return a feature map.

    References:
        Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017 (arXiv 1612.03928). The CIFAR-100
        benchmark uses the weight 1000; a benchmark of segmentation (Yang et al., arXiv 2204.06986) uses the last
        feature map and the weight 10000 on Cityscapes.
    """

    needs_build = False  # `build` only checks the layers
    reads_logits = False

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stages",),
        teacher_layers: Sequence[str] = ("@stages",),
        p: float = 2.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_positive("typically 2", p=p)
        self.p = p

    def build(self, student: Probe, teacher: Probe) -> None:
        """Check the shapes of the features."""
        self.pairs(student.outputs, teacher.outputs, dims=4)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `at_loss` over the layers."""
        losses = [at_loss(*pair, self.p) for pair in self.pairs(student, teacher)]
        return total(losses)
