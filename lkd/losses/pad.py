"""Prime-aware adaptive distillation (PAD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd.losses._adapters import normalized_linear
from lkd.losses._checks import check_positive
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_feature="B D", teacher_feature="B D", log_variance="B D")
@full_precision
def pad_loss(student_feature: Tensor, teacher_feature: Tensor, log_variance: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Squared difference of two features, less where the predicted variance is large, and the variance's price.

    $$ \frac{1}{B D} \sum \Big[ \frac{(f_t - f_s)^2}{e^{\lambda} + \epsilon} + \lambda \Big], \quad
       \lambda = \log \sigma^2 $$

    Args:
        student_feature: `(B, D)`.
        teacher_feature: `(B, D)`.
        log_variance: `(B, D)`.
        eps: Added to the variance, greater than 0.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Zhang et al.: Prime-Aware Adaptive Distillation, ECCV 2020 (arXiv 2008.01458), with the mean over the elements
        of torchdistill's code, which tells that the authors take it.

    Example:
        >>> round(pad_loss(torch.ones(1, 4), torch.zeros(1, 4), torch.zeros(1, 4), eps=0.25).item(), 4)
        0.8
    """
    # 1 / (exp + eps) by logarithms: exp alone would overflow, and make its gradient 0 * inf.
    precision = torch.logaddexp(log_variance, log_variance.new_full((), eps).log()).neg().exp()
    return ((teacher_feature - student_feature).square() * precision + log_variance).mean()


class PAD(DistillLoss):
    """Prime-aware adaptive distillation: images whose teacher's feature is hard to reach count less.

    A linear layer with BatchNorm predicts, from the student's pooled feature, the log of the variance of the difference
    from the teacher's, for each element. Where the sizes differ, another linear layer brings the student's feature to
    the teacher's.

    Args:
        student_layers: Layers of the student whose pooled features it reads; the losses are added.
        teacher_layers: The teacher's, as many.
        eps: Added to the variance, greater than 0.

    Raises:
        ValueError: If `eps` is not greater than 0, or, in training, a layer returns no pooled feature.

    References:
        Zhang et al.: Prime-Aware Adaptive Distillation, ECCV 2020 (arXiv 2008.01458), who let it follow a training
        without variances. The paper's networks have features of equal size.
    """

    reads_logits = False

    def __init__(
        self,
        student_layers: Sequence[str] = ("@pooled",),
        teacher_layers: Sequence[str] = ("@pooled",),
        eps: float = 1e-6,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_positive("1e-6 is usual", eps=eps)
        self.eps = eps

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the projectors, and what predicts the variances."""
        projectors, heads = [], []
        for ours, theirs in self.pairs(student.outputs, teacher.outputs, dims=2):
            sizes = ours.shape[1], theirs.shape[1]
            projectors.append(nn.Identity() if sizes[0] == sizes[1] else nn.Linear(*sizes))
            heads.append(normalized_linear(*sizes))
        self.projectors = nn.ModuleList(projectors)
        self.log_variances = nn.ModuleList(heads)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The sum of `pad_loss` over the layers."""
        parts = zip(self.projectors, self.log_variances, self.pairs(student, teacher), strict=True)
        losses = [
            pad_loss(projector(ours), theirs, log_variance(ours), self.eps)
            for projector, log_variance, (ours, theirs) in parts
        ]
        return total(losses)
