"""Distillation from several teachers."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lkd.losses._labels import labelled_mean, own_class
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import CompositeLoss, DistillLoss, named_terms
from lkd.types import IGNORE_INDEX, Batch, Outputs, Probe

_MEMBERS = "members"


def _log_own(teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Each teacher's log-probability of the label, `(M, B)`."""
    own = own_class(target, teacher_logits[0]).expand(len(teacher_logits), -1, 1)
    return F.log_softmax(teacher_logits, dim=2).gather(2, own).squeeze(2)


@check_shapes(teacher_logits="M B K", target="B")
@full_precision
def teacher_confidence(teacher_logits: Tensor, target: Tensor) -> Tensor:
    r"""How much each sample trusts each teacher: the less, the larger that teacher's cross-entropy with the label.

    $$ w_{ki} = \frac{1}{M - 1} \Big( 1 - \frac{\exp l_{ki}}{\sum_j \exp l_{ji}} \Big), \quad
       l_{ki} = -\log \mathrm{softmax}(z_{ki})_{y_i} $$

    Args:
        teacher_logits: `(M, B, K)`, of M teachers, at least 2.
        target: `(B,)`; an image without a label (`IGNORE_INDEX`) trusts all teachers alike.

    Returns:
        Weights `(M, B)`, whose sum over the teachers is 1; float32 for logits in half precision, else the logits' type.

    References:
        Zhang, Chen, Wang: Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022 (arXiv 2201.00007),
        equations 2 and 3.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]])
        >>> [round(weight, 3) for (weight,) in teacher_confidence(logits, torch.tensor([0])).tolist()]
        [0.638, 0.362]
    """
    log_p = _log_own(teacher_logits, target)
    weight = (1 - F.softmax(-log_p, dim=0)) / (len(log_p) - 1)
    return weight.masked_fill(target == IGNORE_INDEX, 1 / len(log_p))


@check_shapes(teacher_logits="M B K", target="B", weight_logits="M")
@full_precision
def mixture_loss(teacher_logits: Tensor, target: Tensor, weight_logits: Tensor) -> Tensor:
    r"""Cross-entropy of the teachers' mixture with the labels: what the mixture's weights are learned by.

    $$ -\frac{1}{B} \sum_i \log \sum_k w_k \, \mathrm{softmax}(z_{ki})_{y_i}, \quad w = \mathrm{softmax}(\theta) $$

    Args:
        teacher_logits: `(M, B, K)`, of M teachers.
        target: `(B,)`; images without a label (`IGNORE_INDEX`) do not count.
        weight_logits: theta, `(M,)`.

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.
    """
    log_p = _log_own(teacher_logits, target)
    mixed = (log_p + F.log_softmax(weight_logits, dim=0).unsqueeze(1)).logsumexp(0)
    return labelled_mean(-mixed, target)


