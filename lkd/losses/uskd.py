"""Universal self-knowledge distillation (USKD)."""

from __future__ import annotations

from torch import Tensor, nn

from lkd.losses._checks import check_weights
from lkd.losses._labels import labelled_cross_entropy, labelled_mean, log_others, others, own_class
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses._softmax import log_softmax, softmax
from lkd.losses.base import DistillLoss, read_layers
from lkd.types import Batch, Outputs, Probe

_SMOOTHING = 0.1
"""Label smoothing of the weak head's cross-entropy."""


@check_shapes(student_logits="B K", target="B")
def _uskd_target(student_logits: Tensor, target: Tensor) -> Tensor:
    """Compute the target-class term: cross-entropy weighted by the student's confidence."""
    log_own = log_softmax(wide(student_logits)).gather(1, own_class(target, student_logits)).squeeze(1)
    squares = (2 * log_own.detach()).exp()
    return labelled_mean(-(squares + 1 - labelled_mean(squares, target)) * log_own, target)


@check_shapes(student_logits="B K", weak_logits="B K", target="B")
def _uskd_nontarget(student_logits: Tensor, weak_logits: Tensor, target: Tensor) -> Tensor:
    """Compute the non-target-class term: cross-entropy with Zipf's law over the ranks of the classes."""
    own, student_logits = own_class(target, student_logits), wide(student_logits)
    log_student = log_softmax(student_logits)
    weak = softmax(wide(weak_logits))
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
    r"""Cross-entropies with soft labels computed from the student's own and weak predictions.

    $$ \frac{1}{B} \sum_i \Big( -\alpha w_i \log p_{iy} - \beta \sum_{c \neq y} t_{ic} \log \hat p_{ic}
       - \mu \sum_c l_{ic} \log v_{ic} \Big) $$

    Here p is the student's softmax, $\hat p$ its softmax over the non-target classes, v the softmax of the weak logits,
    l the label smoothed by 0.1, and $w_i = p_{iy}^2 + 1 - \mathrm{mean}_j \, p_{jy}^2$, without gradient. The soft
    labels t of the non-target classes follow Zipf's law, 1 / rank, normalized to sum to 1. Classes are ranked by
    $v_c / (1 - v_y) + \log p_c / (1 - \log p_y)$.

    Args:
        student_logits: Student logits `(B, K)`, with K at least 3.
        weak_logits: Logits `(B, K)` of a linear head on an earlier feature.
        target: Class indices `(B,)`; samples with `IGNORE_INDEX` are excluded from the mean.
        alpha: Weight of the target-class term.
        beta: Weight of the non-target-class term.
        mu: Weight of the weak head's cross-entropy.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    Raises:
        ValueError: If there are fewer than 3 classes.

    References:
        Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023 (arXiv 2303.13005). The
        $\log p$ in the ranking follows the authors' code; the paper uses p.
    """
    return (
        alpha * _uskd_target(student_logits, target)
        + beta * _uskd_nontarget(student_logits, weak_logits, target)
        + mu * labelled_cross_entropy(weak_logits, target, _SMOOTHING)
    )


class USKD(DistillLoss):
    """Universal self-KD: soft labels from the student itself.

    The soft labels are computed from the student's own predictions and those of a weak head, a linear layer on an
    earlier feature that is trained with the student (see `uskd_loss`). A teacher is not needed. Samples without a label
    are excluded. The terms are logged as `train/uskd_target`, `train/uskd_nontarget` and `train/uskd_weak`.

    Args:
        student_layer: Student layer whose feature the weak head reads: `(B, C)`, or `(B, C, H, W)` with global average
            pooling.
        alpha: Weight of the target-class term.
        beta: Weight of the non-target-class term.
        mu: Weight of the weak head's cross-entropy.

    Raises:
        ValueError: If a weight is negative. At the start of training, if the feature has another number of dimensions.
            In `forward`, if there are fewer than 3 classes.

    References:
        Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023 (arXiv 2303.13005). The
        defaults are the authors' values for ImageNet. For CIFAR-100, the authors set all three weights to 0.1.
    """

    needs_teacher = False
    reads_logits = False
    compares_samples = True
    per_process = "image weights relative to the mean over images"
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
        """Create the weak head."""
        (layer,) = self.student_layers
        shape = tuple(read_layers(student.outputs, [layer])[0].shape)
        if len(shape) not in (2, 4):
            raise ValueError(
                f"USKD requires a feature (B, C) or (B, C, H, W), but the student layer {layer!r} returns {shape}; "
                "use another layer"
            )
        self.head = nn.Linear(shape[1], student.outputs.logits.shape[1])

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the three terms of `uskd_loss`."""
        (feature,) = (student.features[layer] for layer in self.student_layers)
        weak = self.head(feature.mean((2, 3)) if feature.ndim == 4 else feature)
        return {
            "target": self.alpha * _uskd_target(student.logits, batch.target),
            "nontarget": self.beta * _uskd_nontarget(student.logits, weak, batch.target),
            "weak": self.mu * labelled_cross_entropy(weak, batch.target, _SMOOTHING),
        }
