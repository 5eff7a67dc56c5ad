"""Distillation from a stronger teacher (DIST)."""

from __future__ import annotations

import torch
from torch import Tensor

from lkd.losses._checks import check_positive, check_temperature, check_weights
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses._softmax import softmax
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


def decorrelation(student: Tensor, teacher: Tensor, dim: int, eps: float) -> Tensor:
    """One minus the mean Pearson correlation.

    Args:
        student: Tensor of any shape.
        teacher: Tensor of the same shape.
        dim: Dimension along which the two tensors are correlated.
        eps: Constant added to the product of the norms.

    Returns:
        Scalar between 0 and 2.
    """
    student, teacher = (values - values.mean(dim, keepdim=True) for values in (student, teacher))
    norms: Tensor = torch.linalg.vector_norm(student, dim=dim) * torch.linalg.vector_norm(teacher, dim=dim)
    return 1 - ((student * teacher).sum(dim) / (norms + eps)).mean()


@check_shapes(student_logits="B K", teacher_logits="B K")
def _terms(student_logits: Tensor, teacher_logits: Tensor, temperature: float, eps: float) -> tuple[Tensor, Tensor]:
    """Return the inter-class and the intra-class term of `dist_loss` without their weights."""
    student, teacher = (softmax(wide(logits) / temperature) for logits in (student_logits, teacher_logits))
    inter, intra = (temperature**2 * decorrelation(student, teacher, dim, eps) for dim in (1, 0))
    return inter, intra


@check_shapes(student_logits="B K", teacher_logits="B K")
def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    r"""One minus the Pearson correlation of probabilities, within samples and within classes.

    $$ \beta \tau^2 \Big( 1 - \frac{1}{B} \sum_i \rho(q_{i \cdot}, p_{i \cdot}) \Big)
       + \gamma \tau^2 \Big( 1 - \frac{1}{K} \sum_c \rho(q_{\cdot c}, p_{\cdot c}) \Big) $$

    Here $\rho$ is Pearson's correlation, and p and q are the softmax probabilities of teacher and student at
    temperature $\tau$. The second term correlates the probabilities of a class over the samples of a batch. In
    distributed training, each process uses its own samples.

    Args:
        student_logits: Student logits `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.
        beta: Weight of the inter-class term (classes of one sample).
        gamma: Weight of the intra-class term (samples of one class).
        temperature: Softmax temperature, greater than 0.
        eps: Constant added to the product of the norms in $\rho$.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Huang et al.: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022 (arXiv 2205.10536). The factor
        $\tau^2$ follows the authors' code.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> round(dist_loss(student, teacher).item(), 4)
        0.0
    """
    inter, intra = _terms(student_logits, teacher_logits, temperature, eps)
    return beta * inter + gamma * intra


class DIST(DistillLoss):
    """Distillation from a stronger teacher: correlation loss.

    The loss depends on the correlation of the probabilities, not on their exact values (see `dist_loss`). It logs
    `train/dist_inter` (classes of one sample) and `train/dist_intra` (samples of one class).

    Args:
        beta: Weight of the inter-class term (classes of one sample).
        gamma: Weight of the intra-class term (samples of one class).
        temperature: Softmax temperature, greater than 0; 4 for CIFAR, 1 for ImageNet.
        eps: Constant added to the product of the norms in the correlation, greater than 0.

    Raises:
        ValueError: If a weight is negative, or if the temperature or `eps` is not greater than 0.

    References:
        Huang et al.: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022 (arXiv 2205.10536).
    """

    compares_samples = True
    per_process = "correlations over images within a class"

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, eps: float = 1e-8) -> None:
        super().__init__()
        check_weights(beta=beta, gamma=gamma)
        check_positive("typically 1e-8", eps=eps)
        self.beta = beta
        self.gamma = gamma
        self.temperature = check_temperature(temperature)
        self.eps = eps

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the two terms of `dist_loss`."""
        inter, intra = _terms(student.logits, teacher.logits, self.temperature, self.eps)
        return {"inter": self.beta * inter, "intra": self.gamma * intra}
