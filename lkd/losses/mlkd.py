"""Multi-level logit distillation (MLKD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses._checks import check_temperature
from lkd.losses._divergence import softened_kl
from lkd.losses._precision import full_precision, wide
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs

Form = Literal["code", "paper"]
TEMPERATURES = (4.0, 3.0, 5.0, 2.0, 6.0)


@full_precision
def _classes(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Squared difference of the classes' products over the batch, of each class `(K,)`."""
    student, teacher = (F.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
    return (teacher.T @ teacher - student.T @ student).square().sum(1)


@full_precision
def _images(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Squared difference of the images' products over the classes, of each image `(B,)`."""
    student, teacher = (F.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
    return (teacher @ teacher.T - student @ student.T).square().sum(1)


def _instances(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened probabilities, of each image `(B,)`; the mean is `kd_loss`."""
    return temperature**2 * softened_kl(student_logits, teacher_logits, temperature)


_LEVELS = {"kd": _instances, "class": _classes, "batch": _images}


@check_shapes(student_logits="B K", teacher_logits="B K")
def mlkd_class_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Squared difference of the classes' correlations: the class level of `mlkd_loss`, at one temperature.

    $$ \frac{1}{K} \lVert P_t^\top P_t - P_s^\top P_s \rVert^2, \quad P = \mathrm{softmax}(z / \tau) $$

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        temperature: Greater than 0.

    Returns:
        A scalar; float32 for logits in half precision, else the logits' type.

    References:
        Jin, Wang, Lin: Multi-Level Logit Distillation, CVPR 2023.
    """
    return _classes(student_logits, teacher_logits, temperature).mean()


@check_shapes(student_logits="B K", teacher_logits="B K")
def mlkd_batch_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Squared difference of the images' correlations: the batch level of `mlkd_loss`, at one temperature.

    $$ \frac{1}{B} \lVert P_t P_t^\top - P_s P_s^\top \rVert^2, \quad P = \mathrm{softmax}(z / \tau) $$

    Args:
        student_logits: `(B, K)`.
        teacher_logits: `(B, K)`.
        temperature: Greater than 0.

    Returns:
        A scalar; float32 for logits in half precision, else the logits' type.

    References:
        Jin, Wang, Lin: Multi-Level Logit Distillation, CVPR 2023.
    """
    return _images(student_logits, teacher_logits, temperature).mean()


def _lowest(values: Tensor, percentile: float) -> Tensor:
    """1 for the values up to the percentile, else 0."""
    return (values <= values.quantile(percentile / 100)).to(values.dtype)


@check_shapes(student_logits="2B K", teacher_logits="2B K")
def _terms(
    student_logits: Tensor, teacher_logits: Tensor, temperatures: Sequence[float], percentile: float, form: Form
) -> dict[str, Tensor]:
    views = list(zip(student_logits.chunk(2), teacher_logits.chunk(2), strict=True))
    weak, strong = views
    teacher = F.softmax(wide(weak[1]), dim=1)
    unsure = _lowest(teacher.amax(1), percentile)
    kept = {"kd": unsure, "class": _lowest(teacher.sum(0), percentile), "batch": unsure}
    terms = {}
    for name, level in _LEVELS.items():
        if form == "paper":
            values = [level(*view, temperature) * kept[name] for temperature in temperatures for view in views]
        else:
            values = [level(*weak, temperature) * kept[name].mean() for temperature in temperatures]
        terms[name] = torch.stack(values).mean(1).sum()
    if form == "code":
        seen = [strong if place < 3 else weak for place in range(len(temperatures))]
        rest = [_instances(*view, temperature) for view, temperature in zip(seen, temperatures, strict=True)]
        terms["kd"] = terms["kd"] + torch.stack(rest).mean(1).sum()
    return terms


@check_shapes(student_logits="2B K", teacher_logits="2B K")
def mlkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperatures: Sequence[float] = TEMPERATURES,
    percentile: float = 50.0,
    form: Form = "code",
) -> Tensor:
    r"""Three comparisons of logits at several temperatures, of two views of each image, first the weak then the strong.

    The paper's form, with views v and temperatures $\tau$:

    $$ \sum_v \sum_\tau \Big( \frac{\tau^2}{B} \sum_i m_i \, \mathrm{KL}(p_{t,i} \,\|\, p_{s,i})
       + \frac{1}{K} \sum_c n_c \lVert (P_t^\top P_t - P_s^\top P_s)_c \rVert^2
       + \frac{1}{B} \sum_i m_i \lVert (P_t P_t^\top - P_s P_s^\top)_i \rVert^2 \Big) $$

    P are the probabilities $\mathrm{softmax}(z / \tau)$, $(B, K)$. $m_i$ is 1 for the images of whose weak view the
    teacher is least sure (its largest probability is up to the percentile over the batch), else 0; $n_c$ likewise for
    the classes to which it gives least in the whole batch.

    Args:
        student_logits: `(2 * B, K)`, all weak views, then all strong ones.
        teacher_logits: `(2 * B, K)`.
        temperatures: Each greater than 0.
        percentile: 0 to 100; how much of the batch, and of the classes, counts.
        form: `paper` as above; `code` is what the authors ran, see `MLKD`.

    Returns:
        A scalar; float32 for logits in half precision, else the logits' type.

    References:
        Jin, Wang, Lin: Multi-Level Logit Distillation, CVPR 2023.
    """
    terms = _terms(student_logits, teacher_logits, temperatures, percentile, form)
    return total(list(terms.values()))


class MLKD(DistillLoss):
    """Multi-level logit distillation: probabilities, and their products over the batch and over the classes.

    It reads two views of each image, the second augmented more strongly (`lkd.datamodules.StrongView`), and compares
    them at several temperatures. Its curves are `train/mlkd_kd`, `train/mlkd_class` and `train/mlkd_batch`.

    The form `code` is the authors' program, which gave the published numbers. It differs from the paper, and from
    `paper`: the masks multiply means, so that they are but a factor, about a half, and images and classes are not
    chosen; the strong view is compared by its probabilities alone, without a mask, and from the fourth temperature on
    the weak view stands in for it. In both forms the weak view decides what is masked.

    Inside `LogitStandardization` all three comparisons read standardised logits; its authors standardise the
    probabilities' term alone.

    Args:
        form: `code` or `paper`.
        temperatures: Each greater than 0.
        percentile: 0 to 100; how much of the batch, and of the classes, counts.

    Raises:
        ValueError: If a temperature is not greater than 0, there is none, or the percentile is out of range.

    References:
        Jin, Wang, Lin: Multi-Level Logit Distillation, CVPR 2023, and the authors' code. They add the cross-entropies
        of both views, where lkd takes their mean: their weight 0.1 is `hard_weight` 0.2.
    """

    num_views = 2
    compares_samples = True
    per_process = "multiplies and chooses among its images"

    def __init__(
        self, form: Form = "code", temperatures: Sequence[float] = TEMPERATURES, percentile: float = 50.0
    ) -> None:
        super().__init__()
        if form not in ("code", "paper"):
            raise ValueError(f"form must be 'code' or 'paper', got {form!r}")
        if not temperatures:
            raise ValueError(f"MLKD needs at least one temperature; the authors take {TEMPERATURES}")
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile must be between 0 and 100, got {percentile}; the authors take 50")
        self.form: Form = form
        self.temperatures = tuple(check_temperature(temperature) for temperature in temperatures)
        self.percentile = percentile

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The three parts of `mlkd_loss`."""
        return _terms(student.logits, teacher.logits, self.temperatures, self.percentile, self.form)
