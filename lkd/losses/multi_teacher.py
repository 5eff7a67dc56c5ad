"""Distillation from several teachers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd._compat import tree_map
from lkd.losses._labels import labelled_mean, own_class
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, named_terms
from lkd.losses.composite import CompositeLoss
from lkd.types import IGNORE_INDEX, Batch, Outputs, Probe

_MEMBERS = "members"
_Pair = tuple[Tensor, Mapping[str, Any]]


def _log_own(teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Return each teacher's log-probability of the label `(M, B)`."""
    own = own_class(target, teacher_logits[0]).expand(len(teacher_logits), -1, 1)
    return F.log_softmax(teacher_logits, dim=2).gather(2, own).squeeze(2)


@check_shapes(teacher_logits="M B K", target="B")
@full_precision
def teacher_confidence(teacher_logits: Tensor, target: Tensor) -> Tensor:
    r"""Per-sample weights of several teachers: larger for a smaller cross-entropy with the label.

    $$ w_{ki} = \frac{1}{M - 1} \Big( 1 - \frac{\exp l_{ki}}{\sum_j \exp l_{ji}} \Big), \quad
       l_{ki} = -\log \mathrm{softmax}(z_{ki})_{y_i} $$

    Args:
        teacher_logits: Logits `(M, B, K)` of M teachers, at least 2.
        target: Class indices `(B,)`; all teachers get equal weights for samples with `IGNORE_INDEX`.

    Returns:
        Weights `(M, B)` that sum to 1 over the teachers (float32 for half-precision inputs).

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
    r"""Cross-entropy of a mixture of teachers with the labels, used to learn the weights of the mixture.

    $$ -\frac{1}{B} \sum_i \log \sum_k w_k \, \mathrm{softmax}(z_{ki})_{y_i}, \quad w = \mathrm{softmax}(\theta) $$

    Args:
        teacher_logits: Logits `(M, B, K)` of M teachers.
        target: Class indices `(B,)`; samples with `IGNORE_INDEX` are excluded from the mean.
        weight_logits: Parameters theta of the mixture weights `(M,)`.

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).
    """
    log_p = _log_own(teacher_logits, target)
    mixed = (log_p + F.log_softmax(weight_logits, dim=0).unsqueeze(1)).logsumexp(0)
    return labelled_mean(-mixed, target)


class MultiTeacher(CompositeLoss):
    r"""Apply any criterion to several teachers.

    $$ \sum_k w_k L_k \quad \text{or} \quad \frac{1}{B} \sum_i \sum_k w_{ki} L_{ki} $$

    The teacher must be an `lkd.models.Ensemble` or another network whose attribute `members` is a list of networks that
    return logits. Each teacher has its own copy of the criterion, because adapters differ. The weights are determined
    by `weighting`:

    - `fixed`: constant weights.
    - `confidence`: per-sample weights that are larger for teachers with a smaller cross-entropy (`teacher_confidence`).
    - `learned`: softmax of a parameter that minimizes the cross-entropy of the teachers' mixture (`mixture_loss`,
      logged as `mixture`). The student's loss uses the detached weights; otherwise, they would shift to the teacher
      that is easiest to match.

    Terms are logged under the name of the criterion.

    Args:
        criterion: Criterion that compares the student with one teacher. With `confidence`, its value must be a mean
            over samples (`KD`, `DKD`, `AT`, ...) or over labelled samples, and its adapters must not contain BatchNorm.
        weighting: Source of the weights.
        weights: Weights for `fixed`, one for each teacher in the order of the ensemble, at least 0. They are normalized
            to sum to 1. `None` weights all teachers equally.

    Raises:
        ValueError: If weights are given and `weighting` is not `fixed`, if a weight is negative, or if all weights are
            0. At the start of training, if the teacher has fewer than two members, if the number of weights differs
            from the number of members, or if `confidence` is used with a criterion that cannot be evaluated sample by
            sample.

    References:
        Zhang, Chen, Wang: Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022 (arXiv 2201.00007): KD
        with `confidence`. The authors' code additionally divides by the number of teachers. The authors' weights for
        feature maps, for which each teacher's classifier evaluates the student's feature, are not implemented: features
        are weighted like logits. Fixed weights are normalized in float32, so they are exact to about 1e-7 in float64
        training.
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
                f"MultiTeacher requires a criterion that uses a teacher, got {type(criterion).__name__}; use it alone, "
                "or in a WeightedSum with a MultiTeacher"
            )
        if weights is not None and weighting != "fixed":
            raise ValueError(
                f"MultiTeacher accepts weights only with weighting 'fixed', got {weights} and {weighting!r}"
            )
        if weights is not None and not (
            weights and all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0
        ):
            raise ValueError(
                f"weights must be finite and not negative, and at least one must be positive, got {weights}"
            )
        if weighting == "confidence":
            _check_single(criterion)
        self.criteria = nn.ModuleList([criterion])
        self.weighting = weighting
        self.weights = weights

    @property
    def name(self) -> str:
        """Name of the inner criterion."""
        return self.parts[0].name

    @property
    def parts(self) -> list[DistillLoss]:
        """Copies of the criterion, one for each teacher."""
        return list(self.criteria)  # type: ignore[arg-type]

    @property
    def needs_build(self) -> bool:  # type: ignore[override]
        """Whether the copies need to be built or the weights are learned."""
        return self.weighting == "learned" or super().needs_build

    @property
    def skips_unlabelled(self) -> bool | None:  # type: ignore[override]
        """Value of the inner criterion; None with learned weights, as the term `mixture` reads labels."""
        return None if self.weighting == "learned" else self.parts[0].skips_unlabelled

    def resolve_layers(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Copy the criterion for each teacher and resolve the layer names of the copies."""
        members = list(getattr(teacher, _MEMBERS, ()))
        if len(members) < 2:
            got = "none" if teacher is None else f"one {type(teacher).__name__}"
            raise ValueError(f"MultiTeacher requires at least two teachers, got {got}; use an lkd.models.Ensemble")
        if self.weights is not None and len(self.weights) != len(members):
            raise ValueError(
                f"MultiTeacher has {len(self.weights)} weights for {len(members)} teachers; set one for each"
            )
        first = self.parts[0]
        self.criteria = nn.ModuleList([first, *(deepcopy(first) for _ in members[1:])])
        shares = torch.tensor(self.weights or [1.0] * len(members))
        self.register_buffer("shares", shares / shares.sum(), persistent=False)
        for part, member in zip(self.parts, members, strict=True):
            part.resolve_layers(student, member)
        self.student_layers = tuple(layer for part in self.parts for layer in part.student_layers)
        self.teacher_layers = tuple(
            _layer(number, layer) for number, part in enumerate(self.parts) for layer in ("", *part.teacher_layers)
        )

    def build(self, student: Probe, teacher: Probe) -> None:
        """Build each copy of the criterion."""
        members = getattr(teacher.network, _MEMBERS)
        for part, member, outputs in zip(self.parts, members, self._member_outputs(teacher.outputs), strict=True):
            part.build(student, Probe(member, outputs))
        if self.weighting == "learned":
            self.theta = nn.Parameter(torch.zeros(len(members)))
        if self.weighting == "confidence" and any(list(part.buffers()) for part in self.parts):
            raise ValueError(
                f"weighting 'confidence' requires a criterion for single samples, but "
                f"{type(self.parts[0]).__name__} keeps batch statistics (BatchNorm or a memory bank); use 'fixed' or "
                "'learned'"
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted terms of the criterion and, with learned weights, the term `mixture`."""
        members = self._member_outputs(teacher)
        logits = torch.stack([outputs.logits for outputs in members])
        compare = _compare_each if self.weighting == "confidence" else _compare
        num_samples = self._num_samples(batch.target)
        terms: dict[str, Tensor] = {}
        for part, outputs, weight in zip(self.parts, members, self._weights(logits, batch.target), strict=True):
            for key, value in compare(part, student, outputs, batch).items():
                weighted = (weight * value).sum() / num_samples
                terms[key] = terms[key] + weighted if key in terms else weighted
        if self.weighting == "learned":
            terms["mixture"] = mixture_loss(logits, batch.target, self.theta)
        return terms

    def _member_outputs(self, teacher: Outputs) -> list[Outputs]:
        """Split the ensemble's outputs into the outputs of each teacher, under the teacher's own layer names."""
        return [
            Outputs(
                teacher.features[_layer(number)],
                {layer: teacher.features[_layer(number, layer)] for layer in part.teacher_layers},
            )
            for number, part in enumerate(self.parts)
        ]

    def _weights(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the weights `(M,)` of the teachers or, with `confidence`, `(M, B)` of teachers and samples."""
        if self.weighting == "confidence":
            return teacher_confidence(logits, target)
        if self.weighting == "learned":
            return F.softmax(self.theta.detach(), dim=0)
        return self.shares

    def _num_samples(self, target: Tensor) -> int | Tensor:
        """Return the number of samples to divide by: 1 unless the weights are per sample."""
        if self.weighting != "confidence":
            return 1
        labelled = (target != IGNORE_INDEX).sum().clamp(min=1)
        return labelled if self.parts[0].skips_unlabelled else len(target)


def _check_single(criterion: DistillLoss) -> None:
    name, others = type(criterion).__name__, "use 'fixed' or 'learned'"
    if criterion.compares_samples or criterion.num_views > 1:
        what = "images of a batch" if criterion.compares_samples else "views of an image"
        raise ValueError(
            f"weighting 'confidence' requires a criterion for single images, but {name} compares the {what} with each "
            f"other; {others}"
        )
    if criterion.skips_unlabelled is None:
        raise ValueError(
            f"weighting 'confidence' averages over all images or over labelled images, but the terms of "
            f"{name} differ in this; {others}, or one MultiTeacher for each criterion of a WeightedSum"
        )


def _layer(number: int, layer: str = "") -> str:
    return f"{_MEMBERS}.{number}.{layer}" if layer else f"{_MEMBERS}.{number}"


def _compare(criterion: DistillLoss, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
    return named_terms("", criterion(student, teacher, batch))


def _compare_each(criterion: DistillLoss, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
    """Evaluate the criterion for each sample separately; each term has the shape `(B,)`."""

    def compare(student: _Pair, teacher: _Pair, target: Tensor, index: Tensor | None) -> dict[str, Tensor]:
        rows = tree_map(lambda row: None if row is None else row.unsqueeze(0), (student, teacher, target, index))
        return _compare(criterion, Outputs(*rows[0]), Outputs(*rows[1]), Batch(None, rows[2], rows[3]))

    in_dims = (0, 0, 0, None if batch.index is None else 0)
    each = torch.func.vmap(compare, in_dims=in_dims, randomness="different")
    # without `raw`
    student_pair, teacher_pair = ((outputs.logits, dict(outputs.features)) for outputs in (student, teacher))
    terms: dict[str, Tensor] = each(student_pair, teacher_pair, batch.target, batch.index)
    return terms
