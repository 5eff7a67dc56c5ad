"""Attention transfer (AT)."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Where a feature map is active: `(B, H * W)`, of length 1."""
    return unit_vectors(feature.abs().pow(p).mean(1).flatten(1), dim=1)


@check_shapes(student_feature="B C H W", teacher_feature="B D H' W'")
@full_precision
def at_loss(student_feature: Tensor, teacher_feature: Tensor, p: float = 2.0) -> Tensor:
    r"""Mean squared difference of the attention maps of two features.

    $$ \frac{1}{B H W} \sum_i \lVert Q(F_{s,i}) - Q(F_{t,i}) \rVert^2, \quad
       Q(F) = \mathrm{vec}(A) / \lVert \mathrm{vec}(A) \rVert, \quad A = \mathrm{mean}_c |F_c|^p $$

    The larger map is averaged to the smaller one's size first.

    Args:
        student_feature: `(B, C, H, W)`.
        teacher_feature: `(B, D, H', W')`.
        p: Power of the absolute values, greater than 0.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017 (arXiv 1612.03928). This is the authors'
        code; the paper sums the norm of the difference, not squared.

    Example:
        >>> import torch
        >>> feature = torch.rand(2, 8, 4, 4)
        >>> at_loss(feature, 3 * feature).item() < 1e-12
        True
    """
    student, teacher = same_size(student_feature, teacher_feature)
    return F.mse_loss(_attention(student, p), _attention(teacher, p))


class AT(DistillLoss):
    """Attention transfer: the student is to be active where the teacher is.

    Layers are compared one by one, and the losses added. Channels may differ, and sizes.

    Args:
        student_layers: Layers of the student whose feature maps it reads.
        teacher_layers: The teacher's, as many.
        p: Power of the absolute values, greater than 0.

    Raises:
        ValueError: If `p` is not greater than 0, or, in training, a layer returns no feature map.

    References:
        Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017 (arXiv 1612.03928). The CIFAR-100
        benchmark weighs it with 1000.
    """

    needs_build = False  # it only checks the layers
    reads_logits = False

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stages",),
        teacher_layers: Sequence[str] = ("@stages",),
        p: float = 2.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_positive("2 is usual", p=p)
        self.p = p

    def build(self, student: Probe, teacher: Probe) -> None:
        """Check the layers."""
        self.pairs(student.outputs, teacher.outputs, dims=4)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The sum of `at_loss` over the layers."""
        losses = [at_loss(ours, theirs, self.p) for ours, theirs in self.pairs(student, teacher)]
        return total(losses)
