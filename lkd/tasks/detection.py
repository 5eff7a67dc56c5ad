"""Object detection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lkd.tasks.base import Task
from lkd.types import Batch, Mixed, Predictions

Targets = Sequence[Mapping[str, Tensor]]


class Detection(Task):
    """Object detection: each network is an `lkd.models.Detector`, and targets are the boxes of each image.

    `Batch.input` is a list of images `(C, H_i, W_i)`, which may differ in size, with pixels in [0, 1]. `Batch.target`
    is a list of dicts with `boxes` `(N_i, 4)`, x1, y1, x2, y2 in pixels, and `labels` `(N_i,)`, int64; class 0 is the
    background. The supervised loss is the sum of the terms of the network's own loss. Logged metrics: `val/map` (mean
    average precision over IoU thresholds from 0.5 to 0.95, as on COCO) and `val/map_50` (threshold 0.5).

    Requires `pip install 'lightning-kd[detection]'` for the metrics.

    Raises:
        ModuleNotFoundError: If faster-coco-eval is not installed.

    References:
        Lin et al.: Microsoft COCO: Common Objects in Context, ECCV 2014 (arXiv 1405.0312), for the metrics.
    """

    metric = "map"
    metric_title = "mean AP"
    has_classes = False  # the predictions have classes, but dimension 1 does not contain their logits
    graph_obstacle = "the number of boxes that detectors assign and select depends on the data"
    exports = False

    def prepare(self, batch: Batch) -> Batch:
        """Check that targets are boxes.

        Raises:
            ValueError: If the images are mixed or have several views, or the targets are not boxes, or are in half
                precision.
        """
        if batch.mixed is not None or batch.views > 1:
            raise ValueError(
                "Detection supports neither mixing nor several views; remove `mix` and `views` of the data module"
            )
        target = batch.target
        if not isinstance(target, (list, tuple)) or not all({"boxes", "labels"} <= set(own) for own in target):
            raise ValueError(
                "Detection requires a list of dicts with `boxes` and `labels` as targets, got "
                f"{type(target).__name__}; use a data module that returns boxes, or another task"
            )
        if rounded := {own["boxes"].dtype for own in target} & {torch.float16, torch.bfloat16}:
            name = str(rounded.pop()).removeprefix("torch.")
            raise ValueError(
                f"Detection requires boxes in float32, got {name}, which rounds the coordinates of large images; "
                "replace a precision such as bf16-true by a mixed one (--trainer.precision=bf16-mixed)"
            )
        return batch

    def logits(self, output: Any) -> Predictions:
        """Return the predictions of a detector.

        Raises:
            TypeError: If the network is not a detector.
        """
        if not isinstance(output, Predictions):
            raise TypeError(
                f"Detection requires a detector that returns Predictions, got {type(output).__name__}; use one of "
                "lkd.models, such as retinanet, or wrap a network of torchvision in RetinaNetDetector, FCOSDetector, "
                "SSDDetector or FasterRCNNDetector"
            )
        return output

    def num_outputs(self, logits: Predictions) -> int:
        """Return the number of classes, including the background."""
        return logits.num_classes

    def check(self, name: str, logits: Predictions) -> None:
        """Check that a detector distinguishes at least one class from the background.

        Raises:
            ValueError: If it does not.
        """
        if logits.num_classes < 2:
            raise ValueError(
                f"the {name} has {logits.num_classes} class, but class 0 is the background; set num_classes to one "
                "more than the number of classes of objects"
            )

    def blank_target(self, logits: Predictions) -> list[dict[str, Tensor]]:
        """Return one box for each image."""
        device = next(logits.detector.parameters()).device
        boxes = (torch.tensor([[0.0, 0.0, width, height]], device=device) for height, width in logits.areas)
        return [{"boxes": box, "labels": torch.ones(1, dtype=torch.int64, device=device)} for box in boxes]

    def loss(
        self, logits: Predictions, target: Targets, label_smoothing: float = 0.0, mixed: Mixed | None = None
    ) -> Tensor:
        """Compute the sum of the terms of the detector's loss.

        Raises:
            ValueError: If `label_smoothing` is not 0.
        """
        if label_smoothing:
            raise ValueError("the losses of detectors have no label smoothing; set label_smoothing to 0")
        return reduce(torch.add, logits.losses(target).values())

    def labelled(self, target: Targets) -> Tensor:
        """Return the number of images."""
        return torch.tensor(len(target), device=target[0]["boxes"].device)

    def metrics(self) -> dict[str, Metric]:
        """Create the mean average precision over all IoU thresholds, and at the threshold 0.5."""
        from lkd.tasks.average_precision import MeanAP  # imports torchmetrics.detection, which takes 3 s

        return {"map": MeanAP(), "map_50": MeanAP(iou_threshold=0.5)}

    def update(self, metrics: Mapping[str, Metric], logits: Predictions, target: Targets) -> None:
        """Update the metrics with the detections."""
        detections = logits.detections()
        for metric in metrics.values():
            metric.update(detections, target)
