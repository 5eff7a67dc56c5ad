"""Rows of the tables of criteria: small examples of a method, and what the method promises.

A method's file in tests/losses/methods/ has its rows as `CASES`, which the tests of all criteria collect.
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
    """A criterion that compares logits alone, and what its paper says of it.

    Attributes:
        make: Builds it.
        best: The student's logits that it asks for, from the teacher's logits and the targets.
        zero_at_best: Whether it is 0 there.
        shift_invariant: Whether a constant added to all of a sample's logits changes nothing.
        batch_mean: Whether it is the mean of its values for the single samples.
        reads_target: Whether it reads the labels; images without one then count as if they were not there.
    """

    make: Callable[[], DistillLoss]
    best: Callable[[Tensor, Tensor], Tensor] = lambda teacher, target: teacher
    zero_at_best: bool = True
    shift_invariant: bool = True
    batch_mean: bool = True
    reads_target: bool = False


@dataclass(frozen=True)
class FeatureCase:
    """A criterion that reads features, or more than one batch of logits, and what it promises.

    Attributes:
        make: Builds it; its layers are the names below.
        student: Layer of the student to shape of its feature, without the batch.
        teacher: The same for the teacher.
        student_network: A network with the layers whose weights the criterion reads, if any.
        teacher_network: The same for the teacher.
        views: How many views of each image its batches have.
        zero_at_equality: Whether it is 0, with no gradient, where all of the student's answers are the teacher's. Not
            so with adapters.
        batch_mean: Whether it is the mean of its values for the single samples, adapters in eval mode: then two
            processes have the gradient of one.
        memories: Buffers in which two processes remember what one does with all their images.
        reads_target: Whether it reads the labels; images without one then count as if they were not there.
        signs_only: Whether of the teacher's features only the sign is read; an infinite one is then as good as any.
        min_samples: The smallest batch that it takes; 2 where a BatchNorm sees pooled features.
        no_compile: Why torch.compile cannot make one graph of it; empty if it can.
        lr: Learning rate of Adam at which 40 steps lower it by a tenth at least.
        classes: How many classes there are.
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
    no_compile: str = ""
    lr: float = 0.05
    classes: int = CLASSES

    def of(self, classes: int, shrink: int) -> FeatureCase:
        """The same with so many classes, unless its networks have classifiers, and with maps smaller by a factor.

        Features that are vectors of `CLASSES` numbers are logits.
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
        """The criterion, with adapters; the same each time, the networks also with another seed."""
        torch.manual_seed(0)
        criterion, networks = self.make(), (self.student_network(), self.teacher_network())
        if seed:
            torch.manual_seed(seed)
        criterion.build(*(Probe(*pair) for pair in zip(networks, self.answers(2), strict=True)))
        return criterion

    def answers(self, samples: int = SAMPLES, size: float = 1.0, seed: int = 0) -> tuple[Outputs, Outputs]:
        """What student and teacher say of a batch of that many images, in all views; features as behind a ReLU."""
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
        """The labels and the positions of that many images, in all views."""
        index = torch.arange(samples).repeat(self.views)
        return Batch(None, index % self.classes, index, self.views)


@dataclass(frozen=True)
class SegmentationCase(FeatureCase):
    """A criterion that reads maps of logits, or masks.

    Attributes:
        logits: Rows and columns of both networks' logits.
        teacher_logits: The same for the teacher, where it differs.
        mask: Rows and columns of the masks. One row in four has no label.
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

    def answers(self, samples: int = SAMPLES, size: float = 1.0, seed: int = 0) -> tuple[Outputs, Outputs]:
        """What student and teacher say of a batch of that many images; features as behind a ReLU."""
        both = super().answers(samples, size, seed)
        generator = torch.Generator().manual_seed(seed + 1)

        def logits(rows: int, columns: int) -> Tensor:
            return 3 * size * torch.randn(samples, self.classes, rows, columns, generator=generator)

        student, teacher = (
            outputs._replace(logits=logits(*(own or self.logits)))
            for outputs, own in zip(both, (self.logits, self.teacher_logits), strict=True)
        )
        return student, teacher

    def batch(self, samples: int = SAMPLES) -> Batch:
        """The masks and the positions of that many images."""
        rows, columns = self.mask
        place = torch.arange(rows).view(-1, 1) // 2 + torch.arange(columns) // 3
        target = (place + torch.arange(samples).view(-1, 1, 1)) % self.classes
        target[:, 3::4] = IGNORE_INDEX
        return Batch(None, target, torch.arange(samples))


def classifier(channels: int) -> Callable[[], nn.Module]:
    """Makes a network whose classifier reads so many channels."""
    return lambda: nn.Sequential(nn.Linear(channels, CLASSES))


def changed(outputs: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    """Outputs with every tensor changed."""
    return Outputs(change(outputs.logits), {name: change(feature) for name, feature in outputs.features.items()})


def tensors(outputs: Outputs) -> list[Tensor]:
    """Logits and features."""
    return [outputs.logits, *outputs.features.values()]


def value(criterion: DistillLoss, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
    """The sum of a criterion's terms; what it draws is the same each time."""
    torch.manual_seed(0)
    loss = criterion(student, teacher, batch)
    return loss if isinstance(loss, Tensor) else torch.stack(list(loss.values())).sum()
