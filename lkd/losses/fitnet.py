"""Hints from intermediate layers (FitNets)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lkd.losses._precision import mse
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


def _regressor(student: Tensor, teacher: Tensor) -> nn.Module:
    """Create the convolution, BatchNorm and ReLU that map the student's feature to the shape of the teacher's."""
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
            f"FitNet cannot map a student feature of {height}x{width} pixels to the teacher's {rows}x{columns}; "
            "use a student layer whose map is at least as large or exactly half as large"
        )
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher.shape[1]), nn.ReLU())


class FitNet(DistillLoss):
    r"""FitNet hints: regress the teacher's feature maps.

    $$ \frac{1}{BCHW} \lVert r(F_s) - F_t \rVert^2 $$

    The regressor r, a convolution with BatchNorm and ReLU, is trained with the student. The convolution is 3x3 with
    stride 2 if the student's map is twice as large as the teacher's, transposed if it is half as large, and otherwise
    has the kernel size that yields the size of the teacher's map.

    Args:
        student_layers: Student layers whose feature maps are compared; the losses are summed.
        teacher_layers: Teacher layers, one for each student layer.

    Raises:
        ValueError: At the start of training, if a layer does not return a feature map, or if the student's map is
            smaller than the teacher's and not exactly half as large.

    References:
        Romero et al.: FitNets: Hints for Thin Deep Nets, ICLR 2015 (arXiv 1412.6550). The paper uses half the squared
        norm and trains the hint layers before the rest of the network. The regressor and the mean over all elements
        follow the CIFAR-100 benchmark (Tian et al., arXiv 1910.10699), which uses the second stage and the weight 100,
        together with the cross-entropy.
    """

    reads_logits = False

    def __init__(
        self, student_layers: Sequence[str] = ("@stage2",), teacher_layers: Sequence[str] = ("@stage2",)
    ) -> None:
        super().__init__(student_layers, teacher_layers)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the regressors."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=4)
        self.regressors = nn.ModuleList(_regressor(ours, theirs) for ours, theirs in pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the mean squared error between regressed and teacher features, summed over the layers."""
        pairs = zip(self.regressors, self.pairs(student, teacher), strict=True)
        losses = [mse(regressor(ours), theirs) for regressor, (ours, theirs) in pairs]
        return total(losses)
