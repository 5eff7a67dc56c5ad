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
    r"""Hinton's loss with a virtual teacher: sure of the label, and indifferent to all other classes.

    $$ \tau^2 \; \frac{1}{B} \sum_i
       \mathrm{KL}(\mathrm{softmax}(\log u_i / \tau) \,\|\, \mathrm{softmax}(z_{s,i} / \tau)), \quad
       u_{ic} = a \text{ if } c = y_i \text{ else } (1 - a) / (K - 1) $$

    Args:
        student_logits: `(B, K)`.
        target: `(B,)`; images without a label (`IGNORE_INDEX`) do not count.
        temperature: Greater than 0.
        correct_probability: a, between 0 and 1: the virtual teacher's probability of the label.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Yuan et al.: Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020
        (arXiv 1909.11723), the paper's regularisation Tf-KD_reg; the factor $\tau^2$ is Hinton's. The authors' code
        differs: it takes the softmax of u / tau, not of log u / tau, leaves the student at temperature 1, and has a
        factor of its own for each network, 100 / K for most, in place of $\tau^2$.
    """
    student_logits = wide(student_logits)
    check_classes(student_logits, 2, "spreads what the target leaves over the other classes")
    own = own_class(target, student_logits)
    rest = math.log((1 - correct_probability) / (student_logits.shape[1] - 1))
    virtual = torch.full_like(student_logits, rest).scatter(1, own, math.log(correct_probability))
    return temperature**2 * labelled_mean(softened_kl(student_logits, virtual, temperature), target)


class TfKD(DistillLoss):
    """Teacher-free distillation: a virtual teacher that is nearly sure of the label.

    It is label smoothing at a high temperature; the teacher's answers are not used, nor images without a label. The
    paper's other form, a student that learns from an earlier training of itself, is `KD` with that teacher.

    Args:
        temperature: Greater than 0; the paper takes 20 and more.
        correct_probability: The virtual teacher's probability of the label, between 0 and 1.

    Raises:
        ValueError: If the temperature is not greater than 0, or the probability not between 0 and 1.

    References:
        Yuan et al.: Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020
        (arXiv 1909.11723). `tfkd_loss` says where the authors' code differs: its weight 0.1 and temperature 20 for
        ResNet-18 on CIFAR-100 belong to that loss.
    """

    needs_teacher = False
    reads_logits = False
    skips_unlabelled = True

    def __init__(self, temperature: float = 20.0, correct_probability: float = 0.99) -> None:
        super().__init__()
        if not 0 < correct_probability < 1:
            raise ValueError(f"correct_probability must be between 0 and 1, got {correct_probability}; 0.99 is usual")
        self.temperature = check_temperature(temperature)
        self.correct_probability = correct_probability

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `tfkd_loss`."""
        return tfkd_loss(student.logits, batch.target, self.temperature, self.correct_probability)
