"""Base class of losses that compare the relation between consecutive layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lkd.losses._adapters import channel_pairs, projection
from lkd.losses.base import DistillLoss
from lkd.types import Outputs, Probe


class FlowLoss(DistillLoss):
    """Base class of losses that compare the relation between consecutive layers channel by channel.

    Args:
        student_layers: Student layers, at least two, in the order of the network.
        teacher_layers: Teacher layers, one for each student layer.
        connect: Whether a 1x1 convolution with BatchNorm adapts student maps to the teacher's number of channels.
    """

    reads_logits = False

    def __init__(self, student_layers: Sequence[str], teacher_layers: Sequence[str], connect: bool) -> None:
        super().__init__(student_layers, teacher_layers)
        self.connect = connect

    def build(self, student: Probe, teacher: Probe) -> None:
        """Check the layers and create the connectors."""
        name, pairs = type(self).__name__, self.pairs(student.outputs, teacher.outputs, dims=4)
        if len(pairs) < 2:
            raise ValueError(f"{name} compares consecutive layers and requires at least two, got {len(pairs)}")
        channels = channel_pairs(pairs)
        layers = zip(self.student_layers, self.teacher_layers, channels, strict=True)
        for student_layer, teacher_layer, (in_channels, out_channels) in layers:
            if in_channels != out_channels and not self.connect:
                raise ValueError(
                    f"{name} requires the same number of channels in student and teacher layers, got "
                    f"{in_channels} ({student_layer}) and {out_channels} ({teacher_layer}); use other layers, or "
                    "`connect: true` for a 1x1 convolution"
                )
        self.connectors = nn.ModuleList(
            nn.Identity() if student == teacher else projection(student, teacher) for student, teacher in channels
        )

    def connected(self, student: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """Return the student's features after the connectors, and the teacher's features."""
        layers = zip(self.connectors, self.student_layers, strict=True)
        return (
            [connector(student.features[layer]) for connector, layer in layers],
            [teacher.features[layer] for layer in self.teacher_layers],
        )


def check_layers(owner: str, features: Sequence[Tensor]) -> None:
    """Check that there are at least two layers.

    Args:
        owner: Name of the loss, for the error message.
        features: One feature for each layer.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(features) < 2:
        raise ValueError(f"{owner} compares consecutive layers and requires at least two, got {len(features)}")
