"""Mean average precision as a single number."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Final

import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from lkd._compat import MetricHooks

_BACKEND: Final = "faster_coco_eval"
_STATES: Final[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
    "detection_box": (torch.float32, (4,)),
    "detection_scores": (torch.float32, ()),
    "detection_labels": (torch.int64, ()),
    "groundtruth_box": (torch.float32, (4,)),
    "groundtruth_labels": (torch.int64, ()),
    "groundtruth_crowds": (torch.int64, ()),
    "groundtruth_area": (torch.float32, ()),
}
"""Lists of one tensor `(N_i, ...)` per image: their type, and the size of further dimensions."""


class MeanAP(MetricHooks, MeanAveragePrecision):
    """Mean average precision of detections, averaged over classes and IoU thresholds.

    torchmetrics' metric returns a dict of many values, which Lightning cannot log, and requires the same number of
    images in all processes.

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

    def gather_states(self, gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Gather the boxes of all processes.

        torchmetrics gathers the tensors of each image separately, so processes with different numbers of images would
        wait for each other forever, or fail.

        Args:
            gather: Function that returns a tensor of each process.
        """
        for name, (dtype, size) in _STATES.items():
            own = getattr(self, name)
            counts = torch.tensor([len(part) for part in own], dtype=torch.int64, device=self.device)
            empty = torch.zeros(0, *size, dtype=dtype, device=self.device)
            joined = torch.cat([empty, *(part.to(dtype) for part in own)])
            parts = zip(gather(joined), gather(counts), strict=True)
            setattr(self, name, [part for values, number in parts for part in torch.split(values, number.tolist())])
