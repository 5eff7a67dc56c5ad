"""Weighted soft labels distillation (WSLD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses._checks import check_temperature
from lkd.losses._labels import labelled_mean, own_class
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def wsld_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Cross-entropy with the softened teacher, in which a sample weighs less the better the student knows it.

    $$ \tau^2 \; \frac{1}{B} \sum_i w_i \Big( -\sum_c p_{t,ic} \log p_{s,ic} \Big), \quad
       w_i = 1 - \exp(-\mathrm{CE}_{s,i} / \mathrm{CE}_{t,i}), \; p = \mathrm{softmax}(z / \tau) $$

    CE is the cross-entropy with the label, at temperature 1; no gradient flows through the weights. The value is not
    0 where the student equals the teacher, but its gradient is.

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        target: `(B,)`; images without a label (`IGNORE_INDEX`) do not count.
        temperature: Greater than 0.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Zhou et al.: Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective,
        ICLR 2021 (arXiv 2102.00650), whose factor alpha is `distill_weight` here.
    """
    own, student_logits, teacher_logits = own_class(target, student_logits), wide(student_logits), wide(teacher_logits)
    student_ce, teacher_ce = (
        -F.log_softmax(logits.detach(), dim=1).gather(1, own).squeeze(1) for logits in (student_logits, teacher_logits)
    )
    weight = 1 - torch.exp(-(student_ce / (teacher_ce + 1e-7)).clamp(min=0))  # 1e-7: as the authors' code
    teacher = F.softmax(teacher_logits / temperature, dim=1)
    soft_ce = -(teacher * F.log_softmax(student_logits / temperature, dim=1)).sum(1)
    return temperature**2 * labelled_mean(weight * soft_ce, target)


class WSLD(DistillLoss):
    """Weighted soft labels: a sample weighs less the better the student knows its label, compared with the teacher.

    Images without a label do not count. The paper's alpha is `distill_weight`, beside `hard_weight` 1: 2.25 with
    temperature 4 for CIFAR-100, 2.5 with temperature 2 for ImageNet.

    Args:
        temperature: Greater than 0.

    Raises:
        ValueError: If the temperature is not greater than 0.

    References:
        Zhou et al.: Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective,
        ICLR 2021 (arXiv 2102.00650).
    """

    skips_unlabelled = True

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `wsld_loss`."""
        return wsld_loss(student.logits, teacher.logits, batch.target, self.temperature)
