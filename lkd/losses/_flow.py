"""Base class of losses that compare the relation between consecutive layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lkd.losses._adapters import projection
from lkd.losses.base import DistillLoss
from lkd.types import Outputs, Probe


class FlowLoss(DistillLoss):
    """It compares channel with channel, so both must have the same ones, if need be behind a connector."""

    reads_logits = False

    def __init__(self, student_layers: Sequence[str], teacher_layers: Sequence[str], connect: bool) -> None:
        super().__init__(student_layers, teacher_layers)
        self.connect = connect

    def build(self, student: Probe, teacher: Probe) -> None:
        """Check the layers, and make the connectors."""
        name, pairs = type(self).__name__, self.pairs(student.outputs, teacher.outputs, dims=4)
        if len(pairs) < 2:
            raise ValueError(f"{name} compares what lies between layers, got {len(pairs)} layer: name two at least")
        layers = zip(self.student_layers, self.teacher_layers, pairs, strict=True)
        for own, other, (ours, theirs) in layers:
            if ours.shape[1] != theirs.shape[1] and not self.connect:
                raise ValueError(
                    f"{name} needs as many channels in the student's layers as in the teacher's, got {ours.shape[1]} "
                    f"({own}) and {theirs.shape[1]} ({other}); take other layers, or `connect: true` for a 1x1 "
                    "convolution"
                )
        self.connectors = nn.ModuleList(
            nn.Identity() if ours.shape[1] == theirs.shape[1] else projection(ours.shape[1], theirs.shape[1])
            for ours, theirs in pairs
        )

    def connected(self, student: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """The student's features behind their connectors, and the teacher's."""
        ours = zip(self.connectors, self.student_layers, strict=True)
        return (
            [connector(student.features[layer]) for connector, layer in ours],
            [teacher.features[layer] for layer in self.teacher_layers],
        )


def check_layers(owner: str, features: Sequence[Tensor]) -> None:
    if len(features) < 2:
        raise ValueError(f"{owner} compares each layer with the next, got {len(features)} layers; give at least two")
