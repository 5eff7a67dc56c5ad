"""Teacher-free knowledge distillation (Tf-KD)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lkd.losses._checks import check_classes, check_temperature
from lkd.losses._divergence import softened_kl
from lkd.losses._labels import labelled_mean, own_class
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss
from lkd.types import Batch, Outputs


@check_shapes(student_logits="B K", target="B")
def tfkd_loss(
    student_logits: Tensor, target: Tensor, temperature: float = 20.0, correct_probability: float = 0.99
) -> Tensor:
    r"""Divergence from a virtual teacher that is confident of the label and uniform over the other classes.

    $$ \tau^2 \; \frac{1}{B} \sum_i
       \mathrm{KL}(\mathrm{softmax}(\log u_i / \tau) \,\|\, \mathrm{softmax}(z_{s,i} / \tau)), \quad
       u_{ic} = a \text{ if } c = y_i \text{ else } (1 - a) / (K - 1) $$

    Args:
        student_logits: Student logits `(B, K)`.
        target: Class indices `(B,)`; samples with `IGNORE_INDEX` are excluded from the mean.
        temperature: Softmax temperature, greater than 0.
        correct_probability: Probability a of the label under the virtual teacher, between 0 and 1.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    References:
        Yuan et al.: Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020 (arXiv 1909.11723),
        regularization Tf-KD_reg of the paper, with the factor $\tau^2$ of KD. The authors' code differs: it uses the
        softmax of u / tau instead of log u / tau, keeps the student at temperature 1, and replaces $\tau^2$ by a factor
        that depends on the network, 100 / K for most networks.
    """
    student_logits = wide(student_logits)
    check_classes(student_logits, 2, "distributes the remaining probability over the other classes")
    own = own_class(target, student_logits)
    rest = math.log((1 - correct_probability) / (student_logits.shape[1] - 1))
    virtual = torch.full_like(student_logits, rest).scatter(1, own, math.log(correct_probability))
    return temperature**2 * labelled_mean(softened_kl(student_logits, virtual, temperature), target)


class TfKD(DistillLoss):
    """Teacher-free KD: label smoothing with a virtual teacher.

    The virtual teacher assigns a high probability to the label (see `tfkd_loss`), which amounts to label smoothing at a
    high temperature. A teacher network is not needed. Samples without a label are excluded. The other variant of the
    paper, a student that learns from a previously trained copy of itself, corresponds to `KD` with that copy as the
    teacher.

    Args:
        temperature: Softmax temperature, greater than 0; the paper uses 20 and more.
        correct_probability: Probability of the label under the virtual teacher, between 0 and 1.

    Raises:
        ValueError: If the temperature is not greater than 0, or if the probability is not between 0 and 1.

    References:
        Yuan et al.: Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020 (arXiv 1909.11723).
        The authors' code differs (see `tfkd_loss`): its weight 0.1 and temperature 20 for ResNet-18 on CIFAR-100 apply
        to that version of the loss.
    """

    needs_teacher = False
    reads_logits = False
    skips_unlabelled = True

    def __init__(self, temperature: float = 20.0, correct_probability: float = 0.99) -> None:
        super().__init__()
        if not 0 < correct_probability < 1:
            raise ValueError(f"correct_probability must be between 0 and 1, got {correct_probability}; typically 0.99")
        self.temperature = check_temperature(temperature)
        self.correct_probability = correct_probability

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute `tfkd_loss`."""
        return tfkd_loss(student.logits, batch.target, self.temperature, self.correct_probability)
