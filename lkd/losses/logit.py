"""Criteria that compare logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


def _wide(logits: Tensor) -> Tensor:
    """Half precision as float32: a softmax over many classes would lose its small probabilities."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _check_temperature(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(
            f"temperature must be greater than 0, got {temperature}; 1 leaves the teacher's probabilities as they are, "
            "larger values flatten them (4 is usual)"
        )
    return float(temperature)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Kullback-Leibler divergence of the softened teacher from the softened student.

    $$ \tau^2 \; \frac{1}{B} \sum_i \sum_c p_{ic} (\log p_{ic} - \log q_{ic}), \quad
       p = \mathrm{softmax}(z_t / \tau), \; q = \mathrm{softmax}(z_s / \tau) $$

    The factor temperature² keeps the size of the gradient when the temperature changes.

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        temperature: Greater than 0; a larger one flattens both distributions.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531), section 2.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> round(kd_loss(student, teacher, temperature=4.0).item(), 4)
        0.3309
    """
    student = F.log_softmax(_wide(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(_wide(teacher_logits) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class KD(DistillLoss):
    """Hinton's knowledge distillation: the student imitates the teacher's softened probabilities.

    Args:
        temperature: Greater than 0; a larger one flattens both distributions. 4 is usual for CIFAR, 1 for
            ImageNet.

    Raises:
        ValueError: If the temperature is not greater than 0.

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531).
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = _check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `kd_loss`."""
        return kd_loss(student.logits, teacher.logits, self.temperature)
