"""Weighted soft labels distillation (WSLD)."""

from __future__ import annotations

import torch
from torch import Tensor

from lkd.losses._checks import check_temperature
from lkd.losses._labels import labelled_mean, own_class
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses._softmax import log_softmax, softmax
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def wsld_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Cross-entropy with the softened teacher, weighted per sample by the student's relative error.

    $$ \tau^2 \; \frac{1}{B} \sum_i w_i \Big( -\sum_c p_{t,ic} \log p_{s,ic} \Big), \quad
       w_i = 1 - \exp(-\mathrm{CE}_{s,i} / \mathrm{CE}_{t,i}), \; p = \mathrm{softmax}(z / \tau) $$

    CE is the cross-entropy with the label at temperature 1. Samples that the student already classifies well, compared
    with the teacher, get a small weight. No gradient flows through the weights. Where the student equals the teacher,
    the gradient is 0, but the loss is not.

    Args:
        student_logits: Student logits `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.
        target: Class indices `(B,)`; samples with `IGNORE_INDEX` are excluded from the mean.
        temperature: Softmax temperature, greater than 0.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Zhou et al.: Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective,
        ICLR 2021 (arXiv 2102.00650). The paper's factor alpha corresponds to `distill_weight`.
    """
    own, student_logits, teacher_logits = own_class(target, student_logits), wide(student_logits), wide(teacher_logits)
    student_ce, teacher_ce = (
        -log_softmax(logits.detach()).gather(1, own).squeeze(1) for logits in (student_logits, teacher_logits)
    )
    weight = 1 - torch.exp(-(student_ce / (teacher_ce + 1e-7)).clamp(min=0))  # 1e-7 as in the authors' code
    teacher = softmax(teacher_logits / temperature)
    soft_ce = -(teacher * log_softmax(student_logits / temperature)).sum(1)
    return temperature**2 * labelled_mean(weight * soft_ce, target)


class WSLD(DistillLoss):
    """Weighted soft labels: KD with per-sample weights.

    A sample gets a smaller weight the better the student classifies it, compared with the teacher (see `wsld_loss`).
    Samples without a label are excluded. The paper's alpha corresponds to `distill_weight` with `hard_weight` 1: 2.25
    with temperature 4 for CIFAR-100, and 2.5 with temperature 2 for ImageNet.

    Args:
        temperature: Softmax temperature, greater than 0.

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
        """Compute `wsld_loss`."""
        return wsld_loss(student.logits, teacher.logits, batch.target, self.temperature)
