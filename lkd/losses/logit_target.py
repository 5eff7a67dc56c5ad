"""Criteria that compare logits and treat the target class apart.

An image without a label (target `IGNORE_INDEX`) counts in none of them: each is a mean over the images that have one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses.base import DistillLoss
from lkd.losses.checks import check_classes, check_temperature, check_weights
from lkd.losses.labels import labelled_mean, log_others, others, own_class
from lkd.losses.logit import kl_divergence
from lkd.losses.precision import wide
from lkd.losses.shapes import check_shapes
from lkd.types import Batch, Outputs


def _log_or_not(logits: Tensor, own: Tensor) -> Tensor:
    """Log-probabilities `(B, 2)` of one class, and of all others together."""
    check_classes(logits, 2, "compares one class with all others")
    log_p = F.log_softmax(logits, dim=1)
    return torch.stack([log_p.gather(1, own).squeeze(1), others(log_p, own).logsumexp(1)], dim=1)


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def tckd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Divergence between the probabilities of the target and of all else: the first part of `dkd_loss`.

    $$ \tau^2 \; \frac{1}{B} \sum_i \mathrm{KL}(b_{t,i} \,\|\, b_{s,i}), \quad
       b = (p_y, 1 - p_y), \; p = \mathrm{softmax}(z / \tau) $$

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        target: `(B,)`; images without a label (`IGNORE_INDEX`) do not count.
        temperature: Greater than 0.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Zhao et al.: Decoupled Knowledge Distillation, CVPR 2022 (arXiv 2203.08679).
    """
    own = own_class(target, student_logits)
    student, teacher = (_log_or_not(wide(logits) / temperature, own) for logits in (student_logits, teacher_logits))
    return temperature**2 * labelled_mean(kl_divergence(student, teacher), target)


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def nckd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Divergence between the probabilities of the other classes: the second part of `dkd_loss`.

    $$ \tau^2 \; \frac{1}{B} \sum_i \mathrm{KL}(\hat p_{t,i} \,\|\, \hat p_{s,i}), \quad
       \hat p = \mathrm{softmax}_{c \neq y}(z_c / \tau) $$

    Args:
        student_logits: `(B, K)`, K at least 3.
        teacher_logits: `(B, K)`.
        target: `(B,)`; images without a label (`IGNORE_INDEX`) do not count.
        temperature: Greater than 0.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

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
    r"""Hinton's loss taken apart: `alpha * tckd_loss + beta * nckd_loss`.

    `kd_loss` is the same sum with alpha 1 and beta the teacher's probability of the other classes, sample by
    sample: the surer the teacher, the less the student would learn of them.

    Args:
        student_logits: `(B, K)`, K at least 3.
        teacher_logits: `(B, K)`.
        target: `(B,)`; images without a label (`IGNORE_INDEX`) do not count.
        alpha: Weight of the target's part.
        beta: Weight of the other classes' part.
        temperature: Greater than 0.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    Raises:
        ValueError: If there are fewer than 3 classes.

    References:
        Zhao et al.: Decoupled Knowledge Distillation, CVPR 2022 (arXiv 2203.08679).

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> round(dkd_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=2.0).item(), 4)
        0.5146
    """
    return alpha * tckd_loss(student_logits, teacher_logits, target, temperature) + beta * nckd_loss(
        student_logits, teacher_logits, target, temperature
    )


class DKD(DistillLoss):
    """Decoupled knowledge distillation: how sure of the target, and how alike the other classes, weighed apart.

    Its curves are `train/dkd_target` and `train/dkd_nontarget`. The authors let its weight grow over 20 epochs
    (`lkd.callbacks.Schedule`). Images without a label do not count.

    Args:
        alpha: Weight of the target's part.
        beta: Weight of the other classes' part. On CIFAR-100 the authors take 2 for resnet56 -> resnet20 and
            resnet110 -> resnet32, 6 between wide ResNets and for what vgg13 teaches, 8 for other pairs; on ImageNet
            0.5 for ResNet-34 -> ResNet-18.
        temperature: Greater than 0; 4 for CIFAR, 1 for ImageNet.

    Raises:
        ValueError: If a weight is negative, the temperature is not greater than 0, or, in training, there are
            fewer than 3 classes.

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
        """The two parts of `dkd_loss`."""
        logits = student.logits, teacher.logits, batch.target
        return {
            "target": self.alpha * tckd_loss(*logits, self.temperature),
            "nontarget": self.beta * nckd_loss(*logits, self.temperature),
        }


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


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def wsld_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Cross-entropy with the softened teacher, in which a sample weighs less the better the student knows it.

    $$ \tau^2 \; \frac{1}{B} \sum_i w_i \Big( -\sum_c p_{t,ic} \log p_{s,ic} \Big), \quad
       w_i = 1 - \exp(-\mathrm{CE}_{s,i} / \mathrm{CE}_{t,i}), \; p = \mathrm{softmax}(z / \tau) $$

    CE is the cross-entropy with the label, at temperature 1; no gradient flows through the weights. The value is not
    0 where the student equals the teacher, but its gradient is.

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        target: `(B,)`; images without a label (`IGNORE_INDEX`) do not count.
        temperature: Greater than 0.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Zhou et al.: Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective,
        ICLR 2021 (arXiv 2102.00650), whose factor alpha is `distill_weight` here.
    """
    own, student_logits, teacher_logits = own_class(target, student_logits), wide(student_logits), wide(teacher_logits)
    student_ce, teacher_ce = (
        -F.log_softmax(logits.detach(), dim=1).gather(1, own).squeeze(1) for logits in (student_logits, teacher_logits)
    )
    weight = 1 - torch.exp(-(student_ce / (teacher_ce + 1e-7)).clamp(min=0))  # 1e-7: as the authors' code
    teacher = F.softmax(teacher_logits / temperature, dim=1)
    soft_ce = -(teacher * F.log_softmax(student_logits / temperature, dim=1)).sum(1)
    return temperature**2 * labelled_mean(weight * soft_ce, target)


