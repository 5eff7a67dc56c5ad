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
    """The student's feature maps go through connectors, 1x1 convolutions with BatchNorm; each layer has a weight."""

    reads_logits = False

    def __init__(
        self, student_layers: Sequence[str], teacher_layers: Sequence[str], layer_weights: LayerWeights
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if not isinstance(layer_weights, str) and not all(0 <= weight < math.inf for weight in layer_weights):
            raise ValueError(
                f"layer_weights must not be negative, got {list(layer_weights)}; take finite numbers from 0 on"
            )
        self.layer_weights = layer_weights

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the connectors."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=4)
        if not isinstance(self.layer_weights, str) and len(self.layer_weights) != len(pairs):
            raise ValueError(
                f"{type(self).__name__} compares {len(pairs)} layers and has {len(self.layer_weights)} layer_weights; "
                "give one for each layer, or `equal` or `doubling`"
            )
        self.connectors = projections(pairs)

    def connected(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """The student's features behind their connectors, each with the teacher's."""
        pairs = zip(self.connectors, self.pairs(student, teacher), strict=True)
        return [(connector(ours), theirs) for connector, (ours, theirs) in pairs]

    def weighted_total(self, losses: Sequence[Tensor]) -> Tensor:
        """The layers' losses, weighted and added."""
        weights: Sequence[float]
        if self.layer_weights == "equal":
            weights = [1.0] * len(losses)
        elif self.layer_weights == "doubling":
            weights = [2.0 ** (layer + 1 - len(losses)) for layer in range(len(losses))]
        else:
            weights = self.layer_weights
        return total([weight * loss for weight, loss in zip(weights, losses, strict=True)])
