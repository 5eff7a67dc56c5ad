"""Normalized knowledge distillation (NKD)."""

from __future__ import annotations

from torch import Tensor

from lkd.losses._checks import check_temperature, check_weights
from lkd.losses._labels import labelled_mean, log_others, own_class
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses._softmax import log_softmax
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def _nkd_target(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Compute the target-class term of `nkd_loss`."""
    own = own_class(target, student_logits)
    student, teacher = (
        log_softmax(wide(logits)).gather(1, own).squeeze(1) for logits in (student_logits, teacher_logits)
    )
    return labelled_mean(-teacher.exp() * student, target)


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def _nkd_nontarget(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute the non-target term of `nkd_loss`: `nckd_loss` plus the teacher's entropy, which has no gradient."""
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
    r"""Normalized knowledge distillation loss: target and normalized non-target cross-entropies.

    $$ \frac{1}{B} \sum_i \Big( -p_{t,iy} \log p_{s,iy}
       - \gamma \tau^2 \sum_{c \neq y} \hat p_{t,ic} \log \hat p_{s,ic} \Big), \quad
       p = \mathrm{softmax}(z), \; \hat p = \mathrm{softmax}_{c \neq y}(z_c / \tau) $$

    The target term is the cross-entropy with the label, weighted by the teacher's probability of it. Both terms are
    cross-entropies, so the loss is not 0 where the student equals the teacher. The target term is minimal where the
    student assigns probability 1 to the label.

    Args:
        student_logits: Student logits `(B, K)`, with K at least 3.
        teacher_logits: Teacher logits `(B, K)`.
        target: Class indices `(B,)`; samples with `IGNORE_INDEX` are excluded from the mean.
        gamma: Weight of the non-target-class term.
        temperature: Softmax temperature of the non-target-class term, greater than 0.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    Raises:
        ValueError: If there are fewer than 3 classes.

    References:
        Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023 (arXiv 2303.13005).
    """
    return _nkd_target(student_logits, teacher_logits, target) + gamma * _nkd_nontarget(
        student_logits, teacher_logits, target, temperature
    )


class NKD(DistillLoss):
    """Normalized KD: target and normalized non-target terms.

    See `nkd_loss`. The terms are logged as `train/nkd_target` and `train/nkd_nontarget`. Samples without a label are
    excluded.

    Args:
        gamma: Weight of the non-target-class term.
        temperature: Softmax temperature of the non-target-class term, greater than 0.

    Raises:
        ValueError: If a weight is negative or the temperature is not greater than 0. In `forward`, if there are fewer
            than 3 classes.

    References:
        Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023 (arXiv 2303.13005). The
        defaults are the authors' values for ImageNet. For CIFAR-100, the authors use `gamma` 3.5 and `temperature` 3.
    """

    skips_unlabelled = True

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        check_weights(gamma=gamma)
        self.gamma = gamma
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the two terms of `nkd_loss`."""
        logits = student.logits, teacher.logits, batch.target
        return {
            "target": _nkd_target(*logits),
            "nontarget": self.gamma * _nkd_nontarget(*logits, self.temperature),
        }
