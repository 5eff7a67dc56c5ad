"""Transformed teacher matching (TTM) and weighted TTM (WTTM)."""

from __future__ import annotations

import torch
from torch import Tensor

from lkd.losses._checks import check_temperature
from lkd.losses._divergence import softened_kl
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses._softmax import log_softmax
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


def _transformed(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the divergence of the softened teacher from the unsoftened student `(B,)`."""
    return softened_kl(student_logits, wide(teacher_logits) / temperature, 1.0)


@check_shapes(student_logits="B K", teacher_logits="B K")
def ttm_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 10.0) -> Tensor:
    r"""Kullback-Leibler divergence between the softened teacher and the unsoftened student.

    $$ \frac{1}{B} \sum_i \mathrm{KL}(\mathrm{softmax}(z_{t,i} / \tau) \,\|\, \mathrm{softmax}(z_{s,i})) $$

    Softening by a temperature is the power transform $p^{\gamma} / \sum_c p_c^{\gamma}$ of the probabilities with
    $\gamma = 1 / \tau$. The minimum 0 is reached where the student's logits equal the teacher's divided by the
    temperature.

    Args:
        student_logits: Student logits `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.
        temperature: Softmax temperature of the teacher, greater than 0; 1 / gamma in the paper's notation.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024 (arXiv 2402.11148).

    Example:
        >>> student, teacher = torch.tensor([[1.5, 0.5, 0.0]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> ttm_loss(student, teacher, temperature=2.0).item()
        0.0
    """
    return _transformed(student_logits, teacher_logits, temperature).mean()


@check_shapes(student_logits="B K", teacher_logits="B K")
def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 5.0) -> Tensor:
    r"""`ttm_loss` with larger weights for samples whose teacher probabilities are flatter.

    $$ \frac{1}{B} \sum_i w_i \, \mathrm{KL}(\mathrm{softmax}(z_{t,i} / \tau) \,\|\, \mathrm{softmax}(z_{s,i})), \quad
       w_i = \sum_c \mathrm{softmax}(z_{t,i})_c^{1 / \tau} $$

    The weights range from 1 (one class has probability 1) to $K^{1 - 1/\tau}$ (uniform probabilities).

    Args:
        student_logits: Student logits `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.
        temperature: Softmax temperature of the teacher, greater than 0; 1 / gamma in the paper's notation.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024 (arXiv 2402.11148),
        section 4.
    """
    flatness = torch.logsumexp(log_softmax(wide(teacher_logits)) / temperature, dim=1).exp()
    return (flatness * _transformed(student_logits, teacher_logits, temperature)).mean()


class TTM(DistillLoss):
    """Transformed teacher matching: softens the teacher only.

    See `ttm_loss`.

    Args:
        temperature: Softmax temperature of the teacher, greater than 0; 1 / gamma in the paper's notation.

    Raises:
        ValueError: If the temperature is not greater than 0.

    References:
        Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024 (arXiv 2402.11148).
    """

    def __init__(self, temperature: float = 10.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute `ttm_loss`."""
        return ttm_loss(student.logits, teacher.logits, self.temperature)


class WTTM(DistillLoss):
    """TTM with larger weights for uncertain teacher outputs.

    Weighted transformed teacher matching (see `wttm_loss`).

    Args:
        temperature: Softmax temperature of the teacher, greater than 0; 1 / gamma in the paper's notation.

    Raises:
        ValueError: If the temperature is not greater than 0.

    References:
        Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024 (arXiv 2402.11148).
    """

    def __init__(self, temperature: float = 5.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute `wttm_loss`."""
        return wttm_loss(student.logits, teacher.logits, self.temperature)
