"""Refined logit distillation (RLD)."""

from __future__ import annotations

import torch
from torch import Tensor

from lkd.losses._checks import check_temperature, check_weights
from lkd.losses._divergence import kl_divergence
from lkd.losses._labels import labelled_mean, log_binary, own_class
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses._softmax import log_softmax
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def _scd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute the sample-confidence term of `rld_loss`."""
    student = log_binary(wide(student_logits) / temperature, own_class(target, student_logits))
    teacher = log_binary(wide(teacher_logits) / temperature, teacher_logits.argmax(1, keepdim=True))
    return temperature**2 * labelled_mean(kl_divergence(student, teacher), target)


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def _mcd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute the masked-correlation term of `rld_loss`."""
    masked = teacher_logits >= teacher_logits.gather(1, own_class(target, teacher_logits))
    is_empty = masked.all(1, keepdim=True)
    masked = masked & ~is_empty  # the softmax of an empty set is NaN; these samples are excluded below
    student, teacher = (
        log_softmax((wide(logits) / temperature).masked_fill(masked, -torch.inf)).masked_fill(masked, 0)
        for logits in (student_logits, teacher_logits)
    )
    divergence = kl_divergence(student, teacher).masked_fill(is_empty.squeeze(1), 0)
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
    r"""Refined logit distillation loss: sample confidence and masked correlation.

    $$ \alpha \tau_c^2 \; \frac{1}{B} \sum_i \mathrm{KL}(b_{t,i} \,\|\, b_{s,i})
       + \beta \tau^2 \; \frac{1}{B} \sum_i \mathrm{KL}(\hat p_{t,i} \,\|\, \hat p_{s,i}) $$

    The first term compares $b_t = (\max_c p_{t,c}, 1 - \max_c p_{t,c})$ with $b_s = (p_{s,y}, 1 - p_{s,y})$, both
    computed from the softmax at temperature $\tau_c$. In the second term, $\hat p$ is the softmax at temperature $\tau$
    over the classes that the teacher ranks below the label. Where the teacher is correct, the terms equal those of
    `dkd_loss`. The minimum 0 is reached by the teacher's logits with the largest logit and the label's logit exchanged.

    Args:
        student_logits: Student logits `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.
        target: Class indices `(B,)`; samples with `IGNORE_INDEX` are excluded from the mean.
        alpha: Weight of the sample-confidence term.
        beta: Weight of the masked-correlation term, which is 0 for samples where the teacher ranks no class below the
            label.
        temperature: Softmax temperature of the masked-correlation term, greater than 0.
        confidence_temperature: Softmax temperature of the sample-confidence term, greater than 0.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    Raises:
        ValueError: If there are fewer than 2 classes.

    References:
        Sun et al.: Knowledge Distillation with Refined Logits, ICCV 2025 (arXiv 2408.07703).
    """
    return alpha * _scd(student_logits, teacher_logits, target, confidence_temperature) + beta * _mcd(
        student_logits, teacher_logits, target, temperature
    )


class RLD(DistillLoss):
    """Refined logit distillation: DKD without teacher errors.

    The student learns the teacher's confidence for the correct class, and class correlations only among the classes
    that the teacher ranks below the label (see `rld_loss`). The terms are logged as `train/rld_confidence` and
    `train/rld_correlation`. Samples without a label are excluded. The authors increase the weight of the loss over the
    first 20 epochs (see `lkd.callbacks.Schedule`).

    Args:
        alpha: Weight of the sample-confidence term, which compares the student's probability of the label with the
            teacher's largest probability.
        beta: Weight of the masked-correlation term, over the classes that the teacher ranks below the label.
        temperature: Softmax temperature of the masked-correlation term, greater than 0.
        confidence_temperature: Softmax temperature of the sample-confidence term, greater than 0.

    Raises:
        ValueError: If a weight is negative or a temperature is not greater than 0. In `forward`, if there are fewer
            than 2 classes.

    References:
        Sun et al.: Knowledge Distillation with Refined Logits, ICCV 2025 (arXiv 2408.07703). The defaults are those of
        the authors' command for CIFAR-100. For ImageNet, the authors set both temperatures to 1 and `beta` to
        0.5 (ResNet-34 -> ResNet-18) or 2 (ResNet-50 -> MobileNet).
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
        """Compute the two terms of `rld_loss`."""
        logits = student.logits, teacher.logits, batch.target
        return {
            "confidence": self.alpha * _scd(*logits, self.confidence_temperature),
            "correlation": self.beta * _mcd(*logits, self.temperature),
        }
