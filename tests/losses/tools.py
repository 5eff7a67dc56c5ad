"""Helpers for the tests of several methods: outputs, built criteria and reference formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd import DistillLoss, Outputs, Probe

CLASSES = 5
STAGES = ((6, 5, 5), (8, 4, 4), (7, 3, 3))
Shape = tuple[int, ...]


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Draw normally distributed numbers in float64."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(logits: Tensor | None = None, **features: Tensor) -> Outputs:
    """Return outputs with the given features; the logits of five classes are 0 unless given."""
    if logits is None:
        logits = torch.zeros(len(next(iter(features.values()))), CLASSES)
    return Outputs(logits, features)


def output_pair(student: Tensor, teacher: Tensor) -> tuple[Outputs, Outputs]:
    """Return outputs with the student's layer a and the teacher's layer c."""
    return outputs(a=student), outputs(c=teacher)


def built(
    criterion: DistillLoss, student: Outputs, teacher: Outputs, networks: tuple[nn.Module, nn.Module] | None = None
) -> DistillLoss:
    """Build a criterion's adapters for these outputs, in the student's dtype."""
    ours, theirs = networks or (nn.Identity(), nn.Identity())
    criterion.build(Probe(ours, student), Probe(theirs, teacher))
    return criterion.to(next(iter((*student.features.values(), student.logits))).dtype)


def built_on_shapes(criterion: DistillLoss, student: Shape, teacher: Shape) -> DistillLoss:
    """Build a criterion's adapters for the student's layer a and the teacher's layer b with these shapes."""
    network = nn.Sequential(nn.Linear(3, CLASSES))
    return built(criterion, outputs(a=torch.zeros(student)), outputs(b=torch.zeros(teacher)), (network, network))


def stages(seed: int, shapes: Sequence[Shape] = STAGES) -> list[Tensor]:
    """Return non-negative features of consecutive layers for three images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *shape, generator=generator, dtype=torch.float64).relu() for shape in shapes]


def layered(features: Sequence[Tensor]) -> Outputs:
    """Return outputs with the features as layer0, layer1, ..."""
    return outputs(**{f"layer{number}": feature for number, feature in enumerate(features)})


def built_stages(
    kind: type[DistillLoss], student: Sequence[Tensor], teacher: Sequence[Tensor], **settings: object
) -> DistillLoss:
    """Build a criterion that compares all these features."""
    both = layered(student), layered(teacher)
    return built(kind(*(list(each.features) for each in both), **settings), *both)


def alike(criterion: DistillLoss, network: nn.Module) -> tuple[DistillLoss, Outputs]:
    """Build a criterion whose student and teacher are the same ResNet, and return it with their outputs."""
    criterion.resolve_layers(network, network)
    generator = torch.Generator().manual_seed(0)
    pairs = zip(criterion.student_layers, (16, 32, 64), strict=False)
    same = outputs(**{layer: torch.randn(4, width, 4, 4, generator=generator) for layer, width in pairs})
    return built(criterion, same, same, (network, network)), same


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Compute Hinton's loss of one sample by its definition."""
    p, q = (F.softmax(logits / temperature, dim=0) for logits in (teacher, student))
    return float(temperature**2 * (p * (p / q).log()).sum())
