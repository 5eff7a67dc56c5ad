"""Variational information distillation (VID)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses._adapters import channel_pairs, same_size
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(mean="B D H W", teacher_feature="B D H W", variance="D")
@full_precision
def vid_loss(mean: Tensor, teacher_feature: Tensor, variance: Tensor) -> Tensor:
    r"""Negative log-likelihood of the teacher's feature under a Gaussian predicted by the student.

    $$ \frac{1}{B D H W} \sum \frac{1}{2} \Big[ \frac{(\mu - F_t)^2}{\sigma_d^2} + \log \sigma_d^2 \Big] $$

    The constant log(2 pi) / 2 is omitted.

    Args:
        mean: Predicted mean `(B, D, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H, W)`.
        variance: Variance of each channel `(D,)`, greater than 0.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Ahn et al.: Variational Information Distillation for Knowledge Transfer, CVPR 2019 (arXiv 1904.05835). The mean
        over all elements follows the CIFAR-100 benchmark (Tian et al., arXiv 1910.10699).

    Example:
        >>> vid_loss(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.ones(1)).item()
        0.5
    """
    spread = variance.view(1, -1, 1, 1)
    return ((mean - teacher_feature).square() / spread + spread.log()).mean() / 2


class VID(DistillLoss):
    """Variational information: predict the teacher's features.

    Three 1x1 convolutions with ReLU in between predict the teacher's feature map. Each channel has a learned variance,
    so channels that the student cannot predict get a smaller weight (see `vid_loss`). The losses of the layers are
    summed. The larger map is average-pooled to the size of the smaller one first.

    Args:
        student_layers: Student layers whose feature maps are compared.
        teacher_layers: Teacher layers, one for each student layer.
        initial_variance: Initial variance of the channels, greater than `eps`.
        eps: Lower bound of the variance, greater than 0.

    Raises:
        ValueError: Unless 0 < eps < initial_variance. At the start of training, if a layer does not return a feature
            map.

    References:
        Ahn et al.: Variational Information Distillation for Knowledge Transfer, CVPR 2019 (arXiv 1904.05835). The width
        of the convolutions and the weight 1 follow the CIFAR-100 benchmark (Tian et al., arXiv 1910.10699).
    """

    reads_logits = False

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stages",),
        teacher_layers: Sequence[str] = ("@stages",),
        initial_variance: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if not 0 < eps < initial_variance < math.inf:
            raise ValueError(
                f"VID requires 0 < eps < initial_variance < inf, got eps {eps} and initial_variance "
                f"{initial_variance}; typically 1e-5 and 5"
            )
        self.initial_variance = initial_variance
        self.eps = eps

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the regressors and the variances."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=4)
        beyond = self.initial_variance - self.eps
        raw = beyond + math.log(-math.expm1(-beyond))  # inverse softplus; expm1(710) would overflow
        self.regressors = nn.ModuleList(_mean_regressor(*channels) for channels in channel_pairs(pairs))
        self.raw_variances = nn.ParameterList(
            torch.full((teacher_feature.shape[1],), raw) for _, teacher_feature in pairs
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `vid_loss` over the layers."""
        losses = []
        pairs = zip(self.regressors, self.raw_variances, self.pairs(student, teacher), strict=True)
        for regressor, raw, (student_feature, teacher_feature) in pairs:
            student_feature, teacher_feature = same_size(student_feature, teacher_feature)
            losses.append(vid_loss(regressor(student_feature), teacher_feature, F.softplus(raw) + self.eps))
        return total(losses)


def _mean_regressor(in_channels: int, out_channels: int) -> nn.Sequential:
    first, second, third = (
        nn.Conv2d(channels, out_channels, 1, bias=False) for channels in (in_channels, out_channels, out_channels)
    )
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
