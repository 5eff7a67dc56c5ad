"""Mean average precision as a single number."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

_BACKEND: Final = "faster_coco_eval"


class MeanAP(MeanAveragePrecision):
    """Mean average precision of detections, averaged over classes and IoU thresholds.

    torchmetrics' metric returns a dict of many values, which Lightning cannot log.

    Args:
        iou_threshold: A single IoU threshold; `None` for 0.5, 0.55, ..., 0.95.

    Raises:
        ModuleNotFoundError: If faster-coco-eval is not installed.
    """

    def __init__(self, iou_threshold: float | None = None) -> None:
        if find_spec(_BACKEND) is None:
            raise ModuleNotFoundError(
                "detection metrics require faster-coco-eval, which is not installed; run pip install "
                "'lightning-kd[detection]'"
            )
        super().__init__(iou_thresholds=None if iou_threshold is None else [iou_threshold], backend=_BACKEND)
        self.warn_on_many_detections = False  # COCO counts the best 100 detections of each image

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the mean average precision, in [0, 1]; 0 if there are no boxes."""
        found: Tensor = super().compute()["map"]
        return torch.clamp(found, min=0)
