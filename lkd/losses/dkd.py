"""Decoupled knowledge distillation (DKD)."""

from __future__ import annotations

from torch import Tensor

from lkd.losses._checks import check_temperature, check_weights
from lkd.losses._divergence import kl_divergence
from lkd.losses._labels import labelled_mean, log_binary, log_others, own_class
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def tckd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Target-class knowledge distillation (TCKD): the first term of `dkd_loss`.

    It is the divergence between the binary distributions of target class against all other classes.

    $$ \tau^2 \; \frac{1}{B} \sum_i \mathrm{KL}(b_{t,i} \,\|\, b_{s,i}), \quad
       b = (p_y, 1 - p_y), \; p = \mathrm{softmax}(z / \tau) $$

    Args:
        student_logits: Student logits `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.
        target: Class indices `(B,)`; samples with `IGNORE_INDEX` are excluded from the mean.
        temperature: Softmax temperature, greater than 0.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    Raises:
        ValueError: If there are fewer than 2 classes.

    References:
        Zhao et al.: Decoupled Knowledge Distillation, CVPR 2022 (arXiv 2203.08679).
    """
    own = own_class(target, student_logits)
    student, teacher = (log_binary(wide(logits) / temperature, own) for logits in (student_logits, teacher_logits))
    return temperature**2 * labelled_mean(kl_divergence(student, teacher), target)


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def nckd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Non-target-class knowledge distillation (NCKD): the second term of `dkd_loss`.

    It is the divergence between the distributions over the non-target classes.

    $$ \tau^2 \; \frac{1}{B} \sum_i \mathrm{KL}(\hat p_{t,i} \,\|\, \hat p_{s,i}), \quad
       \hat p = \mathrm{softmax}_{c \neq y}(z_c / \tau) $$

    Args:
        student_logits: Student logits `(B, K)`, with K at least 3.
        teacher_logits: Teacher logits `(B, K)`.
        target: Class indices `(B,)`; samples with `IGNORE_INDEX` are excluded from the mean.
        temperature: Softmax temperature, greater than 0.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    Raises:
        ValueError: If there are fewer than 3 classes.

    References:
        Zhao et al.: Decoupled Knowledge Distillation, CVPR 2022 (arXiv 2203.08679).
    """
    own = own_class(target, student_logits)
    student, teacher = (log_others(wide(logits) / temperature, own) for logits in (student_logits, teacher_logits))
    return temperature**2 * labelled_mean(kl_divergence(student, teacher), target)


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation loss: `alpha * tckd_loss + beta * nckd_loss`.

    `kd_loss` is the same sum with `alpha` equal to 1 and `beta` equal, for each sample, to the teacher's probability of
    the non-target classes. A confident teacher therefore suppresses the non-target term in `kd_loss`, but not here.

    Args:
        student_logits: Student logits `(B, K)`, with K at least 3.
        teacher_logits: Teacher logits `(B, K)`.
        target: Class indices `(B,)`; samples with `IGNORE_INDEX` are excluded from the mean.
        alpha: Weight of the target-class term.
        beta: Weight of the non-target-class term.
        temperature: Softmax temperature, greater than 0.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    Raises:
        ValueError: If there are fewer than 3 classes.

    References:
        Zhao et al.: Decoupled Knowledge Distillation, CVPR 2022 (arXiv 2203.08679).

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> round(dkd_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=2.0).item(), 4)
        0.5146
    """
    return alpha * tckd_loss(student_logits, teacher_logits, target, temperature) + beta * nckd_loss(
        student_logits, teacher_logits, target, temperature
    )


class DKD(DistillLoss):
    """Decoupled KD: weights target and non-target terms.

    Decoupled knowledge distillation splits the divergence of `KD` into a target-class and a non-target-class term (see
    `dkd_loss`), logged as `train/dkd_target` and `train/dkd_nontarget`. Samples without a label are excluded. The
    authors increase the weight of the loss linearly over the first 20 epochs (see `lkd.callbacks.Schedule`).

    Args:
        alpha: Weight of the target-class term.
        beta: Weight of the non-target-class term. The authors use, on CIFAR-100, 2 for resnet56 -> resnet20 and
            resnet110 -> resnet32, 6 between wide ResNets and for the teacher vgg13, and 8 for other pairs; on ImageNet,
            0.5 for ResNet-34 -> ResNet-18 and 2 for ResNet-50 -> MobileNet.
        temperature: Softmax temperature, greater than 0; 4 for CIFAR, 1 for ImageNet.

    Raises:
        ValueError: If a weight is negative or the temperature is not greater than 0. In `forward`, if there are fewer
            than 3 classes.

    References:
        Zhao et al.: Decoupled Knowledge Distillation, CVPR 2022 (arXiv 2203.08679).
    """

    skips_unlabelled = True

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        check_weights(alpha=alpha, beta=beta)
        self.alpha = alpha
        self.beta = beta
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the two terms of `dkd_loss`."""
        logits = student.logits, teacher.logits, batch.target
        return {
            "target": self.alpha * tckd_loss(*logits, self.temperature),
            "nontarget": self.beta * nckd_loss(*logits, self.temperature),
        }
