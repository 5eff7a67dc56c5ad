"""Writing predictions to files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import distributed

from lkd.callbacks.prediction_formats import PredictionFormat, Record, format_of
from lkd.datamodules import NewDetectionImages, NewImages
from lkd.io.folders import new_folder


class PredictionWriter(BasePredictionWriter):
    """Write predictions to a new folder, `version_N`.

    Classification: `predictions.csv`, with one line per image: file name (or index, if the images are not files),
    class, class name if known, and probability.

    Segmentation: a mask for each image in `masks/`, with the size of the image file, and `predictions.csv` with the
    name of the mask, the mean probability of the predicted classes, and the proportion of each class. Masks are PNG
    files with a palette: their pixels are class indices, which viewers show in the colors of PASCAL VOC.

    Detection: `detections.json`, in COCO's results format.

    Other tasks: a NumPy file for each image in `arrays/`, with what `Task.logits` returns, and `predictions.csv` with
    its name.

    With several processes, each writes the masks or arrays of its own images, and the first one writes the records of
    all.

    Args:
        output: Parent of the new folder.

    Attributes:
        folder: Folder of the most recent predictions.
    """

    folder: Path

    def __init__(self, output: str = "runs/predict") -> None:
        super().__init__(write_interval="batch")
        self.output = Path(output)
        self._format: PredictionFormat | None = None
        self._records: list[tuple[int, Record]] = []
        self._images = 0

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Create the folder."""
        chosen = format_of(pl_module)(pl_module, getattr(trainer, "datamodule", None))
        created = str(new_folder(self.output)) if trainer.is_global_zero else ""
        self.folder, self._format = Path(trainer.strategy.broadcast(created)), chosen
        self._records, self._images = [], 0

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Collect the records of a batch."""
        if self._format is None:
            raise RuntimeError("on_predict_start must be called before write_on_batch_end")
        batch = pl_module.unpack(batch)
        size = batch.size
        if batch.index is not None:
            positions = batch.index.tolist()
        elif batch_indices:  # Lightning provides them for map-style datasets
            positions = list(batch_indices)
        else:  # number the images differently in each process
            positions = [trainer.global_rank + trainer.world_size * (self._images + row) for row in range(size)]
        with trainer.precision_plugin.forward_context():  # boxes of Faster R-CNN are computed by a network
            self._records += self._format.records(prediction, positions, batch, self.folder)
        self._images += size

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the records of all processes, and print the path of the file."""
        parts = _gathered(trainer, (self._images, self._records))
        if self._format is not None and trainer.is_global_zero:
            data = getattr(trainer, "datamodule", None)
            left_out = data.left_out() if isinstance(data, NewImages | NewDetectionImages) else []
            records = [record for _, own in parts for record in own]
            path = self._format.write(self.folder, records, left_out)
            number = sum(images for images, _ in parts)
            places = f"{path} and {self.folder / self._format.subfolder}" if self._format.subfolder else path
            pl_module.print(f"Predictions for {number:,} image{'s' * (number != 1)} written to {places}")
        self._format, self._records = None, []

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Remove the folder if nothing was written to it."""
        if self._format is not None and trainer.is_global_zero:
            with suppress(OSError):  # not empty
                self.folder.rmdir()


def _gathered(trainer: L.Trainer, part: Any) -> list[Any]:
    """Return the objects of all processes on the first process, and an empty list on the others."""
    if trainer.world_size == 1:
        return [part]
    parts: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    distributed.gather_object(part, parts)
    return parts or []
