"""Cases for the tests of all criteria: small examples of a method, and the properties that it guarantees.

A method's file in tests/losses/methods/ defines its cases as `CASES`, which the tests of all criteria collect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lkd import Batch, DistillLoss, Outputs, Probe
from lkd.types import IGNORE_INDEX

SAMPLES, CLASSES = 8, 5
LAYERS = (["a", "b"], ["c", "d"])
"""Two layers of the student, and two of the teacher."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LogitCase:
    """A criterion that compares logits only, and the properties that its paper states.

    Attributes:
        make: Function that creates the criterion.
        best: The student's logits that minimize the loss, computed from the teacher's logits and the targets.
        zero_at_best: Whether the loss is 0 there.
        shift_invariant: Whether the loss is unchanged if a constant is added to all logits of a sample.
        batch_mean: Whether the loss of a batch is the mean of the losses of its samples.
        reads_target: Whether it reads the labels; unlabelled images are then ignored.
    """

    make: Callable[[], DistillLoss]
    best: Callable[[Tensor, Tensor], Tensor] = lambda teacher, target: teacher
    zero_at_best: bool = True
    shift_invariant: bool = True
    batch_mean: bool = True
    reads_target: bool = False


@dataclass(frozen=True)
class FeatureCase:
    """A criterion that reads features, or more than one batch of logits, and the properties that it guarantees.

    Attributes:
        make: Function that creates the criterion, with the layer names below.
        student: Mapping from the student's layers to the shapes of their features, without the batch dimension.
        teacher: The same for the teacher.
        student_network: A network with the layers whose weights the criterion reads, if any.
        teacher_network: The same for the teacher.
        views: Number of views of each image in a batch.
        zero_at_equality: Whether loss and gradient are 0 if all outputs of the student equal the teacher's. Not with
            adapters.
        batch_mean: Whether the loss of a batch is the mean of the losses of its samples, with adapters in eval mode.
            Two processes then have the gradient of one.
        memories: Buffers in which two processes store the same values as one process with all their images.
        reads_target: Whether it reads the labels; unlabelled images are then ignored.
        signs_only: Whether only the sign of the teacher's features is read; infinite features are then valid.
        min_samples: Minimum batch size; 2 if a BatchNorm reads pooled features.
        lr: Learning rate of Adam with which 40 steps reduce the loss by at least 10 %.
        classes: Number of classes.
    """

    make: Callable[[], DistillLoss]
    student: Shapes = field(default_factory=dict)
    teacher: Shapes = field(default_factory=dict)
    student_network: Callable[[], nn.Module] = nn.Identity
    teacher_network: Callable[[], nn.Module] = nn.Identity
    views: int = 1
    zero_at_equality: bool = False
    batch_mean: bool = False
    memories: tuple[str, ...] = ()
    reads_target: bool = False
    signs_only: bool = False
    min_samples: int = 1
    lr: float = 0.05
    classes: int = CLASSES

    def of(self, classes: int, shrink: int) -> FeatureCase:
        """Return this case with another number of classes and with its maps reduced by a factor.

        Networks with classifiers keep their number of classes. Vectors of `CLASSES` numbers are logits.
        """
        networks = (self.student_network(), self.teacher_network())
        if any(isinstance(layer, nn.Linear) for network in networks for layer in network.modules()):
            classes = CLASSES

        def changed(shape: tuple[int, ...]) -> tuple[int, ...]:
            if len(shape) == 3:
                return (shape[0], *(max(size // shrink, 1) for size in shape[1:]))
            return (classes,) if shape == (CLASSES,) else shape

        student, teacher = ({name: changed(shape) for name, shape in s.items()} for s in (self.student, self.teacher))
        return replace(self, student=student, teacher=teacher, classes=classes)

    def criterion(self, seed: int = 0) -> DistillLoss:
        """Create the criterion with its adapters; the seed changes only the adapters."""
        torch.manual_seed(0)
        criterion, networks = self.make(), (self.student_network(), self.teacher_network())
        if seed:
            torch.manual_seed(seed)
        criterion.build(*(Probe(*pair) for pair in zip(networks, self.outputs(2), strict=True)))
        return criterion

    def outputs(self, samples: int = SAMPLES, size: float = 1.0, seed: int = 0) -> tuple[Outputs, Outputs]:
        """Return random outputs of student and teacher for a batch, in all views; features are non-negative."""
        generator = torch.Generator().manual_seed(seed)
        both = []
        for shapes in (self.student, self.teacher):
            rows = samples * self.views
            features = {
                name: size * torch.randn(rows, *shape, generator=generator).relu() for name, shape in shapes.items()
            }
            both.append(Outputs(3 * size * torch.randn(rows, self.classes, generator=generator), features))
        return both[0], both[1]

    def batch(self, samples: int = SAMPLES) -> Batch:
        """Return the labels and indices of a batch, in all views."""
        index = torch.arange(samples).repeat(self.views)
        return Batch(None, index % self.classes, index, self.views)


@dataclass(frozen=True)
class SegmentationCase(FeatureCase):
    """A criterion that reads maps of logits, or masks.

    Attributes:
        logits: Height and width of both networks' logits.
        teacher_logits: Height and width of the teacher's logits, if they differ.
        mask: Height and width of the masks. One row in four is unlabelled.
    """

    logits: tuple[int, int] = (4, 6)
    teacher_logits: tuple[int, int] | None = None
    mask: tuple[int, int] = (8, 12)

    def of(self, classes: int, shrink: int) -> FeatureCase:
        """Return this case with another number of classes, and with its maps and masks reduced by a factor."""

        def smaller(size: tuple[int, int]) -> tuple[int, int]:
            return max(size[0] // shrink, 1), max(size[1] // shrink, 1)

        case = super().of(classes, shrink)
        other = self.teacher_logits and smaller(self.teacher_logits)
        return replace(case, logits=smaller(self.logits), teacher_logits=other, mask=smaller(self.mask))

    def outputs(self, samples: int = SAMPLES, size: float = 1.0, seed: int = 0) -> tuple[Outputs, Outputs]:
        """Return random outputs of student and teacher for a batch; features are non-negative."""
        both = super().outputs(samples, size, seed)
        generator = torch.Generator().manual_seed(seed + 1)

        def logits(rows: int, columns: int) -> Tensor:
            return 3 * size * torch.randn(samples, self.classes, rows, columns, generator=generator)

        student, teacher = (
            outputs._replace(logits=logits(*(own or self.logits)))
            for outputs, own in zip(both, (self.logits, self.teacher_logits), strict=True)
        )
        return student, teacher

    def batch(self, samples: int = SAMPLES) -> Batch:
        """Return the masks and indices of a batch."""
        rows, columns = self.mask
        place = torch.arange(rows).view(-1, 1) // 2 + torch.arange(columns) // 3
        target = (place + torch.arange(samples).view(-1, 1, 1)) % self.classes
        target[:, 3::4] = IGNORE_INDEX
        return Batch(None, target, torch.arange(samples))


def classifier(channels: int) -> Callable[[], nn.Module]:
    """Return a function that creates a network whose classifier reads `channels` channels."""
    return lambda: nn.Sequential(nn.Linear(channels, CLASSES))


def changed(outputs: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    """Return outputs with a function applied to every tensor."""
    return Outputs(change(outputs.logits), {name: change(feature) for name, feature in outputs.features.items()})


def tensors(outputs: Outputs) -> list[Tensor]:
    """Return the logits and features."""
    return [outputs.logits, *outputs.features.values()]


def value(criterion: DistillLoss, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
    """Compute the sum of a criterion's terms, with a fixed random seed."""
    torch.manual_seed(0)
    loss = criterion(student, teacher, batch)
    return loss if isinstance(loss, Tensor) else torch.stack(list(loss.values())).sum()
