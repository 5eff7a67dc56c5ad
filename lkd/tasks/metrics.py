"""Metrics that are updated without synchronizing with the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex

from lkd.types import IGNORE_INDEX


class WeightedMean(Metric):
    """Weighted mean of scalars: 0 if the total weight is 0, and not finite if a value is not finite.

    torchmetrics' `MeanMetric` checks for NaN in each step, which synchronizes with the device. If this check is
    disabled, it ignores the weights (up to version 1.9).
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            # With precision="bf16-true", 16 bits are the default during evaluation; large sums would stop growing.
            self.add_state(name, torch.tensor(0.0, dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor) -> None:
        """Add a value.

        Args:
            value: Scalar.
            weight: Weight of the value, at least 0.
        """
        self.total += value * weight
        self.weight += weight

    def compute(self) -> Tensor:
        """Return the weighted mean."""
        return self.total / torch.where(self.weight > 0, self.weight, 1)


class Accuracy(Metric):
    """Proportion of labelled samples or pixels that are classified correctly.

    torchmetrics' `MulticlassAccuracy` selects the labelled samples, which synchronizes with the device to count them.
    """

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("correct", "total"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Add samples.

        Args:
            predictions: Logits `(B, K, ...)` or class indices `(B, ...)`.
            target: Class indices `(B, ...)`; `IGNORE_INDEX` for samples or pixels without a label.
        """
        classes = predictions.argmax(1) if predictions.dim() > target.dim() else predictions
        labelled = target != IGNORE_INDEX
        self.correct += ((classes == target) & labelled).sum()
        self.total += labelled.sum()

    def compute(self) -> Tensor:
        """Return the accuracy, in [0, 1]; 0 if no sample has a label."""
        return self.correct / self.total.clamp(min=1)


class MeanIoU(MulticlassJaccardIndex):
    """Intersection over union, averaged over the classes that occur in the labels or the predictions.

    torchmetrics' own update selects the labelled pixels, which synchronizes with the device to count them.

    Args:
        num_classes: Number of classes, at least 2.
    """

    confmat: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="macro", validate_args=False)

    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Add pixels.

        Args:
            predictions: Logits `(B, K, H, W)` or class indices `(B, H, W)`.
            target: Class of each pixel `(B, H, W)`; `IGNORE_INDEX` for pixels without a label.
        """
        classes = predicted_classes(predictions) if predictions.dim() > target.dim() else predictions
        labelled = target != IGNORE_INDEX
        cells = (target.masked_fill(~labelled, 0) * self.num_classes + classes).flatten()
        counts = torch.zeros(self.num_classes**2, dtype=torch.int64, device=target.device)
        self.confmat += counts.scatter_add_(0, cells, labelled.flatten().long()).view_as(self.confmat)

    def per_class(self) -> Tensor:
        """Return the intersection over union of each class `(K,)` over all processes; NaN for absent classes."""
        with self.sync_context():
            counts = self.confmat.cpu()  # not all devices support float64
        values = intersection_over_union(counts.diagonal(), counts.sum(0), counts.sum(1))
        return values.to(self.device, torch.float32)


def predicted_classes(logits: Tensor, excluded: int = -1) -> Tensor:
    """Return the class with the largest logit.

    On the CPU, `max` is several times faster than `argmax` for maps.

    Args:
        logits: Logits `(B, K, ...)`.
        excluded: Class that is never returned, if it is one.

    Returns:
        Class indices `(B, ...)`.
    """
    if 0 <= excluded < logits.shape[1]:
        logits = logits.detach().clone()
        logits.select(1, excluded).fill_(-torch.inf)
    return logits.detach().max(1).indices


def intersection_over_union(shared: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
    """Compute the intersection over union of each class.

    Args:
        shared: Number of pixels with this class as prediction and label `(..., K)`.
        predicted: Number of labelled pixels with this prediction `(..., K)`.
        labelled: Number of pixels with this label `(..., K)`.

    Returns:
        Float64 values in [0, 1] `(..., K)`; NaN for absent classes.
    """
    shared = shared.double()
    return shared / (predicted + labelled - shared)
