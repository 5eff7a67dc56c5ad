"""Formats in which the predictions of each task are written: classes, masks, boxes, or arrays."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from lkd.datamodules import DetectionDataModule, PredictedImages
from lkd.datamodules.predicted import Frame, numbered
from lkd.losses._dense import interpolated
from lkd.tasks import Classification, Detection, SemanticSegmentation
from lkd.tasks.visualization import class_color, class_name
from lkd.types import Batch, Predictions

_AT_ONCE = 16
"""Number of classes whose logits are enlarged to the size of an image file at the same time."""
Record = dict[str, Any]
"""Values of one line of the CSV file, or of one box, by name."""


class PredictionFormat(ABC):
    """Base class of the formats in which the predictions of a task are written.

    Args:
        module: The module that predicts.
        data: Its data module, if any.
    """

    file_name: ClassVar[str] = "predictions.csv"
    """Name of the file that contains the records."""
    subfolder: ClassVar[str] = ""
    """Folder of the files named in the records; empty if there are none."""

    def __init__(self, module: Any, data: object) -> None:
        self.task, self.data = getattr(module, "task", None), data
        self.class_names: tuple[str, ...] = tuple(getattr(module, "class_names", ()))
        self.images = PredictedImages(data)

    @abstractmethod
    def records(
        self, prediction: Any, positions: Sequence[int], batch: Batch, folder: Path
    ) -> Iterator[tuple[int, Record]]:
        """Yield the records of a batch, each with the position of its image, and write the files named in the records.

        Args:
            prediction: Predictions of the task, as returned by `Task.logits`.
            positions: Position of each image in its dataset.
            batch: The batch.
            folder: Folder of the predictions.
        """

    def write(self, folder: Path, records: Sequence[tuple[int, Record]], left_out: Sequence[int]) -> Path:
        """Write the records to a CSV file, one line per image in the order of the dataset, and return its path.

        Args:
            folder: Folder of the predictions.
            records: Records with the positions of their images.
            left_out: Positions of images that cannot be read; their lines contain only the file name.
        """
        path, files = folder / self.file_name, self.images.files
        key = "index" if files is None else "file"
        columns = list(dict.fromkeys(name for _, record in records for name in record))
        lines = sorted([*records, *((position, {}) for position in left_out)], key=lambda line: line[0])
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, (key, *columns), restval="")
            writer.writeheader()
            for position, record in lines:
                writer.writerow({key: position if files is None else files.name(position), **record})
        return path


class ClassTable(PredictionFormat):
    """The most probable class of each image: its index, its name if known, and its probability."""

    def records(
        self, prediction: Tensor, positions: Sequence[int], batch: Batch, folder: Path
    ) -> Iterator[tuple[int, Record]]:
        """Yield the class of each image."""
        probabilities, classes = prediction.float().softmax(1).max(1)
        for position, chosen, value in zip(positions, classes.tolist(), probabilities.tolist(), strict=True):
            name = self.class_names[chosen] if chosen < len(self.class_names) else ""  # more outputs than classes
            yield position, {"class": chosen, "class_name": name, "probability": round(value, 6)}


class MaskFiles(PredictionFormat):
    """A mask for each image, with the size of the image file: a PNG file with class indices and a color palette.

    The records contain the name of the mask, the mean probability of the predicted classes, and the proportion of the
    pixels of each class. The label `ignore_index` is not predicted.
    """

    subfolder = "masks"
    task: SemanticSegmentation

    def __init__(self, module: Any, data: object) -> None:
        super().__init__(module, data)
        if self.task.num_classes > 256:
            raise ValueError(
                f"lkd predict writes masks with 8 bits per pixel, but the task has {self.task.num_classes} classes; "
                "call trainer.predict for the logits"
            )
        self._names = self.images.output_names()
        self._palette = [channel for number in range(256) for channel in class_color(number)]

    def records(
        self, prediction: Tensor, positions: Sequence[int], batch: Batch, folder: Path
    ) -> Iterator[tuple[int, Record]]:
        """Write the mask of each image, and yield its name and proportions."""
        size = batch.input.shape[2], batch.input.shape[3]
        for position, logits in zip(positions, prediction, strict=True):
            name = f"{self.subfolder}/{numbered(position) if self._names is None else self._names[position]}.png"
            mask, probability = self._mask(logits.float(), size, self.images.frame(position, size))
            self._save(mask, folder / name)
            counts = mask.flatten().bincount(minlength=len(logits)).tolist()
            record: Record = {"mask": name, "probability": round(probability, 6)}
            for number, count in enumerate(counts):
                record[self._column(number)] = round(count / mask.numel(), 6)
            yield position, record

    def _column(self, number: int) -> str:
        name = class_name(self.class_names, number)
        return f"proportion/{name}" if self.class_names.count(name) < 2 else f"proportion/{name} ({number})"

    def _mask(self, logits: Tensor, size: tuple[int, int], frame: Frame) -> tuple[Tensor, float]:
        """Return the class of each pixel of the image file `(H, W)`, on the CPU, and their mean probability."""
        rows, columns = frame.part
        best = torch.full(frame.full, float("-inf"), device=logits.device)  # highest logit so far
        total, classes = best.clone(), torch.zeros(frame.full, dtype=torch.int64, device=logits.device)
        for first in range(0, len(logits), _AT_ONCE):
            shown = interpolated(logits[None, first : first + _AT_ONCE], size)[:, :, :rows, :columns]  # without padding
            shown = interpolated(shown, frame.full)[0]
            ignored = torch.arange(first, first + len(shown), device=shown.device) == self.task.ignore_index
            shown = shown.masked_fill(ignored.view(-1, 1, 1), float("-inf"))
            highest, found = shown.max(0)
            classes = torch.where(highest > best, found + first, classes)
            best, total = torch.maximum(best, highest), torch.logaddexp(total, shown.logsumexp(0))
        return classes.cpu(), float((best - total).exp().mean())

    def _save(self, mask: Tensor, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = mask.shape
        image = Image.frombytes("P", (width, height), mask.to(torch.uint8).numpy().tobytes())
        image.putpalette(self._palette)
        image.save(path)


class CocoResults(PredictionFormat):
    """The boxes of all images in COCO's results format, with the names of image and class if they are known.

    For images of an annotation file, `image_id` and `category_id` are its ids; otherwise, they are the position of the
    image and the class index.

    References:
        https://cocodataset.org/#format-results
    """

    file_name = "detections.json"

    def records(
        self, prediction: Predictions, positions: Sequence[int], batch: Batch, folder: Path
    ) -> Iterator[tuple[int, Record]]:
        """Yield the boxes of each image, starting with the highest score."""
        for position, found in zip(positions, prediction.detections(), strict=True):
            boxes = box_convert(found["boxes"].float(), "xyxy", "xywh").tolist()
            for box, score, label in zip(boxes, found["scores"].tolist(), found["labels"].tolist(), strict=True):
                yield position, self._record(position, [round(value, 3) for value in box], round(score, 6), label)

    def _record(self, position: int, box: list[float], score: float, label: int) -> Record:
        ids = (position, label)
        if isinstance(self.data, DetectionDataModule):
            ids = self.data.image_id(position), self.data.category_id(label)
        record: Record = {"image_id": ids[0], "category_id": ids[1], "bbox": box, "score": score}
        if self.images.files is not None:
            record["file_name"] = self.images.files.name(position)
        if label < len(self.class_names):
            record["category_name"] = self.class_names[label]
        return record

    def write(self, folder: Path, records: Sequence[tuple[int, Record]], left_out: Sequence[int]) -> Path:
        """Write the boxes of all images, in the order of the dataset, and return the path of the file."""
        path = folder / self.file_name
        lines = [json.dumps(record) for _, record in sorted(records, key=lambda line: line[0])]
        path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        return path


class ArrayFiles(PredictionFormat):
    """A NumPy file for each image with the predictions of any other task, as `Task.logits` returns them.

    A tensor `(B, ...)` is written to `.npy` files, and a named tuple of such tensors to `.npz` files. The records
    contain the name of the file.
    """

    subfolder = "arrays"

    def __init__(self, module: Any, data: object) -> None:
        super().__init__(module, data)
        self._names = self.images.output_names()

    def records(
        self, prediction: Any, positions: Sequence[int], batch: Batch, folder: Path
    ) -> Iterator[tuple[int, Record]]:
        """Write the arrays of each image, and yield the name of the file."""
        fields = prediction._asdict() if hasattr(prediction, "_asdict") else {"": prediction}
        if not all(isinstance(field, Tensor) and field.shape[:1] == (len(positions),) for field in fields.values()):
            raise ValueError(
                "lkd predict writes tensors (B, ...) and named tuples of them, but the task "
                f"{type(self.task).__name__} returns a {type(prediction).__name__} with other contents; call "
                "trainer.predict to process it"
            )
        arrays = {name: _array(field) for name, field in fields.items()}
        for row, position in enumerate(positions):
            stem = numbered(position) if self._names is None else self._names[position]
            name = f"{self.subfolder}/{stem}.{'npy' if '' in arrays else 'npz'}"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if "" in arrays:
                np.save(path, arrays[""][row], allow_pickle=False)
            else:
                np.savez(path, **{field: array[row] for field, array in arrays.items()})
            yield position, {"array": name}


def _array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array; NumPy has no bfloat16."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


_FORMATS: tuple[tuple[type, type[PredictionFormat]], ...] = (
    (Classification, ClassTable),
    (SemanticSegmentation, MaskFiles),
    (Detection, CocoResults),
)


def format_of(module: Any) -> type[PredictionFormat]:
    """Return the format of the predictions of a module.

    Args:
        module: A module; one without a task is assumed to be a classifier.
    """
    task = getattr(module, "task", None)
    if task is None:
        return ClassTable
    return next((found for kind, found in _FORMATS if isinstance(task, kind)), ArrayFiles)
