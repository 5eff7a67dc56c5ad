"""Mean squared error between logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


@check_shapes(student_logits="B K", teacher_logits="B K")
def logit_mse_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Mean squared error between student and teacher logits.

    $$ \frac{1}{BK} \sum_{ic} (z_{s,ic} - z_{t,ic})^2 $$

    It is the limit of `kd_loss` for large temperatures, up to a constant factor and the mean of the logits over the
    classes.

    Args:
        student_logits: Student logits `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Ba, Caruana: Do Deep Nets Really Need to be Deep?, NeurIPS 2014 (arXiv 1312.6184). The paper sums over the
        classes and multiplies by 1/2.

    Example:
        >>> import torch
        >>> logit_mse_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 1.0]])).item()
        2.5
    """
    return F.mse_loss(wide(student_logits), wide(teacher_logits))


class LogitMSE(DistillLoss):
    """Mean squared error between student and teacher logits.

    References:
        Ba, Caruana: Do Deep Nets Really Need to be Deep?, NeurIPS 2014 (arXiv 1312.6184).
        Kim et al.: Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation,
        IJCAI 2021 (arXiv 2105.08919).
    """

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute `logit_mse_loss`."""
        return logit_mse_loss(student.logits, teacher.logits)
