"""Normalized knowledge distillation (NKD)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lkd.losses._checks import check_temperature, check_weights
from lkd.losses._labels import labelled_mean, log_others, own_class
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def _nkd_target(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """The first part of `nkd_loss`."""
    own = own_class(target, student_logits)
    student, teacher = (
        F.log_softmax(wide(logits), dim=1).gather(1, own).squeeze(1) for logits in (student_logits, teacher_logits)
    )
    return labelled_mean(-teacher.exp() * student, target)


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def _nkd_nontarget(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The second part of `nkd_loss`: `nckd_loss` and the teacher's entropy, which has no gradient."""
    own = own_class(target, student_logits)
    student, teacher = (log_others(wide(logits) / temperature, own) for logits in (student_logits, teacher_logits))
    return temperature**2 * labelled_mean(-(teacher.exp() * student).sum(1), target)


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> Tensor:
    r"""Cross-entropy with the label, as far as the teacher is sure of it, and between the other classes.

    $$ \frac{1}{B} \sum_i \Big( -p_{t,iy} \log p_{s,iy}
       - \gamma \tau^2 \sum_{c \neq y} \hat p_{t,ic} \log \hat p_{s,ic} \Big), \quad
       p = \mathrm{softmax}(z), \; \hat p = \mathrm{softmax}_{c \neq y}(z_c / \tau) $$

    Both parts are cross-entropies: the value is not 0 where the student equals the teacher, and the first part
    is least where the student is sure of the label.

    Args:
        student_logits: `(B, K)`, K at least 3.
        teacher_logits: `(B, K)`.
        target: `(B,)`; images without a label (`IGNORE_INDEX`) do not count.
        gamma: Weight of the other classes' part.
        temperature: Greater than 0; softens the other classes' part alone.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    Raises:
        ValueError: If there are fewer than 3 classes.

    References:
        Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023 (arXiv 2303.13005).
    """
    return _nkd_target(student_logits, teacher_logits, target) + gamma * _nkd_nontarget(
        student_logits, teacher_logits, target, temperature
    )


class NKD(DistillLoss):
    """Normalised knowledge distillation: the label's cross-entropy as sure as the teacher, and the other classes.

    Its curves are `train/nkd_target` and `train/nkd_nontarget`. Images without a label do not count.

    Args:
        gamma: Weight of the other classes' part.
        temperature: Greater than 0; softens the other classes' part alone.

    Raises:
        ValueError: If a weight is negative, the temperature is not greater than 0, or, in training, there are
            fewer than 3 classes.

    References:
        Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023 (arXiv 2303.13005). The
        defaults are the authors' for ImageNet. For CIFAR-100 they take `gamma` 3.5 and `temperature` 3.
    """

    skips_unlabelled = True

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        check_weights(gamma=gamma)
        self.gamma = gamma
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The two parts of `nkd_loss`."""
        logits = student.logits, teacher.logits, batch.target
        return {
            "target": _nkd_target(*logits),
            "nontarget": self.gamma * _nkd_nontarget(*logits, self.temperature),
        }
