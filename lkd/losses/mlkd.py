"""Multi-level logit distillation (MLKD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lkd.losses._checks import check_temperature
from lkd.losses._divergence import softened_kl
from lkd.losses._precision import full_precision, wide
from lkd.losses._shapes import check_shapes
from lkd.losses._softmax import softmax
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs

Form = Literal["code", "paper"]
TEMPERATURES = (4.0, 3.0, 5.0, 2.0, 6.0)


@full_precision
def _classes(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the squared difference of the class Gram matrices for each class `(K,)`."""
    student, teacher = (softmax(logits / temperature) for logits in (student_logits, teacher_logits))
    return (teacher.T @ teacher - student.T @ student).square().sum(1)


@full_precision
def _images(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the squared difference of the sample Gram matrices for each sample `(B,)`."""
    student, teacher = (softmax(logits / temperature) for logits in (student_logits, teacher_logits))
    return (teacher @ teacher.T - student @ student.T).square().sum(1)


def _instances(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the divergence of the softened probabilities for each sample `(B,)`; the mean is `kd_loss`."""
    return temperature**2 * softened_kl(student_logits, teacher_logits, temperature)


_LEVELS = {"kd": _instances, "class": _classes, "batch": _images}


@check_shapes(student_logits="B K", teacher_logits="B K")
def mlkd_class_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Squared difference of class Gram matrices: the class level of `mlkd_loss` at one temperature.

    $$ \frac{1}{K} \lVert P_t^\top P_t - P_s^\top P_s \rVert^2, \quad P = \mathrm{softmax}(z / \tau) $$

    Args:
        student_logits: Student logits `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.
        temperature: Softmax temperature, greater than 0.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Jin, Wang, Lin: Multi-Level Logit Distillation, CVPR 2023.
    """
    return _classes(student_logits, teacher_logits, temperature).mean()


@check_shapes(student_logits="B K", teacher_logits="B K")
def mlkd_batch_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Squared difference of sample Gram matrices: the batch level of `mlkd_loss` at one temperature.

    $$ \frac{1}{B} \lVert P_t P_t^\top - P_s P_s^\top \rVert^2, \quad P = \mathrm{softmax}(z / \tau) $$

    Args:
        student_logits: Student logits `(B, K)`.
        teacher_logits: Teacher logits `(B, K)`.
        temperature: Softmax temperature, greater than 0.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Jin, Wang, Lin: Multi-Level Logit Distillation, CVPR 2023.
    """
    return _images(student_logits, teacher_logits, temperature).mean()


def _lowest(values: Tensor, percentile: float) -> Tensor:
    """Return 1 for values up to the percentile and 0 for all others."""
    return (values <= values.quantile(percentile / 100)).to(values.dtype)


@check_shapes(student_logits="2B K", teacher_logits="2B K")
def _terms(
    student_logits: Tensor, teacher_logits: Tensor, temperatures: Sequence[float], percentile: float, form: Form
) -> dict[str, Tensor]:
    views = list(zip(student_logits.chunk(2), teacher_logits.chunk(2), strict=True))
    weak, strong = views
    teacher = softmax(wide(weak[1]))
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
    r"""Multi-level logit distillation loss: instance, class and batch level at several temperatures.

    The logits belong to two views of each image, a weakly and a strongly augmented one. In the paper's form, with views
    v and temperatures $\tau$, the loss is

    $$ \sum_v \sum_\tau \Big( \frac{\tau^2}{B} \sum_i m_i \, \mathrm{KL}(p_{t,i} \,\|\, p_{s,i})
       + \frac{1}{K} \sum_c n_c \lVert (P_t^\top P_t - P_s^\top P_s)_c \rVert^2
       + \frac{1}{B} \sum_i m_i \lVert (P_t P_t^\top - P_s P_s^\top)_i \rVert^2 \Big) $$

    Here $P = \mathrm{softmax}(z / \tau)$ are the probabilities $(B, K)$. The mask $m_i$ is 1 for images whose largest
    teacher probability in the weak view is at or below the percentile over the batch, and 0 for the others. The mask
    $n_c$ selects classes in the same way by the teacher's probability summed over the batch.

    Args:
        student_logits: Student logits `(2 * B, K)`: all weak views, then all strong views.
        teacher_logits: Teacher logits `(2 * B, K)`.
        temperatures: Softmax temperatures, each greater than 0.
        percentile: Percentile between 0 and 100 up to which images and classes are selected.
        form: `paper` for the formula above, `code` for the authors' implementation (see `MLKD`).

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Jin, Wang, Lin: Multi-Level Logit Distillation, CVPR 2023.
    """
    terms = _terms(student_logits, teacher_logits, temperatures, percentile, form)
    return total(list(terms.values()))


class MLKD(DistillLoss):
    """Multi-level logit distillation: sample, class, batch.

    The criterion reads two views of each image, the second one with stronger augmentation
    (`lkd.datamodules.StrongView`), and compares probabilities and their Gram matrices over the batch and over the
    classes at several temperatures (see `mlkd_loss`). The terms are logged as `train/mlkd_kd`, `train/mlkd_class` and
    `train/mlkd_batch`.

    `form: code` follows the authors' implementation, which produced the published results. It differs from the paper
    (`form: paper`) in two ways. First, the masks multiply means, so they act as a factor of about one half instead of
    selecting images and classes. Second, the strong view enters only the instance level, without a mask, and is
    replaced by the weak view from the fourth temperature on. In both forms, the masks are computed from the weak view.

    Inside `LogitStandardization`, all three levels and the masks read standardized logits; the authors of that method
    standardize only the logits of the instance level.

    Args:
        form: `code` or `paper`.
        temperatures: Softmax temperatures, each greater than 0.
        percentile: Percentile between 0 and 100 up to which images and classes are selected.

    Raises:
        ValueError: If a temperature is not greater than 0, if `temperatures` is empty, or if the percentile is out of
            range.

    References:
        Jin, Wang, Lin: Multi-Level Logit Distillation, CVPR 2023, and the authors' code. The authors add the
        cross-entropies of both views, whereas lkd uses their mean: the authors' weight 0.1 corresponds to `hard_weight`
        0.2.
    """

    num_views = 2
    compares_samples = True
    per_process = "Gram matrices and selection of images and classes"

    def __init__(
        self, form: Form = "code", temperatures: Sequence[float] = TEMPERATURES, percentile: float = 50.0
    ) -> None:
        super().__init__()
        if form not in ("code", "paper"):
            raise ValueError(f"form must be 'code' or 'paper', got {form!r}")
        if not temperatures:
            raise ValueError(f"MLKD requires at least one temperature; the authors use {TEMPERATURES}")
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile must be between 0 and 100, got {percentile}; the authors use 50")
        self.form: Form = form
        self.temperatures = tuple(check_temperature(temperature) for temperature in temperatures)
        self.percentile = percentile

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the three terms of `mlkd_loss`."""
        return _terms(student.logits, teacher.logits, self.temperatures, self.percentile, self.form)
