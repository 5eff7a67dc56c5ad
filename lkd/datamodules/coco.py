"""Images with boxes in COCO's format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lkd.datamodules.base import Split
from lkd.datamodules.boxes import BoxSource, FileImages
from lkd.datamodules.dataset import ImageError
from lkd.datamodules.detection import DetectionDataModule
from lkd.datamodules.files import ImageFiles
from lkd.io.refused import said, shown

T = TypeVar("T")

InvalidBoxes = Literal["fail", "skip"]


class CocoDetectionDataModule(DetectionDataModule):
    """Folders of images with annotation files in COCO's format.

    Class 0 is the background; the categories are numbered from 1 in the order of their ids. Crowd regions (`iscrowd`)
    are excluded, also from the metrics. In contrast, COCO's evaluation ignores detections in them. Boxes are clipped to
    their image.

    Args:
        images: Folder of the training images.
        annotations: Annotation file of the training images, such as `annotations/instances_train2017.json`.
        val_images: Folder of the validation images; by default, they are split from the training images.
        val_annotations: Annotation file of the validation images.
        test_images: Folder of the test images, for `lkd test`.
        test_annotations: Annotation file of the test images.
        keep_ids: Whether to use the category ids of the file as classes instead of numbering the categories without
            gaps. Required for torchvision's weights that were trained on COCO (91 classes).
        invalid_boxes: Treatment of boxes that have no area or lie outside of their image: `fail` raises an error,
            `skip` excludes them. COCO contains such boxes.
        kwargs: Arguments of `DetectionDataModule`.

    Raises:
        ValueError: If only one of a folder and its annotation file is given, or, in `setup`, a file is invalid.
        FileNotFoundError: If a folder or file is missing, in `setup`.
    """

    input_shape = (3, 320, 320)

    def __init__(
        self,
        images: str,
        annotations: str,
        val_images: str | None = None,
        val_annotations: str | None = None,
        test_images: str | None = None,
        test_annotations: str | None = None,
        keep_ids: bool = False,
        invalid_boxes: InvalidBoxes = "fail",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.paths = {
            "train": (images, annotations),
            "val": (val_images, val_annotations),
            "test": (test_images, test_annotations),
        }
        for split, pair in self.paths.items():
            if (pair[0] is None) != (pair[1] is None):
                raise ValueError(f"{split}_images and {split}_annotations belong together; set both or none")
        self.keep_ids, self.invalid_boxes = keep_ids, invalid_boxes

    def setup(self, stage: str) -> None:
        """Read the categories and the annotation files that a stage needs."""
        self._training = CocoFile(str(self.paths["train"][1]))
        self._set_classes(self._training)
        super().setup(stage)
        del self._training  # large

    def _set_classes(self, file: CocoFile) -> None:
        self._categories = file.categories
        ids = sorted(file.categories)
        labels = ids if self.keep_ids else range(1, len(ids) + 1)
        self._labels = dict(zip(ids, labels, strict=True))
        self.num_classes = max(self._labels.values()) + 1
        names = {label: file.categories[id] for id, label in self._labels.items()}
        self.class_names = ("background", *(names.get(label, "") for label in range(1, self.num_classes)))

    def category_id(self, label: int) -> int:
        """Return the id of a class in the annotation file. Requires `setup`."""
        return next((id for id, own in self._labels.items() if own == label), label)

    def image_id(self, position: int) -> int:
        """Return the id of a test image in the annotation file. Requires `setup`."""
        images = self.datasets["test"].source.images
        return images.ids[position] if isinstance(images, CocoImages) else position

    def make_boxes(self, split: Split) -> BoxSource | None:
        """Open the images and boxes of a split."""
        folder, path = self.paths[split]
        if split == "test" and (folder is None or path is None):
            raise ValueError(
                "CocoDetectionDataModule has no test images; set test_images and test_annotations, or evaluate the "
                "validation images with `lkd validate`"
            )
        if folder is None or path is None:
            return None
        file = self._training if split == "train" else CocoFile(path)
        for id, name in file.categories.items():
            if self._categories.get(id, name) != name:
                raise ValueError(
                    f"the category {id} is {name!r} in {file.name}, but {self._categories[id]!r} in the annotation "
                    "file of the training images; use the same ids in both"
                )
        return file.boxes(Path(folder), self._labels, self.invalid_boxes)


class CocoFile:
    """Annotation file in COCO's format.

    Args:
        path: Path of the file.

    Attributes:
        images: Entries of the images, by id.
        categories: Names of the categories, by id.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is not a valid annotation file.
    """

    def __init__(self, path: str) -> None:
        self.name = shown(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"annotation file {self.name} not found; set the path of a file in COCO's format")
        try:
            content = json.loads(Path(path).read_bytes())
            self.images = dict(_unique([(int(image["id"]), _image(image)) for image in content["images"]]))
            self.categories = dict(_unique([(int(one["id"]), str(one["name"])) for one in content["categories"]]))
            self._annotations = [_annotation(entry) for entry in content["annotations"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.name} is not in COCO's format ({type(error).__name__}: {said(error)}); it must have images "
                "(id, file_name, width, height), annotations (id, image_id, category_id, bbox), categories (id, name)"
            ) from error
        if not self.images or not self.categories or min(self.categories) < 1:
            raise ValueError(
                f"{self.name} must contain images and categories with ids of at least 1, got {len(self.images)} images "
                f"and the ids {sorted(self.categories)[:5]}; 0 is the background"
            )

    def boxes(self, folder: Path, labels: Mapping[int, int], invalid: InvalidBoxes) -> BoxSource:
        """Return the images with their boxes.

        Args:
            folder: Folder of the images.
            labels: Class of each category id.
            invalid: Treatment of boxes that have no area or lie outside of their image.

        Raises:
            FileNotFoundError: If the folder or an image is missing.
            ValueError: If an annotation is invalid.
        """
        found: dict[int, list[tuple[list[float], int]]] = {id: [] for id in self.images}
        for id, image_id, category, box, crowd in self._annotations:
            if image_id not in found or category not in labels:
                kind, value = ("image", image_id) if image_id not in found else ("category", category)
                raise ValueError(f"annotation {id} of {self.name} refers to the unknown {kind} {value}; correct it")
            clipped = _clipped(box, *self.images[image_id][1:])
            if clipped is None and not crowd and invalid == "fail":
                raise ValueError(
                    f"annotation {id} of {self.name} has the box {box} (x, y, width, height), which has no area in the "
                    f"image {shown(self.images[image_id][0])}; correct it, or set invalid_boxes to skip"
                )
            if clipped is not None and not crowd:
                found[image_id].append((clipped, labels[category]))
        images = CocoImages(folder, self.images)
        flat = [entry for entries in found.values() for entry in entries]
        boxes = torch.tensor([box for box, _ in flat], dtype=torch.float32).view(-1, 4)
        counts = torch.tensor([len(entries) for entries in found.values()])
        return BoxSource(images, boxes, torch.tensor([label for _, label in flat], dtype=torch.int64), counts)


class CocoImages(FileImages):
    """Image files that are listed in an annotation file.

    Args:
        folder: Folder of the images.
        images: File name, width and height of each image, by image id.

    Attributes:
        ids: Ids of the images in the annotation file.

    Raises:
        FileNotFoundError: If the folder or an image is missing.
    """

    def __init__(self, folder: Path, images: Mapping[int, tuple[str, int, int]]) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"folder {shown(folder)} not found; set the folder of the images")
        missing = [name for name, _, _ in images.values() if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(images)} images are missing in {shown(folder)}, for example "
                f"{shown(missing[0])}; set the folder of the images in the annotation file"
            )
        super().__init__(ImageFiles(folder, [name for name, _, _ in images.values()], [0] * len(images)))
        self.sizes = torch.tensor([size for _, *size in images.values()])
        self.ids = list(images)

    def __getitem__(self, index: int) -> Tensor:
        """Decode an image `(3, H, W)`, uint8.

        Raises:
            ImageError: If it cannot be read, or its size is not that in the annotation file.
        """
        pixels, expected = super().__getitem__(index), tuple(self.sizes[index].tolist())
        if (pixels.shape[2], pixels.shape[1]) != expected:
            raise ImageError(
                f"image {shown(self.files.path(index))} has {pixels.shape[2]}x{pixels.shape[1]} pixels, but its "
                f"annotation file states {expected[0]}x{expected[1]}; its boxes would be wrong, so use the original "
                "image"
            )
        return pixels


def _image(entry: Mapping[str, Any]) -> tuple[str, int, int]:
    name = str(entry["file_name"])
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"the file name {shown(name)} is outside the folder")
    return name, int(entry["width"]), int(entry["height"])


def _annotation(entry: Mapping[str, Any]) -> tuple[int, int, int, list[float], bool]:
    box = [float(number) for number in entry["bbox"]]
    if len(box) != 4:
        raise ValueError(f"bbox must be x, y, width and height, got {box}")
    return int(entry["id"]), int(entry["image_id"]), int(entry["category_id"]), box, bool(entry.get("iscrowd", 0))


def _clipped(box: Sequence[float], width: int, height: int) -> list[float] | None:
    """Return the part x1, y1, x2, y2 of a box x, y, width, height in its image; `None` if it has no area."""
    x, y = box[0], box[1]
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + box[2], width), min(y + box[3], height)
    return [left, top, right, bottom] if left < right and top < bottom else None


def _unique(entries: list[tuple[int, T]]) -> list[tuple[int, T]]:
    """Return entries, after a check that their ids differ."""
    repeated = [id for id, number in Counter(id for id, _ in entries).items() if number > 1]
    if repeated:
        raise ValueError(f"the id {repeated[0]} occurs more than once")
    return entries
