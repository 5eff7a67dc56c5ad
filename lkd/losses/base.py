"""Base classes of distillation losses and their composition."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from lkd._moved import former_members
from lkd.features.layers import resolve_layers
from lkd.losses._checks import check_dims, check_same_areas, layer_list
from lkd.types import Batch, Outputs, Probe

RESERVED = ("hard", "loss", "acc", "agreement")
"""Names of logged values that a criterion must not use. The names of the task's metrics are reserved as well."""
SUM = "distill"
"""Name under which the sum of several terms is logged; reserved as well."""
_PLAIN = (bool, int, float, str, tuple, dict)
"""Types of settings that `repr` shows."""


@former_members(locate="resolve_layers")
class DistillLoss(nn.Module, ABC):
    """Base class of distillation criteria.

    A criterion compares the outputs and features of student and teacher. Subclasses override `forward`, and `build` if
    they have adapters. The parameters of a criterion are trained with the student, and its parameters and buffers are
    saved in the checkpoint. The returned terms are logged as `train/<name>`, where the name is the lower-case class
    name.

    The criteria in lkd guarantee the following numerical behavior (`tests/losses/test_properties.py`):

    - For finite inputs of magnitude up to 1e8 (float16: 1e3), including tiny, equal and zero values, and for any
      labels, including missing ones, the value and its gradient are finite, or a `ValueError` reports too few classes,
      images or pixels. In float16, the gradient may require the gradient scaler of mixed precision. Larger inputs may
      overflow.
    - If the teacher outputs NaN and the criterion reads it, the value is not finite, and the modules report it. The
      same applies to infinity unless the formula defines its meaning: a logit of -inf is a probability of 0, and some
      losses read only the sign of a feature.
    - A label that is neither a class of the network nor `IGNORE_INDEX` raises a `ValueError` on the CPU and a
      device-side assertion on a GPU, where a check would require a synchronization. Criteria that read only whether a
      label is present do not check it.

    Args:
        student_layers: Names of the student layers whose features are read, as in `named_modules()`. The suffix
            `:input` selects the input of a layer. `@stages`, `@pooled` and similar names stand for the layers of the
            respective network (`lkd.features.layers.resolve_layers`).
        teacher_layers: Names of the teacher layers, in the same format.

    Raises:
        TypeError: If the layers are given as a single string.
    """

    needs_teacher: ClassVar[bool] = True
    """Whether `forward` reads the teacher's outputs; if not, a run needs no teacher."""

    needs_index: ClassVar[bool] = False
    """Whether `forward` reads `Batch.index`."""

    reads_logits: ClassVar[bool] = True
    """Whether `forward` compares logits, which requires the same classes in student and teacher."""

    num_views: ClassVar[int] = 1
    """Number of views of each image (`Batch.views`), created by the data module's `views`."""

    compares_samples: ClassVar[bool] = False
    """Whether the samples of a batch are compared with each other, so a single sample is not sufficient."""

    per_process: ClassVar[str] = ""
    """What each process computes from its own samples only, so that the gradient differs from that of a single process
    with all samples. Empty if the loss is a mean over samples, except for BatchNorm statistics in adapters."""

    skips_unlabelled: ClassVar[bool | None] = False
    """Whether the loss is a mean over labelled samples only; None if this applies to some of its terms."""

    needs_build: ClassVar[bool] = False
    """Whether `forward` requires `build`; set automatically in classes that override `build`."""

    same_everywhere: ClassVar[tuple[str, ...]] = ()
    """Buffers that are identical on all processes without synchronization, so DDP need not broadcast them."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = vars(cls)
        if "build" in own and "needs_build" not in own and cls.needs_build is False:  # a property in composites
            cls.needs_build = True

    def __init__(self, student_layers: Sequence[str] = (), teacher_layers: Sequence[str] = ()) -> None:
        super().__init__()
        self.student_layers = layer_list("student_layers", student_layers)
        self.teacher_layers = layer_list("teacher_layers", teacher_layers)

    @property
    def name(self) -> str:
        """Name of the criterion in logs."""
        return type(self).__name__.lower()

    def extra_repr(self) -> str:
        """Settings of the criterion, for `repr`."""
        names = [name for name in inspect.signature(type(self)).parameters if isinstance(vars(self).get(name), _PLAIN)]
        return ", ".join(f"{name}={vars(self)[name]!r}" for name in names)

    def resolve_layers(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Replace `@stages` and similar names in `student_layers` and `teacher_layers` by actual layer names.

        Args:
            student: Student network.
            teacher: Teacher network, or `None` if there is none.

        Raises:
            ValueError: If the layers of a network are not known.
        """
        self.student_layers = resolve_layers(student, self.student_layers)
        self.teacher_layers = () if teacher is None else resolve_layers(teacher, self.teacher_layers)

    def pairs(self, student: Outputs, teacher: Outputs, dims: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return the features of `student_layers` paired with those of `teacher_layers`.

        Args:
            student: Outputs of the student.
            teacher: Outputs of the teacher.
            dims: Required number of dimensions of all features, as in `check_dims`; `None` disables the check.

        Raises:
            ValueError: If the numbers of layers differ or are 0, if a feature is not a tensor, if it has another number
                of dimensions, or if detectors resize or pad the images differently.
        """
        student_layers, teacher_layers = self.student_layers, self.teacher_layers
        if len(student_layers) != len(teacher_layers):
            raise ValueError(
                f"{type(self).__name__} requires the same number of student_layers and teacher_layers, got "
                f"{len(student_layers)} ({', '.join(student_layers)}) and {len(teacher_layers)} "
                f"({', '.join(teacher_layers)})"
            )
        check_same_areas(type(self).__name__, student.logits, teacher.logits)
        pairs = list(zip(read_layers(student, student_layers), read_layers(teacher, teacher_layers), strict=True))
        if dims is not None:
            for student_feature, teacher_feature in pairs:
                check_dims(type(self).__name__, dims, student=student_feature, teacher=teacher_feature)
        return pairs

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the adapters once the shapes of all features are known.

        This method is called before the optimizer is created and before the weights of a checkpoint are loaded.

        Args:
            student: Student network and its outputs for a single blank input.
            teacher: Teacher network and its outputs for a single blank input.
        """

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor | dict[str, Tensor]:
        """Compute the loss.

        Args:
            student: Outputs of the student, with gradients.
            teacher: Outputs of the teacher, without gradients.
            batch: Batch that both networks received.

        Returns:
            Scalar loss, or a dict of named scalars that are summed.
        """


def total(losses: Sequence[Tensor]) -> Tensor:
    """Sum of losses, for example over layers.

    Args:
        losses: At least one loss, all of the same shape.
    """
    return sum(losses[1:], losses[0])


def read_layers(outputs: Outputs, layers: Sequence[str]) -> list[Tensor]:
    """Return the features of several layers.

    Args:
        outputs: Outputs of a network.
        layers: Names of the layers, at least one.

    Raises:
        ValueError: If there are no layers, or if a layer does not return a single tensor.
    """
    if not layers:
        raise ValueError("the criterion reads features, but no layers are set; set student_layers and teacher_layers")
    for layer in layers:
        if not isinstance(outputs.features[layer], Tensor):
            kind = type(outputs.features[layer]).__name__
            raise ValueError(f"the layer {layer!r} returns a {kind}; use a layer that returns a single tensor")
    return [outputs.features[layer] for layer in layers]


def check_criterion(owner: str, criterion: object) -> None:
    """Check that an object is a criterion.

    Args:
        owner: Name of the class that requires a criterion, for the error message.
        criterion: Object to check.

    Raises:
        TypeError: If it is not a `DistillLoss`.
    """
    if isinstance(criterion, DistillLoss):
        return
    if isinstance(criterion, type):
        got, remedy = f"the class {criterion.__name__}", f"create an instance: {criterion.__name__}()"
    else:
        got = type(criterion).__name__
        remedy = "use a criterion of lkd.losses, or write a DistillLoss that calls it"
    raise TypeError(f"{owner} requires a criterion (a DistillLoss), got {got}; {remedy}")


def buffers_same_everywhere(module: nn.Module) -> list[str]:
    """Return the names of the buffers that all criteria in a module keep identical on all processes.

    Args:
        module: A criterion, or a module that contains criteria.

    Returns:
        Names as in `named_buffers()`, for the attribute `_ddp_params_and_buffers_to_ignore` of a module wrapped by DDP.
    """
    parts = [(prefix, part) for prefix, part in module.named_modules() if isinstance(part, DistillLoss)]
    return [f"{prefix}.{name}" if prefix else name for prefix, part in parts for name in part.same_everywhere]


def named_terms(name: str, loss: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the return value of a criterion to named terms.

    Args:
        name: Name of the criterion; empty if the names of the terms are sufficient.
        loss: Scalar loss, or a dict of named scalars.

    Returns:
        `{name: scalar}` for a scalar and `{name_key: scalar, ...}` for a dict.

    Raises:
        TypeError: If the value is neither a scalar tensor nor a dict of scalar tensors.
    """
    terms = loss if isinstance(loss, Mapping) else {"": loss}
    for term in terms.values():
        if not isinstance(term, Tensor) or term.dim() > 0:
            got = f"a tensor of shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            raise TypeError(
                f"the criterion {name or 'in a sum'} must return a scalar tensor or a dict of them, got {got}; "
                "average over the batch and return a tensor"
            )
    return {"_".join(part for part in (name, key) if part): term for key, term in terms.items()}
