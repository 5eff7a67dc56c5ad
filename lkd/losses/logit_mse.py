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
    r"""Mean squared difference of the logits.

    $$ \frac{1}{BK} \sum_{ic} (z_{s,ic} - z_{t,ic})^2 $$

    It is what `kd_loss` tends to at large temperatures, but for a factor and the logits' mean over the classes.

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.

    Returns:
        A scalar; float32 for logits in half precision, else the logits' type.

    References:
        Ba, Caruana: Do Deep Nets Really Need to be Deep?, NeurIPS 2014 (arXiv 1312.6184), who sum over the
        classes and halve.

    Example:
        >>> import torch
        >>> logit_mse_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 1.0]])).item()
        2.5
    """
    return F.mse_loss(wide(student_logits), wide(teacher_logits))


class LogitMSE(DistillLoss):
    """Regression of the logits themselves: their mean squared difference.

    References:
        Ba, Caruana: Do Deep Nets Really Need to be Deep?, NeurIPS 2014 (arXiv 1312.6184).
        Kim et al.: Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation,
        IJCAI 2021 (arXiv 2105.08919).
    """

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `logit_mse_loss`."""
        return logit_mse_loss(student.logits, teacher.logits)
