"""Kullback-Leibler divergences."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes


def kl_divergence(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the teacher from the student, of each sample.

    Args:
        student_log_probs: `(B, K)`.
        teacher_log_probs: `(B, K)`.

    Returns:
        `(B,)`, in nats.
    """
    return F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True).sum(1)


@check_shapes(student_logits="B K", teacher_logits="B K", temperature=("", "B 1"))
def softened_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """`kl_divergence` of the softened probabilities, without the factor temperature².

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        temperature: Greater than 0: a number, or a tensor `()` or, with one temperature for each sample, `(B, 1)`.

    Returns:
        `(B,)`, in nats; float32 for logits in half precision, else the logits' type.
    """
    student, teacher = (F.log_softmax(wide(logits) / temperature, dim=1) for logits in (student_logits, teacher_logits))
    return kl_divergence(student, teacher)
