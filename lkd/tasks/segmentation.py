"""Semantic segmentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from lkd.losses._dense import interpolated
from lkd.losses._labels import mean_cross_entropy, total_weight
from lkd.tasks.base import Task
from lkd.tasks.metrics import Accuracy, MeanIoU, intersection_over_union, predicted_classes
from lkd.tasks.visualization import UNLABELLED, Visualization, class_color, class_name, colored
from lkd.types import IGNORE_INDEX, Batch, Mixed


class SemanticSegmentation(Task):
    """One class per pixel: networks return logits `(B, K, h, w)`, targets are masks `(B, H, W)`.

    Networks may return a smaller map than the mask; the logits are then interpolated to its size (bilinear,
    `align_corners=False`) for the loss and the metrics. Logged metrics: `val/miou` (mean intersection over union) and
    `val/acc` (pixel accuracy); `lkd validate` also logs `val/iou/<class>`, and `lkd test` logs `test/iou/<class>`.

    A network with an auxiliary head returns a dict that contains the logits of this head as `aux`. The supervised loss
    in training (`train/hard`) then includes their cross-entropy, multiplied by `aux_weight`; `val/loss` does not. The
    auxiliary head of a teacher is ignored.

    Args:
        num_classes: Number of classes, at least 2.
        ignore_index: Label of pixels that are excluded from the loss and the metrics.
        aux_weight: Weight of the auxiliary head's cross-entropy, at least 0.
        class_weights: Weight of each class (K values, at least 0) in the supervised loss, including `val/loss` and the
            loss of an auxiliary head, for example larger weights for rare classes; `None` weights all pixels equally.
            The loss of a batch is a weighted mean over its labelled pixels, as in `torch.nn.CrossEntropyLoss`, but 0
            instead of NaN if the weights of all labels are 0.

    Raises:
        ValueError: If `num_classes` is less than 2, `aux_weight` is negative, or `class_weights` does not contain one
            finite number per class, at least 0 and not all 0.

    References:
        Zhao et al.: Pyramid Scene Parsing Network, CVPR 2017 (arXiv 1612.01105), for the auxiliary head and its weight
        0.4, which mmsegmentation uses as well; torchvision's training script uses 0.5.
    """

    metric = "miou"
    metric_title = "mean IoU"
    class_metric_title = "IoU"
    pipeline_tag = "image-segmentation"

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        aux_weight: float = 0.4,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"SemanticSegmentation: num_classes must be at least 2, got {num_classes}")
        if not aux_weight >= 0:
            raise ValueError(f"SemanticSegmentation: aux_weight must be at least 0, got {aux_weight}; typically 0.4")
        self.num_classes, self.ignore_index, self.aux_weight = num_classes, ignore_index, aux_weight
        self.class_weights = None if class_weights is None else _checked(class_weights, num_classes)

    def prepare(self, batch: Batch) -> Batch:
        """Convert masks to int64, with `IGNORE_INDEX` where they are `ignore_index`.

        Raises:
            ValueError: If the images are mixed, or the masks do not have the shape `(B, H, W)`.
        """
        if batch.mixed is not None:
            raise ValueError("masks cannot be mixed; remove `mix` of the data module")
        target = batch.target
        if not isinstance(target, Tensor) or target.ndim != 3:
            got = str(tuple(target.shape)) if isinstance(target, Tensor) else f"a {type(target).__name__}"
            raise ValueError(
                f"SemanticSegmentation requires masks of shape (batch, height, width), got {got}; use a data module "
                "that returns masks, or another task"
            )
        target = target.long()
        return batch._replace(target=target.masked_fill(target == self.ignore_index, IGNORE_INDEX))

    def logits(self, output: Any) -> Tensor:
        """Return the logits `(B, K, h, w)`: the output itself, `.logits`, `["logits"]` or `["out"]`.

        Raises:
            TypeError: If the output contains no logits.
        """
        found = output.get("logits", output.get("out")) if isinstance(output, Mapping) else output
        logits = getattr(found, "logits", found)
        if not isinstance(logits, Tensor):
            keys = f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
            raise TypeError(
                "a segmentation network must return logits (a tensor, `.logits`, `['logits']` or `['out']`), got "
                f"{type(output).__name__}{keys}"
            )
        return logits

    def auxiliary_logits(self, output: Any) -> Tensor | None:
        """Return the logits `(B, K, h, w)` of an auxiliary head: `["aux"]`."""
        return output.get("aux") if isinstance(output, Mapping) else None

    def chance(self, num_classes: int) -> float:
        """Return 1 / (2K - 1), the mean IoU of uniformly random predictions for classes of equal frequency.

        With N pixels, each class has N / K labelled and N / K predicted pixels, of which N / K^2 coincide. If the
        frequencies of the classes differ, the mean IoU of random predictions is smaller.
        """
        return 1 / (2 * num_classes - 1)

    def check(self, name: str, logits: Tensor) -> None:
        """Check that a network returns a map with one channel per class.

        Raises:
            ValueError: If it does not.
        """
        shape = tuple(logits.shape)
        if logits.ndim != 4:
            raise ValueError(
                f"the {name} must return logits of shape (batch, classes, height, width), got {shape} for one input"
            )
        if shape[1] != self.num_classes:
            raise ValueError(
                f"the {name} returns {shape[1]} classes, but the task has {self.num_classes}; set num_classes of the "
                "network, or of the task, to the number of classes of the data"
            )

    def blank_target(self, logits: Tensor) -> Tensor:
        """Return class 0 for each pixel `(B, h, w)`."""
        return torch.zeros_like(logits[:, 0], dtype=torch.int64)

    def loss(self, logits: Tensor, target: Tensor, label_smoothing: float = 0.0, mixed: Mixed | None = None) -> Tensor:
        """Compute the (weighted) cross-entropy, averaged over the labelled pixels of the batch."""
        return mean_cross_entropy(_enlarged(logits, target), target, label_smoothing, self.class_weights)

    def labelled(self, target: Tensor) -> Tensor:
        """Return the number of labelled pixels."""
        return (target != IGNORE_INDEX).sum()

    def loss_weight(self, target: Tensor) -> Tensor:
        """Return the number of labelled pixels or, with `class_weights`, the sum of their weights."""
        return total_weight(target, self.class_weights)

    def correct(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the number of pixels that are classified correctly."""
        return (self._classes(logits, target) == target).sum()

    def metrics(self) -> dict[str, Metric]:
        """Create the mean IoU and the pixel accuracy."""
        return {"miou": MeanIoU(self.num_classes), "acc": Accuracy()}

    def update(self, metrics: Mapping[str, Metric], logits: Tensor, target: Tensor) -> None:
        """Update the metrics with a batch."""
        classes = self._classes(logits, target)
        for metric in metrics.values():
            metric.update(classes, target)

    def class_metrics(self, metrics: Mapping[str, Metric]) -> dict[str, Tensor]:
        """Return the intersection over union of each class, as `iou`."""
        miou = cast("MeanIoU", metrics["miou"])
        return {"iou": miou.per_class()} if miou.update_called else {}

    def choice(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the predicted class of each pixel `(B, H, W)`."""
        return self._classes(logits, target).masked_fill(target == IGNORE_INDEX, IGNORE_INDEX)

    def tally(self, choice: Tensor, target: Tensor) -> Tensor:
        """Return, for each class, the numbers of pixels that are correct, predicted and labelled `(B, 3, K)`."""
        known = (target != IGNORE_INDEX) & (choice != IGNORE_INDEX)
        correct = target.masked_fill(~known | (choice != target), self.num_classes)
        of_class = correct, choice.masked_fill(~known, self.num_classes), target.masked_fill(~known, self.num_classes)
        pixels = torch.stack([part.flatten(1) for part in of_class], 1)
        counts = torch.zeros(*pixels.shape[:2], self.num_classes + 1, dtype=torch.int64, device=target.device)
        return counts.scatter_add_(2, pixels, torch.ones_like(pixels))[..., :-1]

    def scores(self, counts: Tensor) -> dict[str, Tensor]:
        """Return the mean IoU and the pixel accuracy."""
        correct, _, labelled = counts.sum(-1).double().unbind(-1)
        return {"mean IoU": self.class_scores(counts).nanmean(-1), "pixel accuracy": correct / labelled}

    def class_scores(self, counts: Tensor) -> Tensor:
        """Return the intersection over union of each class."""
        return intersection_over_union(*counts.unbind(-2))

    def visualize(
        self, target: Tensor, class_names: Sequence[str], logits: Tensor | None = None
    ) -> list[Visualization]:
        """Return colored masks and, for predictions, the proportion of correct pixels."""
        masks = target if logits is None else self._classes(logits, target)
        shown = []
        for mask, label in zip(masks, target, strict=True):
            known = label != IGNORE_INDEX
            text = "" if logits is None else f"{int((mask == label).sum()) / max(1, int(known.sum())):.0%} correct"
            classes = [one for one in mask.unique().tolist() if one >= 0]
            legend = {class_name(class_names, one): class_color(one) for one in classes}
            legend |= {} if known.all() else {"no label": UNLABELLED}
            shown.append(Visualization(text, colored(mask), legend))
        return shown

    def _classes(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the most probable class of each pixel `(B, H, W)`, other than `ignore_index`."""
        return predicted_classes(_enlarged(logits, target), self.ignore_index)


def _checked(class_weights: Sequence[float], num_classes: int) -> tuple[float, ...]:
    weights = tuple(map(float, class_weights))
    if len(weights) != num_classes or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(
            f"SemanticSegmentation: class_weights must contain {num_classes} numbers (num_classes), at least 0 and not "
            f"all 0, got {list(class_weights)}"
        )
    return weights


def _enlarged(logits: Tensor, target: Tensor) -> Tensor:
    return interpolated(logits, (target.shape[1], target.shape[2]))
