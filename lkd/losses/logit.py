"""Criteria that compare a sample's logits as a whole, without its label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses.base import DistillLoss
from lkd.losses.checks import check_temperature
from lkd.losses.precision import wide
from lkd.losses.shapes import check_shapes
from lkd.types import Batch, Outputs


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


@check_shapes(student_logits="B K", teacher_logits="B K", temperature=("", "B 1"))
def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 4.0) -> Tensor:
    r"""Kullback-Leibler divergence of the softened teacher from the softened student.

    $$ \tau^2 \; \frac{1}{B} \sum_i \sum_c p_{ic} (\log p_{ic} - \log q_{ic}), \quad
       p = \mathrm{softmax}(z_t / \tau), \; q = \mathrm{softmax}(z_s / \tau) $$

    The factor temperature² keeps the size of the gradient when the temperature changes.

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        temperature: Greater than 0; a larger one flattens both distributions. A tensor, which may be learned, is `()`
            or, with one temperature for each sample, `(B, 1)`.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531), section 2.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> round(kd_loss(student, teacher, temperature=4.0).item(), 4)
        0.3309
    """
    return (softened_kl(student_logits, teacher_logits, temperature).unsqueeze(1) * temperature**2).mean()


class KD(DistillLoss):
    """Hinton's knowledge distillation: the student imitates the teacher's softened probabilities.

    Args:
        temperature: Greater than 0; a larger one flattens both distributions. 4 is usual for CIFAR, 1 for
            ImageNet.

    Raises:
        ValueError: If the temperature is not greater than 0.

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531).
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `kd_loss`."""
        return kd_loss(student.logits, teacher.logits, self.temperature)


@check_shapes(student_logits="B K", teacher_logits="B K")
def logit_mse_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Mean squared difference of the logits.

    $$ \frac{1}{BK} \sum_{ic} (z_{s,ic} - z_{t,ic})^2 $$

    It is what `kd_loss` tends to at large temperatures, but for a factor and the logits' mean over the classes.

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.

    Returns:
        A scalar; float32 for logits in half precision, else the logits' type.

    References:
        Ba, Caruana: Do Deep Nets Really Need to be Deep?, NeurIPS 2014 (arXiv 1312.6184), who sum over the
        classes and halve.

    Example:
        >>> logit_mse_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 1.0]])).item()
        2.5
    """
    return F.mse_loss(wide(student_logits), wide(teacher_logits))


class LogitMSE(DistillLoss):
    """Regression of the logits themselves: their mean squared difference.

    References:
        Ba, Caruana: Do Deep Nets Really Need to be Deep?, NeurIPS 2014 (arXiv 1312.6184).
        Kim et al.: Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation,
        IJCAI 2021 (arXiv 2105.08919).
    """

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `logit_mse_loss`."""
        return logit_mse_loss(student.logits, teacher.logits)


def _transformed(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened teacher from the student as it is, `(B,)`."""
    return softened_kl(student_logits, wide(teacher_logits) / temperature, 1.0)


@check_shapes(student_logits="B K", teacher_logits="B K")
def ttm_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 10.0) -> Tensor:
    r"""Kullback-Leibler divergence of the softened teacher from the student, which is not softened.

    $$ \frac{1}{B} \sum_i \mathrm{KL}(\mathrm{softmax}(z_{t,i} / \tau) \,\|\, \mathrm{softmax}(z_{s,i})) $$

    Softening is the power transform $p^{\gamma} / \sum_c p_c^{\gamma}$ of the probabilities, $\gamma = 1 / \tau$.
    The minimum, 0, is where the student's logits are the teacher's, divided by the temperature.

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        temperature: Greater than 0: 1 / the paper's exponent gamma.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024 (arXiv 2402.11148).

    Example:
        >>> student, teacher = torch.tensor([[1.5, 0.5, 0.0]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> ttm_loss(student, teacher, temperature=2.0).item()
        0.0
    """
    return _transformed(student_logits, teacher_logits, temperature).mean()


@check_shapes(student_logits="B K", teacher_logits="B K")
def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 5.0) -> Tensor:
    r"""`ttm_loss`, in which a sample weighs more the flatter the teacher's probabilities are.

    $$ \frac{1}{B} \sum_i w_i \, \mathrm{KL}(\mathrm{softmax}(z_{t,i} / \tau) \,\|\, \mathrm{softmax}(z_{s,i})), \quad
       w_i = \sum_c \mathrm{softmax}(z_{t,i})_c^{1 / \tau} $$

    The weight lies between 1 (one class has it all) and $K^{1 - 1/\tau}$ (all classes alike).

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        temperature: Greater than 0: 1 / the paper's exponent gamma.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.

    References:
        Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024 (arXiv 2402.11148),
        section 4.
    """
    flatness = torch.logsumexp(F.log_softmax(wide(teacher_logits), dim=1) / temperature, dim=1).exp()
    return (flatness * _transformed(student_logits, teacher_logits, temperature)).mean()


class TTM(DistillLoss):
    """Transformed teacher matching: the teacher is softened, the student is not.

    Args:
        temperature: Greater than 0; softens the teacher. It is 1 / the paper's exponent gamma.

    Raises:
        ValueError: If the temperature is not greater than 0.

    References:
        Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024 (arXiv 2402.11148).
    """

    def __init__(self, temperature: float = 10.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `ttm_loss`."""
        return ttm_loss(student.logits, teacher.logits, self.temperature)


class WTTM(DistillLoss):
    """Weighted transformed teacher matching: `TTM`, and the less sure the teacher, the more a sample weighs.

    Args:
        temperature: Greater than 0; softens the teacher. It is 1 / the paper's exponent gamma.

    Raises:
        ValueError: If the temperature is not greater than 0.

    References:
        Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024 (arXiv 2402.11148).
    """

    def __init__(self, temperature: float = 5.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `wttm_loss`."""
        return wttm_loss(student.logits, teacher.logits, self.temperature)
