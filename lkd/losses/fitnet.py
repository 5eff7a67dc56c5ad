"""Hints from intermediate layers (FitNets)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from lkd.losses._adapters import channel_pairs
from lkd.losses._dense import interpolated
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

    The regressor r is trained with the student. By default, it is a convolution with BatchNorm and ReLU. The
    convolution is 3x3 with stride 2 if the student's map is twice as large as the teacher's, transposed if it is half
    as large, and otherwise has the kernel size that yields the size of the teacher's map. For dense prediction, where
    images have various sizes, `regressor="conv"` is a 1x1 convolution without bias, after the student's map is
    interpolated to the size of the teacher's.

    Args:
        student_layers: Student layers whose feature maps are compared; the losses are summed.
        teacher_layers: Teacher layers, one for each student layer.
        regressor: `conv_bn_relu` or `conv`.

    Raises:
        ValueError: If `regressor` is neither of the two. At the start of training, if a layer does not return a feature
            map; for `conv_bn_relu`, also if the student's map is smaller than the teacher's, but not exactly half as
            large.

    References:
        Romero et al.: FitNets: Hints for Thin Deep Nets, ICLR 2015 (arXiv 1412.6550). The paper uses half the squared
        norm and trains the hint layers before the rest of the network. The regressor and the mean over all elements
        follow the CIFAR-100 benchmark (Tian et al., arXiv 1910.10699), which uses the second stage and the weight 100,
        together with the cross-entropy. The 1x1 convolution follows a benchmark of segmentation (Yang et al., arXiv
        2204.06986), which uses the last feature map and the weight 10 on Cityscapes.
    """

    reads_logits = False

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stage2",),
        teacher_layers: Sequence[str] = ("@stage2",),
        regressor: Literal["conv_bn_relu", "conv"] = "conv_bn_relu",
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if regressor not in ("conv_bn_relu", "conv"):
            raise ValueError(f"regressor must be 'conv_bn_relu' or 'conv', got {regressor!r}")
        self.regressor = regressor

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the regressors."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=4)
        if self.regressor == "conv":
            channels = channel_pairs(pairs)
            self.regressors = nn.ModuleList(nn.Conv2d(*pair, kernel_size=1, bias=False) for pair in channels)
        else:
            self.regressors = nn.ModuleList(_regressor(*pair) for pair in pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the mean squared error between regressed and teacher features, summed over the layers."""
        losses = []
        pairs = self.pairs(student, teacher)
        for regress, (student_feature, teacher_feature) in zip(self.regressors, pairs, strict=True):
            height, width = teacher_feature.shape[2:]
            if self.regressor == "conv":
                student_feature = interpolated(student_feature, (height, width))
            losses.append(mse(regress(student_feature), teacher_feature))
        return total(losses)
