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
    r"""Kullback-Leibler divergence of the softened teacher from the softened student.

    $$ \tau^2 \; \frac{1}{B} \sum_i \sum_c p_{ic} (\log p_{ic} - \log q_{ic}), \quad
       p = \mathrm{softmax}(z_t / \tau), \; q = \mathrm{softmax}(z_s / \tau) $$

    The factor temperature² keeps the size of the gradient when the temperature changes.

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        temperature: Greater than 0; a larger one flattens both distributions. A tensor, which may be learned, is `()`
            or, with one temperature for each sample, `(B, 1)`.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

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
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `kd_loss`."""
        return kd_loss(student.logits, teacher.logits, self.temperature)
