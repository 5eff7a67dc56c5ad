"""Hints from intermediate layers (FitNets)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lkd.losses._precision import mse
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


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
