"""Kullback-Leibler divergences."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses._softmax import log_softmax


def kl_divergence(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the teacher from the student for each sample.

    Args:
        student_log_probs: Student log-probabilities `(B, K)`.
        teacher_log_probs: Teacher log-probabilities `(B, K)`.

    Returns:
        Divergences in nats `(B,)`.
    """
    return F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True).sum(1)


@check_shapes(student_logits="B K", teacher_logits="B K", temperature=("", "B 1"))
def softened_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """`kl_divergence` of softened probabilities, without the factor temperature².

    Args:
        student_logits: Student logits `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.
        temperature: Softmax temperature, greater than 0: a number, a tensor `()`, or one value per sample `(B, 1)`.

    Returns:
        Divergences in nats `(B,)` (float32 for half-precision inputs).
    """
    student, teacher = (log_softmax(wide(logits) / temperature) for logits in (student_logits, teacher_logits))
    return kl_divergence(student, teacher)
