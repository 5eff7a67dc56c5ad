"""Knowledge distillation (KD) with softened probabilities."""

from __future__ import annotations

from torch import Tensor

from lkd.losses._checks import check_temperature
from lkd.losses._divergence import softened_kl
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


@check_shapes(student_logits="B K", teacher_logits="B K", temperature=("", "B 1"))
def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 4.0) -> Tensor:
    r"""Kullback-Leibler divergence between softened teacher and student probabilities.

    $$ \tau^2 \; \frac{1}{B} \sum_i \sum_c p_{ic} (\log p_{ic} - \log q_{ic}), \quad
       p = \mathrm{softmax}(z_t / \tau), \; q = \mathrm{softmax}(z_s / \tau) $$

    The factor temperature² keeps the gradient magnitude independent of the temperature.

    Args:
        student_logits: Student logits `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.
        temperature: Softmax temperature, greater than 0; larger values flatten both distributions. A tensor, which may
            require gradients, has the shape `()` or, with one temperature per sample, `(B, 1)`.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531), section 2.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> round(kd_loss(student, teacher, temperature=4.0).item(), 4)
        0.3309
    """
    return (softened_kl(student_logits, teacher_logits, temperature).unsqueeze(1) * temperature**2).mean()


class KD(DistillLoss):
    """Knowledge distillation (KD) with softened probabilities.

    The student matches the teacher's softened class probabilities (see `kd_loss`).

    Args:
        temperature: Softmax temperature, greater than 0; larger values flatten both distributions. Common values are 4
            for CIFAR and 1 for ImageNet.

    Raises:
        ValueError: If the temperature is not greater than 0.

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531).
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute `kd_loss`."""
        return kd_loss(student.logits, teacher.logits, self.temperature)
