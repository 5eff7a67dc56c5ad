"""Base classes of distillation losses and their composition."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from lkd.layers import resolve_layers
from lkd.losses._checks import check_dims
from lkd.types import Batch, Outputs, Probe

RESERVED = ("hard", "loss", "acc", "teacher_acc", "agreement")
"""Names of curves that a criterion must not take."""
SUM = "distill"
"""The name of a sum of criteria among the curves: none of the criteria may have it."""


class DistillLoss(nn.Module, ABC):
    """What a student is asked to imitate.

    A criterion's parameters train with the student, and its parameters and buffers are saved in the checkpoint.
    To write one, override `forward`, and `build` if it has adapters. Terms that it returns are logged under
    `train/<name>`, where the name is the class's in lower case.

    What lkd's own criteria promise of numbers (`tests/losses/test_properties.py`):

    - Finite answers of a size up to 1e8 (float16: 1e3), however small, equal or zero, and labels of any kind, missing
      ones too, give a finite value with a finite gradient; or a `ValueError` says that there are too few classes,
      images or pixels. In float16 the gradient may need the loss scaler of mixed precision. Larger answers may
      overflow.
    - Where the teacher says NaN, and a criterion reads it, its value is not finite either, and the modules report it.
      So it is with infinity, unless the formula has a meaning for it: a logit of -inf is a probability of 0, and only
      the sign of a feature may count.
    - A label that is no class of the network, nor `IGNORE_INDEX`, is a `ValueError` on the CPU, and an assertion on a
      GPU, which cannot be asked without waiting for it; unless only which images have a label is read.

    Args:
        student_layers: Names of the student's layers whose features it reads, as in `named_modules()`; a name
            followed by `:input` reads what goes into the layer; `@stages`, `@pooled` and the like stand for the
            network's own layers (`lkd.layers.resolve_layers`).
        teacher_layers: The same for the teacher.
    """

    needs_teacher: ClassVar[bool] = True
    """Whether `forward` reads the teacher's answers; if not, a run needs no teacher."""

    needs_index: ClassVar[bool] = False
    """Whether `forward` reads `Batch.index`."""

    reads_logits: ClassVar[bool] = True
    """Whether `forward` compares logits; then student and teacher must have the same classes."""

    num_views: ClassVar[int] = 1
    """How many views of each image it reads (`Batch.views`): the data module's `views` makes them."""

    compares_samples: ClassVar[bool] = False
    """Whether it compares the images of a batch with each other, so that one image by itself says nothing."""

    per_process: ClassVar[str] = ""
    """What each of several processes does with its own images alone, so that the gradient is not that of one process
    with all of them. Empty: nothing, it is the mean over the images, but for statistics of BatchNorm in adapters."""

    skips_unlabelled: ClassVar[bool | None] = False
    """Whether images without a label do not count, as it is a mean over the others; None: in some of its terms."""

    needs_build: ClassVar[bool] = False
    """Whether `forward` needs what `build` makes: so where `build` is overridden, unless it says otherwise."""

    same_everywhere: ClassVar[tuple[str, ...]] = ()
    """Buffers that several processes begin and change alike by themselves: DDP need not send them in every step."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = vars(cls)
        if "build" in own and "needs_build" not in own and cls.needs_build is False:  # a composite's is a property
            cls.needs_build = True

    def __init__(self, student_layers: Sequence[str] = (), teacher_layers: Sequence[str] = ()) -> None:
        super().__init__()
        for name, layers in (("student_layers", student_layers), ("teacher_layers", teacher_layers)):
            if isinstance(layers, str):
                raise TypeError(f"{name} is a list of layers' names, got {layers!r}; write [{layers!r}]")
        self.student_layers = tuple(student_layers)
        self.teacher_layers = tuple(teacher_layers)

    @property
    def name(self) -> str:
        """The criterion's name in logs."""
        return type(self).__name__.lower()

    def locate(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Replace `@stages` and the like in `student_layers` and `teacher_layers` by the networks' own names.

        Args:
            student: The student.
            teacher: The teacher; None if there is none.

        Raises:
            ValueError: If it is not known where such layers lie in the network.
        """
        self.student_layers = resolve_layers(student, self.student_layers)
        self.teacher_layers = () if teacher is None else resolve_layers(teacher, self.teacher_layers)

    def pairs(self, student: Outputs, teacher: Outputs, dims: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """The features of `student_layers`, each with that of the teacher's layer in the same place.

        Args:
            student: What the student answered.
            teacher: What the teacher answered.
            dims: How many dimensions all of them must have, as in `check_dims`; None: any.

        Raises:
            ValueError: If the numbers of layers differ, there is none, or a feature is no tensor, or has another form.
        """
        ours, theirs = self.student_layers, self.teacher_layers
        if len(ours) != len(theirs):
            raise ValueError(
                f"{type(self).__name__} compares the student's layers with the teacher's one by one, got {len(ours)} "
                f"({', '.join(ours)}) and {len(theirs)} ({', '.join(theirs)}); name as many student_layers as "
                "teacher_layers"
            )
        pairs = list(zip(read_layers(student, ours), read_layers(teacher, theirs), strict=True))
        if dims is not None:
            for own, other in pairs:
                check_dims(type(self).__name__, dims, student=own, teacher=other)
        return pairs

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the adapters, once the shapes of all features are known.

        It is called before the optimizer is made, and before a checkpoint's weights are loaded.

        Args:
            student: The student and its outputs for one blank input.
            teacher: The teacher and its outputs for one blank input.
        """

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor | dict[str, Tensor]:
        """Compare student and teacher.

        Args:
            student: What the student answered; gradients flow into it.
            teacher: What the teacher answered, without gradient.
            batch: The batch that both saw.

        Returns:
            A scalar, or named scalars that are to be added.
        """


def total(losses: Sequence[Tensor]) -> Tensor:
    """The sum, over layers say.

    Args:
        losses: One at least, of the same shape.
    """
    return sum(losses[1:], losses[0])


def read_layers(outputs: Outputs, layers: Sequence[str]) -> list[Tensor]:
    """The features of some layers.

    Args:
        outputs: What a network answered.
        layers: The layers' names, one at least.

    Raises:
        ValueError: If there is none, or one returned something other than a tensor.
    """
    if not layers:
        raise ValueError("the criterion reads features, and no layers are named; name student_layers or teacher_layers")
    for layer in layers:
        if not isinstance(outputs.features[layer], Tensor):
            kind = type(outputs.features[layer]).__name__
            raise ValueError(f"the layer {layer!r} returns a {kind}; name a layer that returns one tensor")
    return [outputs.features[layer] for layer in layers]


def check_criterion(owner: str, criterion: object) -> None:
    """Say what a criterion is where something else was given.

    Args:
        owner: Who takes it.
        criterion: What was given.

    Raises:
        TypeError: If it is no `DistillLoss`.
    """
    if isinstance(criterion, DistillLoss):
        return
    if isinstance(criterion, type):
        got, remedy = f"the class {criterion.__name__}", f"make one of it, as in {criterion.__name__}()"
    else:
        got, remedy = f"{type(criterion).__name__}", "take one of lkd.losses, or write a DistillLoss that calls it"
    raise TypeError(f"{owner} takes a criterion (a DistillLoss), got {got}; {remedy}")


def buffers_same_everywhere(module: nn.Module) -> list[str]:
    """The buffers that all criteria in a module keep alike in several processes, as in its `named_buffers()`.

    Args:
        module: A criterion, or what has some.

    Returns:
        What DDP reads in the wrapped module's attribute `_ddp_params_and_buffers_to_ignore`.
    """
    parts = [(prefix, part) for prefix, part in module.named_modules() if isinstance(part, DistillLoss)]
    return [f"{prefix}.{name}" if prefix else name for prefix, part in parts for name in part.same_everywhere]


def named_terms(name: str, loss: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a criterion returned, as named terms: a scalar gets the criterion's name.

    Args:
        name: The criterion's name; empty for one whose terms have names enough.
        loss: A scalar, or named scalars.

    Returns:
        `{name: scalar}` or `{name_key: scalar, ...}`.

    Raises:
        TypeError: If it is neither.
    """
    terms = loss if isinstance(loss, Mapping) else {"": loss}
    for term in terms.values():
        if not isinstance(term, Tensor) or term.dim() > 0:
            got = f"a tensor of shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            raise TypeError(
                f"the criterion {name or 'in a sum'} must return a scalar tensor, or a dict of them, got {got}; "
                "take the mean over the batch, and keep it a tensor"
            )
    return {"_".join(part for part in (name, key) if part): term for key, term in terms.items()}


class CompositeLoss(DistillLoss):
    """A criterion made of others: it reads their layers, needs what they need, and builds them.

    Args:
        parts: The others, as `parts` will return them.

    Raises:
        TypeError: If one of them is no criterion.
        ValueError: If they read different numbers of views, and more than one.
    """

    def __init__(self, parts: Sequence[DistillLoss]) -> None:
        for part in parts:
            check_criterion(type(self).__name__, part)
        if len(views := sorted({part.num_views for part in parts if part.num_views > 1})) > 1:
            raise ValueError(
                f"the criteria in {type(self).__name__} read {' and '.join(map(str, views))} views of each image, and "
                "a batch has one number of views; take criteria that read as many"
            )
        super().__init__(
            [layer for part in parts for layer in part.student_layers],
            [layer for part in parts for layer in part.teacher_layers],
        )

    @property
    @abstractmethod
    def parts(self) -> list[DistillLoss]:
        """The criteria that it is made of."""

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """Whether one of the parts reads the teacher's answers."""
        return any(part.needs_teacher for part in self.parts)

    @property
    def needs_index(self) -> bool:  # type: ignore[override]
        """Whether one of the parts reads `Batch.index`."""
        return any(part.needs_index for part in self.parts)

    @property
    def reads_logits(self) -> bool:  # type: ignore[override]
        """Whether one of the parts compares logits."""
        return any(part.reads_logits for part in self.parts)

    @property
    def compares_samples(self) -> bool:  # type: ignore[override]
        """Whether one of the parts compares the images of a batch with each other."""
        return any(part.compares_samples for part in self.parts)

    @property
    def per_process(self) -> str:  # type: ignore[override]
        """What the parts do with each process's own images alone."""
        return ", ".join(dict.fromkeys(part.per_process for part in self.parts if part.per_process))

    @property
    def skips_unlabelled(self) -> bool | None:  # type: ignore[override]
        """Whether images without a label do not count in any part; None: in some."""
        found = {part.skips_unlabelled for part in self.parts}
        return found.pop() if len(found) == 1 else None

    @property
    def needs_build(self) -> bool:  # type: ignore[override]
        """Whether one of the parts needs what its `build` makes."""
        return any(part.needs_build for part in self.parts)

    @property
    def num_views(self) -> int:  # type: ignore[override]
        """How many views the part with the most of them reads."""
        return max(part.num_views for part in self.parts)

    def locate(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Find the parts' layers: a part may read others than it names, as `MultiTeacher` does."""
        for part in self.parts:
            part.locate(student, teacher)
        self.student_layers = tuple(layer for part in self.parts for layer in part.student_layers)
        self.teacher_layers = tuple(layer for part in self.parts for layer in part.teacher_layers)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Build each part."""
        for part in self.parts:
            part.build(student, teacher)


def _is_module_name(name: object) -> bool:
    """Whether an `nn.ModuleDict` takes it."""
    return isinstance(name, str) and name != "" and "." not in name and not hasattr(nn.ModuleDict(), name)


class WeightedSum(CompositeLoss):
    """Several criteria at once, each with its weight.

    Args:
        criteria: Name (for logs and for `weights`) to criterion.
        weights: Name to weight, at least 0; a criterion without one weighs 1.

    Raises:
        TypeError: If `criteria` is no dict of criteria.
        ValueError: If there is no criterion, a weight is negative, not finite or names no criterion, or a criterion is
            called `loss`, `acc`, `distill` or as another curve, or so that PyTorch cannot keep it.

    Example:
        >>> from lkd.losses import KD
        >>> both = WeightedSum({"soft": KD(temperature=4.0), "sharp": KD(temperature=1.0)}, weights={"soft": 0.5})
        >>> both.weights
        {'soft': 0.5, 'sharp': 1.0}
    """

    def __init__(self, criteria: dict[str, DistillLoss], weights: dict[str, float] | None = None) -> None:
        weights = weights or {}
        if not isinstance(criteria, Mapping):
            raise TypeError(f"WeightedSum takes a dict of names and criteria, got {type(criteria).__name__}")
        if not criteria:
            raise ValueError("WeightedSum needs at least one criterion")
        if taken := sorted({*RESERVED, SUM} & set(criteria)):
            raise ValueError(f"a criterion in WeightedSum must not be called {taken}: other curves have this name")
        if refused := [name for name in criteria if not _is_module_name(name)]:
            raise ValueError(
                f"a criterion in WeightedSum cannot be called {refused}: a name is a text without dots that no dict "
                "has as an attribute; call it otherwise"
            )
        if unknown := sorted(set(weights) - set(criteria)):
            raise ValueError(f"WeightedSum has weights for {unknown}, but its criteria are {sorted(criteria)}")
        if wrong := {name: weight for name, weight in weights.items() if not 0 <= weight < math.inf}:
            raise ValueError(f"weights must not be negative, got {wrong}; take finite numbers from 0 on")
        super().__init__(list(criteria.values()))
        self.criteria = nn.ModuleDict(criteria)
        self.weights = {name: float(weights.get(name, 1.0)) for name in criteria}

    @property
    def name(self) -> str:
        """Empty: each criterion has its own name."""
        return ""

    @property
    def parts(self) -> list[DistillLoss]:
        """The criteria, in their order."""
        return list(self.criteria.values())  # type: ignore[arg-type]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms of all criteria, by name."""
        terms = {}
        for name, criterion in self.criteria.items():
            for key, term in named_terms(name, criterion(student, teacher, batch)).items():
                if key in terms:
                    raise ValueError(
                        f"two criteria in WeightedSum have a term called {key!r}; call one of them otherwise"
                    )
                terms[key] = self.weights[name] * term
        return terms
