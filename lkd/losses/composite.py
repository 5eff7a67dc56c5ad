"""Criteria composed of other criteria, and their weighted sum."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lkd.losses.base import RESERVED, SUM, DistillLoss, check_criterion, named_terms
from lkd.types import Batch, Outputs, Probe


class CompositeLoss(DistillLoss):
    """Base class of criteria composed of others.

    It reads the layers of its parts, has their requirements, and builds them.

    Args:
        parts: The inner criteria, as returned by the property `parts`.

    Raises:
        TypeError: If a part is not a criterion.
        ValueError: If parts require different numbers of views greater than 1.
    """

    def __init__(self, parts: Sequence[DistillLoss]) -> None:
        for part in parts:
            check_criterion(type(self).__name__, part)
        if len(views := sorted({part.num_views for part in parts if part.num_views > 1})) > 1:
            raise ValueError(
                f"the criteria in {type(self).__name__} read {' and '.join(map(str, views))} views of each image, but "
                "all images of a batch have the same number of views; use criteria that read the same number"
            )
        super().__init__(
            [layer for part in parts for layer in part.student_layers],
            [layer for part in parts for layer in part.teacher_layers],
        )

    @property
    @abstractmethod
    def parts(self) -> list[DistillLoss]:
        """The inner criteria."""

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """Whether any part reads the teacher's outputs."""
        return any(part.needs_teacher for part in self.parts)

    @property
    def needs_index(self) -> bool:  # type: ignore[override]
        """Whether any part reads `Batch.index`."""
        return any(part.needs_index for part in self.parts)

    @property
    def reads_logits(self) -> bool:  # type: ignore[override]
        """Whether any part compares logits."""
        return any(part.reads_logits for part in self.parts)

    @property
    def compares_samples(self) -> bool:  # type: ignore[override]
        """Whether any part compares the samples of a batch with each other."""
        return any(part.compares_samples for part in self.parts)

    @property
    def per_process(self) -> str:  # type: ignore[override]
        """What the parts compute from the samples of each process separately."""
        return ", ".join(dict.fromkeys(part.per_process for part in self.parts if part.per_process))

    @property
    def skips_unlabelled(self) -> bool | None:  # type: ignore[override]
        """Whether unlabelled samples are excluded in all parts; None if only in some."""
        found = {part.skips_unlabelled for part in self.parts}
        return found.pop() if len(found) == 1 else None

    @property
    def needs_build(self) -> bool:  # type: ignore[override]
        """Whether any part needs its `build`."""
        return any(part.needs_build for part in self.parts)

    @property
    def num_views(self) -> int:  # type: ignore[override]
        """Largest number of views that a part reads."""
        return max(part.num_views for part in self.parts)

    def resolve_layers(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Resolve the layers of the parts. The number of layers may change, as in `MultiTeacher`."""
        for part in self.parts:
            part.resolve_layers(student, teacher)
        self.student_layers = tuple(layer for part in self.parts for layer in part.student_layers)
        self.teacher_layers = tuple(layer for part in self.parts for layer in part.teacher_layers)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Build each part."""
        for part in self.parts:
            part.build(student, teacher)


class WrapperLoss(CompositeLoss):
    """Base class of criteria that apply one other criterion, for example to other logits.

    Args:
        criterion: The inner criterion.
    """

    def __init__(self, criterion: DistillLoss) -> None:
        super().__init__([criterion])
        self.criterion = criterion

    @property
    def name(self) -> str:
        """Name of the inner criterion."""
        return self.criterion.name

    @property
    def parts(self) -> list[DistillLoss]:
        """The inner criterion."""
        return [self.criterion]

    def check_reads_logits(self) -> None:
        """Check that the inner criterion compares logits only.

        Raises:
            ValueError: If it reads features.
        """
        inner = self.criterion
        if inner.student_layers or inner.teacher_layers or not inner.reads_logits:
            own, name = type(self).__name__, type(inner).__name__
            raise ValueError(f"{own} applies criteria of logits, but {name} reads features; use it without {own}")


def _is_module_name(name: object) -> bool:
    """Check whether `nn.ModuleDict` accepts a name."""
    return isinstance(name, str) and name != "" and "." not in name and not hasattr(nn.ModuleDict(), name)


class WeightedSum(CompositeLoss):
    """Weighted sum of several criteria.

    Args:
        criteria: Mapping from names to criteria; the names are used in logs and in `weights`.
        weights: Mapping from names to weights, at least 0; the default weight is 1.

    Raises:
        TypeError: If `criteria` is not a dict of criteria.
        ValueError: If there are no criteria, if a weight is negative, not finite or has an unknown name, or if a name
            is reserved for another logged value (`loss`, `acc`, `distill`, ...) or not a valid module name.

    Example:
        >>> from lkd.losses import KD
        >>> both = WeightedSum({"soft": KD(temperature=4.0), "sharp": KD(temperature=1.0)}, weights={"soft": 0.5})
        >>> both.weights
        {'soft': 0.5, 'sharp': 1.0}
    """

    def __init__(self, criteria: dict[str, DistillLoss], weights: dict[str, float] | None = None) -> None:
        weights = weights or {}
        if not isinstance(criteria, Mapping):
            raise TypeError(f"WeightedSum requires a dict of names and criteria, got {type(criteria).__name__}")
        if not criteria:
            raise ValueError("WeightedSum requires at least one criterion")
        if taken := sorted({*RESERVED, SUM} & set(criteria)):
            raise ValueError(f"a criterion in WeightedSum must not be named {taken}: reserved for other logged values")
        if refused := [name for name in criteria if not _is_module_name(name)]:
            raise ValueError(
                f"a criterion in WeightedSum cannot be named {refused}: a name must be a non-empty string without dots "
                "that is not an attribute of nn.ModuleDict"
            )
        if unknown := sorted(set(weights) - set(criteria)):
            raise ValueError(f"WeightedSum has weights for {unknown}, but its criteria are {sorted(criteria)}")
        if wrong := {name: weight for name, weight in weights.items() if not 0 <= weight < math.inf}:
            raise ValueError(f"weights must not be negative, got {wrong}; use finite numbers of at least 0")
        super().__init__(list(criteria.values()))
        self.criteria = nn.ModuleDict(criteria)
        self.weights = {name: float(weights.get(name, 1.0)) for name in criteria}

    @property
    def name(self) -> str:
        """Empty, since each criterion has its own name."""
        return ""

    @property
    def parts(self) -> list[DistillLoss]:
        """The criteria in their order."""
        return list(self.criteria.values())  # type: ignore[arg-type]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted terms of all criteria, by name."""
        terms = {}
        for name, criterion in self.criteria.items():
            for key, term in named_terms(name, criterion(student, teacher, batch)).items():
                if key in terms:
                    raise ValueError(f"two criteria in WeightedSum have a term named {key!r}; rename one of them")
                terms[key] = self.weights[name] * term
        return terms
