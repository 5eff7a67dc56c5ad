"""Universal self-knowledge distillation (USKD)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses._checks import check_weights
from lkd.losses._labels import labelled_cross_entropy, labelled_mean, log_others, others, own_class
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, read_layers
from lkd.types import Batch, Outputs, Probe

_SMOOTHING = 0.1
"""Of the labels that USKD's weak head learns."""


@check_shapes(student_logits="B K", target="B")
def _uskd_target(student_logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with the label, weighed by how sure the student is of it."""
    log_own = F.log_softmax(wide(student_logits), dim=1).gather(1, own_class(target, student_logits)).squeeze(1)
    squares = (2 * log_own.detach()).exp()
    return labelled_mean(-(squares + 1 - labelled_mean(squares, target)) * log_own, target)


@check_shapes(student_logits="B K", weak_logits="B K", target="B")
def _uskd_nontarget(student_logits: Tensor, weak_logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the other classes with Zipf's law over their ranks."""
    own, student_logits = own_class(target, student_logits), wide(student_logits)
    log_student = F.log_softmax(student_logits, dim=1)
    weak = F.softmax(wide(weak_logits), dim=1)
    score = weak / (1 - weak.gather(1, own) + 1e-6) + log_student / (1 - log_student.gather(1, own) + 1e-6)
    rank = score.argsort(dim=1, descending=True).argsort(dim=1) + 1
    zipf = others(1 / rank.to(score.dtype), own)
    zipf = zipf / zipf.sum(1, keepdim=True)
    return labelled_mean(-(zipf * log_others(student_logits, own)).sum(1), target)


@check_shapes(student_logits="B K", weak_logits="B K", target="B")
def uskd_loss(
    student_logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
) -> Tensor:
    r"""Soft labels that the student makes for itself, from its own answer and a weak one.

    $$ \frac{1}{B} \sum_i \Big( -\alpha w_i \log p_{iy} - \beta \sum_{c \neq y} t_{ic} \log \hat p_{ic}
       - \mu \sum_c l_{ic} \log v_{ic} \Big) $$

    p is the student's softmax, $\hat p$ its softmax over the classes beside the label, v the weak softmax, l the label
    smoothed by 0.1, and $w_i = p_{iy}^2 + 1 - \mathrm{mean}_j \, p_{jy}^2$, without gradient. The labels t of the other
    classes follow Zipf's law, 1 / rank, normalised; the rank is that of
    $v_c / (1 - v_y) + \log p_c / (1 - \log p_y)$.

    Args:
        student_logits: `(B, K)`, K at least 3.
        weak_logits: `(B, K)`: what a linear head makes of an earlier feature.
        target: `(B,)`; images without a label (`IGNORE_INDEX`) do not count.
        alpha: Weight of the label.
        beta: Weight of the other classes.
        mu: Weight of the weak head's own loss.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    Raises:
        ValueError: If there are fewer than 3 classes.

    References:
        Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023 (arXiv 2303.13005). The
        rank's log p is the authors' code's; the paper has p there.
    """
    return (
        alpha * _uskd_target(student_logits, target)
        + beta * _uskd_nontarget(student_logits, weak_logits, target)
        + mu * labelled_cross_entropy(weak_logits, target, _SMOOTHING)
    )


class USKD(DistillLoss):
    """Universal self-knowledge distillation: soft labels from the student's own answer and a weak head's.

    The weak head, a linear layer on an earlier feature of the student, trains with it. The teacher's answers are not
    used, nor images without a label. Its curves are `train/uskd_target`, `train/uskd_nontarget` and
    `train/uskd_weak`.

    Args:
        student_layer: Layer of the student whose feature the weak head reads: `(B, C)`, or `(B, C, H, W)`, of which
            it takes the mean over the pixels.
        alpha: Weight of the label.
        beta: Weight of the other classes.
        mu: Weight of the weak head's own loss.

    Raises:
        ValueError: If a weight is negative, the layer's feature has another form, or, in training, there are fewer
            than 3 classes.

    References:
        Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023 (arXiv 2303.13005). The
        defaults are the authors' for ImageNet. For CIFAR-100 they take 0.1 for all three weights.
    """

    needs_teacher = False
    reads_logits = False
    compares_samples = True
    per_process = "weighs an image by the mean of its images"
    skips_unlabelled = True

    def __init__(
        self, student_layer: str = "@stage2", alpha: float = 1.0, beta: float = 0.1, mu: float = 0.005
    ) -> None:
        super().__init__([student_layer])
        check_weights(alpha=alpha, beta=beta, mu=mu)
        self.alpha = alpha
        self.beta = beta
        self.mu = mu

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the weak head."""
        (layer,) = self.student_layers
        shape = tuple(read_layers(student.outputs, [layer])[0].shape)
        if len(shape) not in (2, 4):
            raise ValueError(
                f"USKD reads a feature (B, C) or (B, C, H, W) of the student; its layer {layer!r} returns {shape}: "
                "name another layer"
            )
        self.head = nn.Linear(shape[1], student.outputs.logits.shape[1])

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The three parts of `uskd_loss`."""
        (feature,) = (student.features[layer] for layer in self.student_layers)
        weak = self.head(feature.mean((2, 3)) if feature.ndim == 4 else feature)
        return {
            "target": self.alpha * _uskd_target(student.logits, batch.target),
            "nontarget": self.beta * _uskd_nontarget(student.logits, weak, batch.target),
            "weak": self.mu * labelled_cross_entropy(weak, batch.target, _SMOOTHING),
        }