class WSLD(DistillLoss):
    """Weighted soft labels: a sample weighs less the better the student knows its label, compared with the teacher.

    Images without a label do not count. The paper's alpha is `distill_weight`, beside `hard_weight` 1: 2.25 with
    temperature 4 for CIFAR-100, 2.5 with temperature 2 for ImageNet.

    Args:
        temperature: Greater than 0.

    Raises:
        ValueError: If the temperature is not greater than 0.

    References:
        Zhou et al.: Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective,
        ICLR 2021 (arXiv 2102.00650).
    """

    skips_unlabelled = True

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `wsld_loss`."""
        return wsld_loss(student.logits, teacher.logits, batch.target, self.temperature)


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def _scd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The first part of `rld_loss`: sample confidence."""
    student = _log_or_not(wide(student_logits) / temperature, own_class(target, student_logits))
    teacher = _log_or_not(wide(teacher_logits) / temperature, teacher_logits.argmax(1, keepdim=True))
    return temperature**2 * labelled_mean(kl_divergence(student, teacher), target)


@check_shapes(student_logits="B K", teacher_logits="B K", target="B")
def _mcd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The second part of `rld_loss`: masked correlation."""
    masked = teacher_logits >= teacher_logits.gather(1, own_class(target, teacher_logits))
    nothing_left = masked.all(1, keepdim=True)
    masked = masked & ~nothing_left  # a softmax of nothing is not a number; these samples are left out below
    student, teacher = (
        F.log_softmax((wide(logits) / temperature).masked_fill(masked, -torch.inf), dim=1).masked_fill(masked, 0)
        for logits in (student_logits, teacher_logits)
    )
    divergence = kl_divergence(student, teacher).masked_fill(nothing_left.squeeze(1), 0)
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
    r"""What a teacher that may err knows: how sure one can be, and how alike the classes are that it ranks below.

    $$ \alpha \tau_c^2 \; \frac{1}{B} \sum_i \mathrm{KL}(b_{t,i} \,\|\, b_{s,i})
       + \beta \tau^2 \; \frac{1}{B} \sum_i \mathrm{KL}(\hat p_{t,i} \,\|\, \hat p_{s,i}) $$

    $b_t = (\max_c p_{t,c}, 1 - \max_c p_{t,c})$ is compared with $b_s = (p_{s,y}, 1 - p_{s,y})$, both of the softmax
    at temperature $\tau_c$; $\hat p$ is the softmax at temperature $\tau$ over the classes that the teacher's logits
    rank below the label's. Where the teacher is right, these are the parts of `dkd_loss`. The minimum, 0, is the
    teacher with its largest logit and the label's exchanged.

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        target: `(B,)`; images without a label (`IGNORE_INDEX`) do not count.
        alpha: Weight of the first part (sample confidence).
        beta: Weight of the second part (masked correlation); it is 0 where the teacher ranks nothing below the
            label.
        temperature: Greater than 0; of the second part.
        confidence_temperature: Greater than 0; of the first part.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Sun et al.: Knowledge Distillation with Refined Logits, ICCV 2025 (arXiv 2408.07703).
    """
    return alpha * _scd(student_logits, teacher_logits, target, confidence_temperature) + beta * _mcd(
        student_logits, teacher_logits, target, temperature
    )


class RLD(DistillLoss):
    """Refined logit distillation: `DKD` that does not pass on the teacher's errors.

    Its curves are `train/rld_confidence` and `train/rld_correlation`. The authors let its weight grow over 20 epochs
    (`lkd.callbacks.Schedule`). Images without a label do not count.

    Args:
        alpha: Weight of the first part: the student shall be as sure of the label as the teacher of its first choice.
        beta: Weight of the second part: the classes that the teacher ranks below the label.
        temperature: Greater than 0; of the second part.
        confidence_temperature: Greater than 0; of the first part.

    Raises:
        ValueError: If a weight is negative or a temperature is not greater than 0.

    References:
        Sun et al.: Knowledge Distillation with Refined Logits, ICCV 2025 (arXiv 2408.07703). The defaults are those of
        the authors' command for CIFAR-100. For ImageNet they take `beta` 0.5 and 1 for both temperatures.
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
        """The two parts of `rld_loss`."""
        logits = student.logits, teacher.logits, batch.target
        return {
            "confidence": self.alpha * _scd(*logits, self.confidence_temperature),
            "correlation": self.beta * _mcd(*logits, self.temperature),
        }