class MultiTeacher(CompositeLoss):
    r"""Any criterion, compared with each of several teachers, and the values weighed.

    $$ \sum_k w_k L_k \quad \text{or} \quad \frac{1}{B} \sum_i \sum_k w_{ki} L_{ki} $$

    The teacher is an `lkd.models.Ensemble`, or another network whose attribute `members` is a list of networks that
    return logits. Each teacher gets its own copy of the criterion, as adapters differ. Weights are

    - `fixed`: the given ones;
    - `confidence`: for each sample, larger for teachers that are right (`teacher_confidence`);
    - `learned`: the softmax of a parameter that learns to make the teachers' mixture right (`mixture_loss`, the curve
      `mixture`). The student's loss takes the weights without their gradient: with it they would go over to the teacher
      that is easiest to imitate.

    Curves keep the criterion's name.

    Args:
        criterion: What compares the student with one teacher. For `confidence`, the mean of its values for the single
            samples (`KD`, `DKD`, `AT`, ...), or for those with a label, without BatchNorm in its adapters.
        weighting: Where the weights come from.
        weights: For `fixed`, one for each teacher, in the ensemble's order, at least 0; they are divided by their sum.
            None: all alike.

    Raises:
        ValueError: If weights are given and the weighting is another one, or a weight is negative, or all are 0; in
            training, if the teacher has fewer than two members, there are not as many weights, or the criterion cannot
            be read sample by sample and is to be weighed so.

    References:
        Zhang, Chen, Wang: Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022 (arXiv 2201.00007): KD
        with `confidence`. The authors' code divides by the number of teachers once more. Their weights of feature maps,
        which let each teacher's classifier judge the student's feature, are not here: features are weighed as logits.
        Fixed weights are divided by their sum in float32, so in a float64 training they are exact to about 1e-7.
    """

    shares: Tensor

    def __init__(
        self,
        criterion: DistillLoss,
        weighting: Literal["fixed", "confidence", "learned"] = "fixed",
        weights: list[float] | None = None,
    ) -> None:
        super().__init__([criterion])
        if not criterion.needs_teacher:
            raise ValueError(
                f"MultiTeacher compares the student with several teachers, and {type(criterion).__name__} asks none; "
                "take it by itself, or beside a MultiTeacher in a WeightedSum"
            )
        if weights is not None and weighting != "fixed":
            raise ValueError(f"MultiTeacher takes weights with weighting 'fixed' only, got {weights} and {weighting!r}")
        if weights is not None and not (
            weights and all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0
        ):
            raise ValueError(f"weights must be finite and not negative, and one must be greater than 0, got {weights}")
        if weighting == "confidence":
            _check_single(criterion)
        self.criteria = nn.ModuleList([criterion])
        self.weighting = weighting
        self.weights = weights

    @property
    def name(self) -> str:
        """The criterion's."""
        return self.parts[0].name

    @property
    def parts(self) -> list[DistillLoss]:
        """The criterion's copies, one for each teacher."""
        return list(self.criteria)  # type: ignore[arg-type]

    @property
    def needs_build(self) -> bool:  # type: ignore[override]
        """Whether the copies need what their `build` makes, or the weights are learned."""
        return self.weighting == "learned" or super().needs_build

    @property
    def skips_unlabelled(self) -> bool | None:  # type: ignore[override]
        """As the criterion; None where the term `mixture`, which reads labels, is added."""
        return None if self.weighting == "learned" else self.parts[0].skips_unlabelled

    def locate(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Copy the criterion for each teacher, and find the copies' layers."""
        members = list(getattr(teacher, _MEMBERS, ()))
        if len(members) < 2:
            got = "none" if teacher is None else f"one {type(teacher).__name__}"
            raise ValueError(
                f"MultiTeacher compares the student with at least two teachers, got {got}; give an lkd.models.Ensemble"
            )
        if self.weights is not None and len(self.weights) != len(members):
            raise ValueError(
                f"MultiTeacher has {len(self.weights)} weights for {len(members)} teachers; give one for each"
            )
        first = self.parts[0]
        self.criteria = nn.ModuleList([first, *(deepcopy(first) for _ in members[1:])])
        shares = torch.tensor(self.weights or [1.0] * len(members))
        self.register_buffer("shares", shares / shares.sum(), persistent=False)
        for part, member in zip(self.parts, members, strict=True):
            part.locate(student, member)
        self.student_layers = tuple(layer for part in self.parts for layer in part.student_layers)
        self.teacher_layers = tuple(
            _layer(number, layer) for number, part in enumerate(self.parts) for layer in ("", *part.teacher_layers)
        )

    def build(self, student: Probe, teacher: Probe) -> None:
        """Build each copy."""
        members = getattr(teacher.network, _MEMBERS)
        for part, member, answer in zip(self.parts, members, self._answers(teacher.outputs), strict=True):
            part.build(student, Probe(member, answer))
        if self.weighting == "learned":
            self.theta = nn.Parameter(torch.zeros(len(members)))
        if self.weighting == "confidence" and any(list(part.buffers()) for part in self.parts):
            raise ValueError(
                f"weighting 'confidence' needs a criterion that reads each sample by itself, and "
                f"{type(self.parts[0]).__name__} remembers something of the batch (a BatchNorm, or a memory); take "
                "'fixed' or 'learned'"
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The criterion's terms, weighed; with `learned`, the term `mixture` beside them."""
        answers = self._answers(teacher)
        logits = torch.stack([answer.logits for answer in answers])
        compare = _compare_each if self.weighting == "confidence" else _compare
        num_samples = self._num_samples(batch.target)
        terms: dict[str, Tensor] = {}
        for part, answer, weight in zip(self.parts, answers, self._weights(logits, batch.target), strict=True):
            for key, value in compare(part, student, answer, batch).items():
                weighed = (weight * value).sum() / num_samples
                terms[key] = terms[key] + weighed if key in terms else weighed
        if self.weighting == "learned":
            terms["mixture"] = mixture_loss(logits, batch.target, self.theta)
        return terms

    def _answers(self, teacher: Outputs) -> list[Outputs]:
        """What each teacher said, with its own layers' names."""
        return [
            Outputs(
                teacher.features[_layer(number)],
                {layer: teacher.features[_layer(number, layer)] for layer in part.teacher_layers},
            )
            for number, part in enumerate(self.parts)
        ]

    def _weights(self, logits: Tensor, target: Tensor) -> Tensor:
        """Weights `(M,)` of the teachers, or `(M, B)` of the teachers and samples."""
        if self.weighting == "confidence":
            return teacher_confidence(logits, target)
        if self.weighting == "learned":
            return F.softmax(self.theta.detach(), dim=0)
        return self.shares

    def _num_samples(self, target: Tensor) -> int | Tensor:
        """How many values `weight * value` has that count: 1, or one for each sample."""
        if self.weighting != "confidence":
            return 1
        labelled = (target != IGNORE_INDEX).sum().clamp(min=1)
        return labelled if self.parts[0].skips_unlabelled else len(target)


def _check_single(criterion: DistillLoss) -> None:
    name, others = type(criterion).__name__, "take 'fixed' or 'learned'"
    if criterion.compares_samples or criterion.num_views > 1:
        what = "images of a batch" if criterion.compares_samples else "views of an image"
        raise ValueError(
            f"weighting 'confidence' weighs each image by itself, and {name} compares the {what} with each other; "
            f"{others}"
        )
    if criterion.skips_unlabelled is None:
        raise ValueError(
            f"weighting 'confidence' takes a mean over all images or over those with a label, and the terms of {name} "
            f"differ in that; {others}, or a MultiTeacher for each criterion of a WeightedSum"
        )


def _layer(number: int, layer: str = "") -> str:
    return f"{_MEMBERS}.{number}.{layer}" if layer else f"{_MEMBERS}.{number}"


def _compare(criterion: DistillLoss, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
    return named_terms("", criterion(student, teacher, batch))


def _compare_each(criterion: DistillLoss, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
    """The criterion's terms for each sample by itself, `(B,)`."""

    def compare(student: Outputs, teacher: Outputs, target: Tensor, index: Tensor | None) -> dict[str, Tensor]:
        rows = tree_map(lambda row: None if row is None else row.unsqueeze(0), (student, teacher, target, index))
        return _compare(criterion, rows[0], rows[1], Batch(None, rows[2], rows[3]))

    in_dims = (0, 0, 0, None if batch.index is None else 0)
    each = torch.func.vmap(compare, in_dims=in_dims, randomness="different")
    terms: dict[str, Tensor] = each(student, teacher, batch.target, batch.index)
    return terms
