"""Streamlined knowledge distillation (SKD)."""

from __future__ import annotations

import torch
from torch import Tensor

from lkd.losses._checks import check_positive, check_temperature, check_weights
from lkd.losses._divergence import softened_kl
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


@check_shapes(student_logits="B K", teacher_logits="B K")
def skd_instance_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """`kd_loss` without the factor temperature²: the instance term of `SKD`.

    Args:
        student_logits: Student logits `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.
        temperature: Softmax temperature, greater than 0; larger values flatten both distributions.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Jeong, Lee, Choi: Streamlined Knowledge Distillation, CVPR 2026.
    """
    return softened_kl(student_logits, teacher_logits, temperature).mean()


@check_shapes(student_logits="B K", teacher_logits="B K")
def skd_direction_loss(student_logits: Tensor, teacher_logits: Tensor, tikhonov: float = 0.1) -> Tensor:
    r"""Mahalanobis norm of the difference between Gram matrices: the direction term of `SKD`.

    $$ \frac{1}{B} \sum_i \sqrt{D_i^\top \Sigma^{-1} D_i}, \quad D = G_s - G_t, \;
       \Sigma = \mathrm{cov}(D) + \lambda I $$

    The Gram matrices G `(B, B)` contain the cosine similarities between the logits of the samples of a batch. In
    distributed training, each process uses its own samples. The linear system is solved in single precision or higher,
    also under autocast.

    Args:
        student_logits: Student logits `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.
        tikhonov: Regularization $\lambda$ added to the variances, greater than 0.

    Returns:
        Scalar loss, 0 for a single sample (float32 for half-precision inputs).

    References:
        Jeong, Lee, Choi: Streamlined Knowledge Distillation, CVPR 2026.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = (unit_vectors(wide(logits), dim=1) for logits in (student_logits, teacher_logits))
        difference = student @ student.T - teacher @ teacher.T
        centered = difference - difference.mean(0)
        num_samples = len(difference)
        covariance = centered.T @ centered / max(num_samples - 1, 1)
        covariance = covariance + tikhonov * torch.eye(num_samples, dtype=centered.dtype, device=centered.device)
        # torch.linalg.solve checks for singular matrices, which synchronizes with the device
        solved, _ = torch.linalg.solve_ex(covariance, difference.T)
        squares: Tensor = (difference * solved.T).sum(1)
        # the clamp makes the gradient 0 where student and teacher agree and the root is not differentiable
        return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt().mean()


class SKD(DistillLoss):
    """Streamlined KD: probabilities and logit directions.

    The loss combines softened probabilities (logged as `train/skd_instance`) with the cosine similarities between the
    samples of a batch (logged as `train/skd_direction`).

    Args:
        temperature: Softmax temperature, greater than 0. The loss has no factor temperature².
        tikhonov: Regularization added to the variances of the cosine differences, greater than 0. The default follows
            the authors' code; the paper does not state a value.
        direction_weight: Weight of the direction term, at least 0.

    Raises:
        ValueError: If the weight is negative, or if the temperature or `tikhonov` is not greater than 0.

    References:
        Jeong, Lee, Choi: Streamlined Knowledge Distillation, CVPR 2026.
    """

    compares_samples = True
    per_process = "cosine similarities between images"

    def __init__(self, temperature: float = 4.0, tikhonov: float = 0.1, direction_weight: float = 1.0) -> None:
        super().__init__()
        check_positive("which keeps the covariance invertible", tikhonov=tikhonov)
        check_weights(direction_weight=direction_weight)
        self.temperature = check_temperature(temperature)
        self.tikhonov = tikhonov
        self.direction_weight = direction_weight

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute `skd_instance_loss` and `skd_direction_loss`."""
        direction = skd_direction_loss(student.logits, teacher.logits, self.tikhonov)
        return {
            "instance": skd_instance_loss(student.logits, teacher.logits, self.temperature),
            "direction": self.direction_weight * direction,
        }
