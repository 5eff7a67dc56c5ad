"""Criteria that compare feature maps pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses.adapters import same_size
from lkd.losses.base import DistillLoss, total
from lkd.losses.checks import check_positive
from lkd.losses.directions import directions
from lkd.losses.precision import full_precision, mse
from lkd.losses.shapes import check_shapes
from lkd.types import Batch, Outputs, Probe


def _attention(feature: Tensor, p: float) -> Tensor:
    """Where a feature map is active: `(B, H * W)`, of length 1."""
    return directions(feature.abs().pow(p).mean(1).flatten(1), dim=1)


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


def _mean_kernel(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean of squared inner products over the batch and all pairs of channels; `(B, C, N)` and `(B, D, N)`."""
    channels, others, pixels = ours.shape[1], theirs.shape[1], ours.shape[2]
    if pixels >= max(channels, others):
        return torch.bmm(ours, theirs.mT).square().mean()
    # The same number without a matrix of all pairs: |A B'|^2 = <A'A, B'B>.
    moments = torch.bmm(ours.mT, ours) / channels, torch.bmm(theirs.mT, theirs) / others
    return (moments[0] * moments[1]).sum((1, 2)).mean()


@check_shapes(student_feature="B C H W", teacher_feature="B D H' W'")
@full_precision
def nst_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Squared maximum mean discrepancy of where the channels of two features are active.

    $$ \frac{1}{B} \sum_i \Big[ \frac{1}{C^2} \sum_{c, c'} k(s_{ic}, s_{ic'})
       + \frac{1}{D^2} \sum_{d, d'} k(t_{id}, t_{id'}) - \frac{2}{C D} \sum_{c, d} k(s_{ic}, t_{id}) \Big],
       \quad k(a, b) = (a \cdot b)^2 $$

    s and t are the channels' maps, each divided by its length. The larger map is averaged to the smaller one's size
    first.

    Args:
        student_feature: `(B, C, H, W)`.
        teacher_feature: `(B, D, H', W')`.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017 (arXiv 1707.01219),
        with the polynomial kernel (degree 2, constant 0).

    Example:
        >>> feature = torch.rand(2, 8, 4, 4)
        >>> abs(nst_loss(feature.flip(1), 3 * feature).item()) < 1e-6
        True
    """
    student, teacher = (directions(f.flatten(2), dim=2) for f in same_size(student_feature, teacher_feature))
    return _mean_kernel(student, student) + _mean_kernel(teacher, teacher) - 2 * _mean_kernel(student, teacher)


class NST(DistillLoss):
    """Neuron selectivity transfer: the student's channels are to be active where the teacher's are, in any order.

    Layers are compared one by one, and the losses added. Channels may differ, and sizes.

    Args:
        student_layers: Layers of the student whose feature maps it reads.
        teacher_layers: The teacher's, as many.

    Raises:
        ValueError: In training, if a layer returns no feature map.

    References:
        Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017 (arXiv 1707.01219).
        The CIFAR-100 benchmark weighs it with 50.
    """

    needs_build = False  # it only checks the layers
    reads_logits = False

    def __init__(
        self, student_layers: Sequence[str] = ("@stages",), teacher_layers: Sequence[str] = ("@stages",)
    ) -> None:
        super().__init__(student_layers, teacher_layers)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Check the layers."""
        self.pairs(student.outputs, teacher.outputs, dims=4)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The sum of `nst_loss` over the layers."""
        return total([nst_loss(ours, theirs) for ours, theirs in self.pairs(student, teacher)])


def _regressor(student: Tensor, teacher: Tensor) -> nn.Module:
    """A convolution that brings the student's feature to the teacher's shape, BatchNorm and ReLU."""
    channels = student.shape[1], teacher.shape[1]
    (height, width), (rows, columns) = student.shape[2:], teacher.shape[2:]
    convolution: nn.Module
    if (height, width) == (2 * rows, 2 * columns):
        convolution = nn.Conv2d(*channels, kernel_size=3, stride=2, padding=1)
    elif (2 * height, 2 * width) == (rows, columns):
        convolution = nn.ConvTranspose2d(*channels, kernel_size=4, stride=2, padding=1)
    elif height >= rows and width >= columns:
        convolution = nn.Conv2d(*channels, kernel_size=(1 + height - rows, 1 + width - columns))
    else:
        raise ValueError(
            f"FitNet cannot bring the student's feature of {height}x{width} pixels to the teacher's {rows}x{columns}: "
            "name a student layer whose map is as large, or half as large"
        )
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher.shape[1]), nn.ReLU())


class FitNet(DistillLoss):
    r"""Hints: a convolution of the student's feature map is to equal the teacher's.

    $$ \frac{1}{BCHW} \lVert r(F_s) - F_t \rVert^2 $$

    The regressor r, a convolution with BatchNorm and ReLU, trains with the student: 3x3 with stride 2 or transposed
    where one map is twice as large as the other, else as large as the difference of the sizes asks for.

    Args:
        student_layers: Layers of the student whose feature maps it reads; the losses are added.
        teacher_layers: The teacher's, as many.

    Raises:
        ValueError: In training, if a layer returns no feature map, or the student's is smaller and not just half.

    References:
        Romero et al.: FitNets: Hints for Thin Deep Nets, ICLR 2015 (arXiv 1412.6550), who halve the squared length and
        train the hint before the rest. The regressor and the mean over all elements are the CIFAR-100 benchmark's
        (Tian et al., arXiv 1910.10699), which reads the second stage and weighs it with 100, beside the labels' loss.
    """

    reads_logits = False

    def __init__(
        self, student_layers: Sequence[str] = ("@stage2",), teacher_layers: Sequence[str] = ("@stage2",)
    ) -> None:
        super().__init__(student_layers, teacher_layers)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the regressors."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=4)
        self.regressors = nn.ModuleList(_regressor(ours, theirs) for ours, theirs in pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean squared difference of regressed and teacher's features, summed over the layers."""
        pairs = zip(self.regressors, self.pairs(student, teacher), strict=True)
        losses = [mse(regressor(ours), theirs) for regressor, (ours, theirs) in pairs]
        return total(losses)
