"""Prime-aware adaptive distillation (PAD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd.losses._adapters import channel_pairs, normalized_linear
from lkd.losses._checks import check_positive
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_feature="B D", teacher_feature="B D", log_variance="B D")
@full_precision
def pad_loss(student_feature: Tensor, teacher_feature: Tensor, log_variance: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Squared difference weighted by a predicted variance, plus the log-variance.

    $$ \frac{1}{B D} \sum \Big[ \frac{(f_t - f_s)^2}{e^{\lambda} + \epsilon} + \lambda \Big], \quad
       \lambda = \log \sigma^2 $$

    Args:
        student_feature: Student feature `(B, D)`.
        teacher_feature: Teacher feature `(B, D)`.
        log_variance: Predicted log-variance `(B, D)`.
        eps: Constant added to the variance, greater than 0.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Zhang et al.: Prime-Aware Adaptive Distillation, ECCV 2020 (arXiv 2008.01458). The mean over the elements
        follows torchdistill's code, which states that the authors use it.

    Example:
        >>> round(pad_loss(torch.ones(1, 4), torch.zeros(1, 4), torch.zeros(1, 4), eps=0.25).item(), 4)
        0.8
    """
    # 1 / (exp + eps) in log space: exp could overflow, and its gradient would be 0 * inf.
    precision = torch.logaddexp(log_variance, log_variance.new_full((), eps).log()).neg().exp()
    return ((teacher_feature - student_feature).square() * precision + log_variance).mean()


class PAD(DistillLoss):
    """Prime-aware adaptive KD: down-weight hard samples.

    A linear layer with BatchNorm predicts the log-variance of each element's difference from the teacher's feature,
    given the student's pooled feature (see `pad_loss`). Samples whose teacher feature is hard to match thus get a
    smaller weight. Where the feature sizes differ, another linear layer maps the student's feature to the size of the
    teacher's.

    Args:
        student_layers: Student layers whose pooled features are compared; the losses are summed.
        teacher_layers: Teacher layers, one for each student layer.
        eps: Constant added to the variance, greater than 0.

    Raises:
        ValueError: If `eps` is not greater than 0. At the start of training, if a layer does not return a pooled
            feature.

    References:
        Zhang et al.: Prime-Aware Adaptive Distillation, ECCV 2020 (arXiv 2008.01458). The authors start from a student
        trained without variances. The networks in the paper have features of equal size.
    """

    reads_logits = False

    def __init__(
        self,
        student_layers: Sequence[str] = ("@pooled",),
        teacher_layers: Sequence[str] = ("@pooled",),
        eps: float = 1e-6,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_positive("typically 1e-6", eps=eps)
        self.eps = eps

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the projectors and the variance heads."""
        projectors, heads = [], []
        for sizes in channel_pairs(self.pairs(student.outputs, teacher.outputs, dims=2)):
            projectors.append(nn.Identity() if sizes[0] == sizes[1] else nn.Linear(*sizes))
            heads.append(normalized_linear(*sizes))
        self.projectors = nn.ModuleList(projectors)
        self.log_variances = nn.ModuleList(heads)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `pad_loss` over the layers."""
        parts = zip(self.projectors, self.log_variances, self.pairs(student, teacher), strict=True)
        losses = [
            pad_loss(projector(student_feature), teacher_feature, log_variance(student_feature), self.eps)
            for projector, log_variance, (student_feature, teacher_feature) in parts
        ]
        return total(losses)
