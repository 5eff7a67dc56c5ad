"""Refined logit distillation (RLD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses._checks import check_temperature, check_weights
from lkd.losses._divergence import kl_divergence
from lkd.losses._labels import labelled_mean, log_binary, own_class
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def _scd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The first part of `rld_loss`: sample confidence."""
    student = log_binary(wide(student_logits) / temperature, own_class(target, student_logits))
    teacher = log_binary(wide(teacher_logits) / temperature, teacher_logits.argmax(1, keepdim=True))
    return temperature**2 * labelled_mean(kl_divergence(student, teacher), target)


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def _mcd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The second part of `rld_loss`: masked correlation."""
    masked = teacher_logits >= teacher_logits.gather(1, own_class(target, teacher_logits))
    nothing_left = masked.all(1, keepdim=True)
    masked = masked & ~nothing_left  # a softmax of nothing is not a number; these samples are left out below
    student, teacher = (
        F.log_softmax((wide(logits) / temperature).masked_fill(masked, -torch.inf), dim=1).masked_fill(masked, 0)
        for logits in (student_logits, teacher_logits)
    )
    divergence = kl_divergence(student, teacher).masked_fill(nothing_left.squeeze(1), 0)
    return temperature**2 * labelled_mean(divergence, target)


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    confidence_temperature: float = 4.0,
) -> Tensor:
    r"""What a teacher that may err knows: how sure one can be, and how alike the classes are that it ranks below.

    $$ \alpha \tau_c^2 \; \frac{1}{B} \sum_i \mathrm{KL}(b_{t,i} \,\|\, b_{s,i})
       + \beta \tau^2 \; \frac{1}{B} \sum_i \mathrm{KL}(\hat p_{t,i} \,\|\, \hat p_{s,i}) $$

    $b_t = (\max_c p_{t,c}, 1 - \max_c p_{t,c})$ is compared with $b_s = (p_{s,y}, 1 - p_{s,y})$, both of the softmax
    at temperature $\tau_c$; $\hat p$ is the softmax at temperature $\tau$ over the classes that the teacher's logits
    rank below the label's. Where the teacher is right, these are the parts of `dkd_loss`. The minimum, 0, is the
    teacher with its largest logit and the label's exchanged.

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        target: `(B,)`; images without a label (`IGNORE_INDEX`) do not count.
        alpha: Weight of the first part (sample confidence).
        beta: Weight of the second part (masked correlation); it is 0 where the teacher ranks nothing below the
            label.
        temperature: Greater than 0; of the second part.
        confidence_temperature: Greater than 0; of the first part.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Sun et al.: Knowledge Distillation with Refined Logits, ICCV 2025 (arXiv 2408.07703).
    """
    return alpha * _scd(student_logits, teacher_logits, target, confidence_temperature) + beta * _mcd(
        student_logits, teacher_logits, target, temperature
    )


class RLD(DistillLoss):
    """Refined logit distillation: `DKD` that does not pass on the teacher's errors.

    Its curves are `train/rld_confidence` and `train/rld_correlation`. The authors let its weight grow over 20 epochs
    (`lkd.callbacks.Schedule`). Images without a label do not count.

    Args:
        alpha: Weight of the first part: the student shall be as sure of the label as the teacher of its first choice.
        beta: Weight of the second part: the classes that the teacher ranks below the label.
        temperature: Greater than 0; of the second part.
        confidence_temperature: Greater than 0; of the first part.

    Raises:
        ValueError: If a weight is negative or a temperature is not greater than 0.

    References:
        Sun et al.: Knowledge Distillation with Refined Logits, ICCV 2025 (arXiv 2408.07703). The defaults are those of
        the authors' command for CIFAR-100. For ImageNet they take `beta` 0.5 and 1 for both temperatures.
    """

    skips_unlabelled = True

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        confidence_temperature: float = 4.0,
    ) -> None:
        super().__init__()
        check_weights(alpha=alpha, beta=beta)
        self.alpha = alpha
        self.beta = beta
        self.temperature = check_temperature(temperature)
        self.confidence_temperature = check_temperature(confidence_temperature, "confidence_temperature")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The two parts of `rld_loss`."""
        logits = student.logits, teacher.logits, batch.target
        return {
            "confidence": self.alpha * _scd(*logits, self.confidence_temperature),
            "correlation": self.beta * _mcd(*logits, self.temperature),
        }
