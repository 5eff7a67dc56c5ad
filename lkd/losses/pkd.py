"""Distillation with the Pearson correlation coefficient (PKD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses._adapters import aligner, channel_pairs
from lkd.losses._dense import interpolated, maps
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


def moments(owner: str, feature: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unbiased standard deviation and the mean of each channel over batch and pixels.

    Args:
        owner: Name of the function that calls this one, for the error message.
        feature: Feature map `(B, C, H, W)`.

    Returns:
        Standard deviations and means `(1, C, 1, 1)`.

    Raises:
        ValueError: If a channel has a single value.
    """
    values = feature[:, 0].numel()
    if values < 2:
        raise ValueError(f"{owner} requires at least 2 values in each channel, got {values}; use larger maps")
    std, mean = torch.std_mean(feature, dim=(0, 2, 3), keepdim=True)
    return std, mean


def standardized(owner: str, feature: Tensor, eps: float) -> Tensor:
    """Standardize the channels of a map: mean 0 and standard deviation 1 over batch and pixels.

    Args:
        owner: Name of the function that calls this one, for the error message.
        feature: Feature map `(B, C, H, W)`.
        eps: Constant added to the standard deviations.

    Returns:
        Feature map `(B, C, H, W)`.

    Raises:
        ValueError: If a channel has a single value.
    """
    std, mean = moments(owner, feature)
    return (feature - mean) / (std + eps)


@check_shapes(student_feature="B D H W", teacher_feature="B D H W")
@full_precision
def pkd_loss(student_feature: Tensor, teacher_feature: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Half the mean squared error between standardized feature maps.

    $$ \frac{1}{2 B D H W} \lVert z(F_s) - z(F_t) \rVert^2, \quad z(F) = \frac{F - \mu}{\sigma + \epsilon} $$

    The mean $\mu$ and the (unbiased) standard deviation $\sigma$ of each channel are computed over batch and pixels.
    For m = BHW values of each channel, the loss equals (m - 1) / m times one minus the Pearson correlation of student
    and teacher, averaged over the channels. In distributed training, each process uses its own samples.

    Args:
        student_feature: Student feature map `(B, D, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H, W)`.
        eps: Constant added to the standard deviations.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    Raises:
        ValueError: If a channel has a single value, that is, for one sample of one pixel.

    References:
        Cao et al.: PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient,
        NeurIPS 2022 (arXiv 2207.02039).

    Example:
        >>> feature = torch.rand(2, 3, 4, 4)
        >>> pkd_loss(5 * feature + 1, feature).item() < 1e-6
        True
    """
    student, teacher = (standardized("pkd_loss", feature, eps) for feature in (student_feature, teacher_feature))
    return F.mse_loss(student, teacher) / 2


class PKD(DistillLoss):
    """Distillation with the Pearson correlation coefficient: match standardized feature maps.

    The loss ignores the mean and the scale of each channel (see `pkd_loss`), so student and teacher may be detectors of
    different kinds. The losses of the layers are summed. Without layers, the maps of logits are compared. Where the
    numbers of channels differ, a 1x1 convolution that is trained with the student maps its channels to the teacher's.

    Args:
        student_layers: Student layers whose feature maps are compared, for example the outputs of an FPN.
        teacher_layers: Teacher layers, one for each student layer.
        resize_student: Whether to interpolate the student's maps to the size of the teacher's where the sizes differ.
            If not, the teacher's maps are interpolated to the size of the student's.

    Raises:
        ValueError: At the start of training, if a layer does not return a feature map.

    References:
        Cao et al.: PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient,
        NeurIPS 2022 (arXiv 2207.02039). The authors compare four FPN levels with 256 channels each, with the weight 6,
        or 10 for a RetinaNet as teacher and student. Their code has no convolution, and it compares only the heights to
        decide whether maps are resized.
    """

    reads_logits = False
    per_process = "mean and standard deviation of each channel"

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stages",),
        teacher_layers: Sequence[str] = ("@stages",),
        resize_student: bool = True,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.resize_student = resize_student

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the aligning convolutions."""
        pairs = maps(self, student.outputs, teacher.outputs)
        self.aligners = nn.ModuleList(aligner(*channels) for channels in channel_pairs(pairs))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `pkd_loss` over the layers."""
        losses = []
        for align, (student_feature, teacher_feature) in zip(self.aligners, maps(self, student, teacher), strict=True):
            height, width = (teacher_feature if self.resize_student else student_feature).shape[2:]
            student_feature, teacher_feature = (
                interpolated(feature, (height, width)) for feature in (student_feature, teacher_feature)
            )
            losses.append(pkd_loss(align(student_feature), teacher_feature))
        return total(losses)
