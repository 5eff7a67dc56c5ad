"""Transformed teacher matching (TTM) and weighted TTM (WTTM)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses._checks import check_temperature
from lkd.losses._divergence import softened_kl
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


def _transformed(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened teacher from the student as it is, `(B,)`."""
    return softened_kl(student_logits, wide(teacher_logits) / temperature, 1.0)


@check_shapes(student_logits="B K", teacher_logits="B K")
def ttm_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 10.0) -> Tensor:
    r"""Kullback-Leibler divergence of the softened teacher from the student, which is not softened.

    $$ \frac{1}{B} \sum_i \mathrm{KL}(\mathrm{softmax}(z_{t,i} / \tau) \,\|\, \mathrm{softmax}(z_{s,i})) $$

    Softening is the power transform $p^{\gamma} / \sum_c p_c^{\gamma}$ of the probabilities, $\gamma = 1 / \tau$.
    The minimum, 0, is where the student's logits are the teacher's, divided by the temperature.

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        temperature: Greater than 0: 1 / the paper's exponent gamma.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

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
    r"""`ttm_loss`, in which a sample weighs more the flatter the teacher's probabilities are.

    $$ \frac{1}{B} \sum_i w_i \, \mathrm{KL}(\mathrm{softmax}(z_{t,i} / \tau) \,\|\, \mathrm{softmax}(z_{s,i})), \quad
       w_i = \sum_c \mathrm{softmax}(z_{t,i})_c^{1 / \tau} $$

    The weight lies between 1 (one class has it all) and $K^{1 - 1/\tau}$ (all classes alike).

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        temperature: Greater than 0: 1 / the paper's exponent gamma.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024 (arXiv 2402.11148),
        section 4.
    """
    flatness = torch.logsumexp(F.log_softmax(wide(teacher_logits), dim=1) / temperature, dim=1).exp()
    return (flatness * _transformed(student_logits, teacher_logits, temperature)).mean()


class TTM(DistillLoss):
    """Transformed teacher matching: the teacher is softened, the student is not.

    Args:
        temperature: Greater than 0; softens the teacher. It is 1 / the paper's exponent gamma.

    Raises:
        ValueError: If the temperature is not greater than 0.

    References:
        Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024 (arXiv 2402.11148).
    """

    def __init__(self, temperature: float = 10.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `ttm_loss`."""
        return ttm_loss(student.logits, teacher.logits, self.temperature)


class WTTM(DistillLoss):
    """Weighted transformed teacher matching: `TTM`, and the less sure the teacher, the more a sample weighs.

    Args:
        temperature: Greater than 0; softens the teacher. It is 1 / the paper's exponent gamma.

    Raises:
        ValueError: If the temperature is not greater than 0.

    References:
        Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024 (arXiv 2402.11148).
    """

    def __init__(self, temperature: float = 5.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `wttm_loss`."""
        return wttm_loss(student.logits, teacher.logits, self.temperature)
