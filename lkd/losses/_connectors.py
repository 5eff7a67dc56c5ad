"""Base class of losses that compare projected feature maps with per-layer weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from lkd.losses._adapters import projections
from lkd.losses.base import DistillLoss, total
from lkd.types import Outputs, Probe

LayerWeights = Literal["equal", "doubling"] | Sequence[float]


class ConnectedLoss(DistillLoss):
    """Base class of losses that map student features through 1x1 convolutions with BatchNorm and weight the layers.

    Args:
        student_layers: Student layers whose feature maps are compared.
        teacher_layers: Teacher layers, one for each student layer.
        layer_weights: `equal`, `doubling`, or one number for each layer.
    """

    reads_logits = False

    def __init__(
        self, student_layers: Sequence[str], teacher_layers: Sequence[str], layer_weights: LayerWeights
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if not isinstance(layer_weights, str) and not all(0 <= weight < math.inf for weight in layer_weights):
            raise ValueError(
                f"layer_weights must not be negative, got {list(layer_weights)}; use finite numbers of at least 0"
            )
        self.layer_weights = layer_weights

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the connectors."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=4)
        if not isinstance(self.layer_weights, str) and len(self.layer_weights) != len(pairs):
            raise ValueError(
                f"{type(self).__name__} compares {len(pairs)} layers but has {len(self.layer_weights)} layer_weights; "
                "set one for each layer, or `equal` or `doubling`"
            )
        self.connectors = projections(pairs)

    def connected(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of the student's features after the connectors and the teacher's features."""
        pairs = zip(self.connectors, self.pairs(student, teacher), strict=True)
        return [
            (connector(student_feature), teacher_feature) for connector, (student_feature, teacher_feature) in pairs
        ]

    def weighted_total(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum of the losses of the layers."""
        weights: Sequence[float]
        if self.layer_weights == "equal":
            weights = [1.0] * len(losses)
        elif self.layer_weights == "doubling":
            weights = [2.0 ** (layer + 1 - len(losses)) for layer in range(len(losses))]
        else:
            weights = self.layer_weights
        return total([weight * loss for weight, loss in zip(weights, losses, strict=True)])
