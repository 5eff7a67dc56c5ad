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
    """`kd_loss` without the factor temperature²: the first part of `SKD`.

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        temperature: Greater than 0; a larger one flattens both distributions.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Jeong, Lee, Choi: Streamlined Knowledge Distillation, CVPR 2026.
    """
    return softened_kl(student_logits, teacher_logits, temperature).mean()


@check_shapes(student_logits="B K", teacher_logits="B K")
def skd_direction_loss(student_logits: Tensor, teacher_logits: Tensor, tikhonov: float = 0.1) -> Tensor:
    r"""Mahalanobis length of the difference of the Gramian matrices: the second part of `SKD`.

    $$ \frac{1}{B} \sum_i \sqrt{D_i^\top \Sigma^{-1} D_i}, \quad D = G_s - G_t, \;
       \Sigma = \mathrm{cov}(D) + \lambda I $$

    G `(B, B)` holds the cosines between the logits of the batch's samples; with several processes, of each process's
    own. Computed in single precision at least, also under autocast: there is a linear system to solve.

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        tikhonov: $\lambda$, greater than 0: what is added to the variances.

    Returns:
        A scalar; float32 for logits in half precision, else the logits' type. 0 for a single sample.

    References:
        Jeong, Lee, Choi: Streamlined Knowledge Distillation, CVPR 2026.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = (unit_vectors(wide(logits), dim=1) for logits in (student_logits, teacher_logits))
        difference = student @ student.T - teacher @ teacher.T
        centred = difference - difference.mean(0)
        num_samples = len(difference)
        covariance = centred.T @ centred / max(num_samples - 1, 1)
        covariance = covariance + tikhonov * torch.eye(num_samples, dtype=centred.dtype, device=centred.device)
        # not torch.linalg.solve: its check for singular matrices, which these are not, waits for the device
        solved, _ = torch.linalg.solve_ex(covariance, difference.T)
        squares: Tensor = (difference * solved.T).sum(1)
        # where student and teacher agree, the root has no derivative: its gradient is 0 there
        return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt().mean()


class SKD(DistillLoss):
    """Streamlined knowledge distillation: the teacher's probabilities, and the directions of its logits.

    Its curves are `train/skd_instance` (softened probabilities) and `train/skd_direction` (cosines between the
    samples of the batch).

    Args:
        temperature: Greater than 0; softens the probabilities. There is no factor temperature².
        tikhonov: Greater than 0; added to the variances of the cosines' differences. 0.1 is the authors' code's; the
            paper does not say.
        direction_weight: Weight of the directions.

    Raises:
        ValueError: If the weight is negative, or the temperature or `tikhonov` is not greater than 0.

    References:
        Jeong, Lee, Choi: Streamlined Knowledge Distillation, CVPR 2026.
    """

    compares_samples = True
    per_process = "takes cosines of its images"

    def __init__(self, temperature: float = 4.0, tikhonov: float = 0.1, direction_weight: float = 1.0) -> None:
        super().__init__()
        check_positive("which keeps the covariance invertible", tikhonov=tikhonov)
        check_weights(direction_weight=direction_weight)
        self.temperature = check_temperature(temperature)
        self.tikhonov = tikhonov
        self.direction_weight = direction_weight

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """`skd_instance_loss` and `skd_direction_loss`."""
        direction = skd_direction_loss(student.logits, teacher.logits, self.tikhonov)
        return {
            "instance": skd_instance_loss(student.logits, teacher.logits, self.temperature),
            "direction": self.direction_weight * direction,
        }
