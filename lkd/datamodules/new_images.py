"""Images without labels, for prediction with a trained network."""

from __future__ import annotations

import os
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lkd.datamodules.base import ImageDataModule, Split
from lkd.datamodules.boxes import BoxSource, FileImages
from lkd.datamodules.dataset import ImageDataset
from lkd.datamodules.detection import DetectionDataModule
from lkd.datamodules.files import ImageFiles, read_all
from lkd.datamodules.folder import ImageFolderDataModule
from lkd.datamodules.segmentation import SegmentationDataModule
from lkd.datamodules.segmentation_folder import MaskedFilesDataModule
from lkd.datamodules.transforms.scaling import PadToSize
from lkd.datamodules.unreadable import readable
from lkd.datamodules.webdataset import WebDatasetDataModule
from lkd.io.refused import shown
from lkd.types import Normalization

_ANY_SIZE = (ImageFolderDataModule, MaskedFilesDataModule, WebDatasetDataModule)
"""Data modules whose training images may have different sizes."""


class NewImages(ImageDataModule):
    """All images of a folder, at any depth, preprocessed as in another data module, for prediction.

    For segmentation, images keep their size as in evaluation: they are padded to the largest height and width of all
    images. If `eval_size` is set, they are padded to this size instead, and larger images are scaled down. Files that
    cannot be read are reported and skipped.

    Args:
        folder: Folder of the images.
        like: Data module with which the network was trained; its files are not required.

    Raises:
        TypeError: If it is not one of lkd's data modules, as its preprocessing is then unknown.
    """

    def __init__(self, folder: str, like: L.LightningDataModule) -> None:
        if not isinstance(like, ImageDataModule | WebDatasetDataModule):
            raise TypeError(
                f"the preprocessing of {type(like).__name__} is unknown because it is not one of lkd's data modules; "
                "for prediction, use your own data module with a predict_dataloader that reads the new images"
            )
        self.folder, self.like = Path(folder).expanduser(), like
        self.num_classes = getattr(like, "num_classes", 0)  # unknown for a folder until it is opened
        self.class_names = like.class_names
        self.keeps_size = isinstance(like, SegmentationDataModule)
        self.resize = PadToSize() if self.keeps_size else like.resize
        if not self.keeps_size:
            self.input_shape = like.input_shape
        super().__init__(
            batch_size=like.batch_size,
            num_workers=like.num_workers,
            mean=like.mean,
            std=like.std,
            resident_limit=0,  # each image is read only once
            unreadable="skip",
        )

    def setup(self, stage: str) -> None:
        """Determine the size of the input, and open the images."""
        files = read_all(self.folder)
        if self.keeps_size:
            size = getattr(self.like, "eval_size", None) or files.largest()
            self.input_shape = (len(self.mean), *size)
        if not isinstance(self.like, _ANY_SIZE):
            self._warn_of_other_sizes(files, self.like.input_shape[1:])
        super().setup(stage)

    def _warn_of_other_sizes(self, files: ImageFiles, trained: tuple[int, int]) -> None:
        others = {position: size for position, size in files.sizes().items() if size != trained}
        if others:
            first, (height, width) = next(iter(others.items()))
            treatment = "predicted at their own size" if self.keeps_size else "scaled to this size and cropped"
            rank_zero_warn(
                f"the network was trained on images of {trained[1]}x{trained[0]} pixels; images of another size in "
                f"{shown(self.folder)}: {len(others):,} of {len(files):,}, for example {shown(files.name(first))} "
                f"({width}x{height}); they are {treatment}, which may reduce the accuracy"
            )

    def make_dataset(self, split: Split) -> ImageFiles | None:
        """Open the images; see `ImageDataModule.make_dataset`."""
        return read_all(self.folder) if split == "test" else None

    def left_out(self) -> list[int]:
        """Return the positions of the images that cannot be read. Requires `setup`."""
        dataset = self.datasets["test"]
        return _others(dataset.index, len(dataset.target))


class NewDetectionImages(DetectionDataModule):
    """All images of a folder, at any depth, for detection.

    Files that cannot be read are reported and skipped.

    Args:
        folder: Folder of the images.
        like: Data module with which the detector was trained; its files are not required.
    """

    def __init__(self, folder: str, like: DetectionDataModule) -> None:
        self.folder = Path(folder).expanduser()
        self.num_classes = getattr(like, "num_classes", 0)  # unknown for annotation files until they are opened
        self.class_names, self.input_shape = like.class_names, like.input_shape
        super().__init__(like.batch_size, like.num_workers)

    def make_boxes(self, split: Split) -> BoxSource:
        """Open the images, which have no boxes."""
        files = read_all(self.folder)
        counts = torch.zeros(len(files), dtype=torch.int64)
        return BoxSource(FileImages(files), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), counts)

    def setup(self, stage: str) -> None:
        """Open the images that can be read."""
        super().setup(stage)
        files, index = read_all(self.folder), self.datasets["test"].index
        target, blank = torch.from_numpy(files.targets), Normalization((0.0,) * 3, (1.0,) * 3)
        images = ImageDataset(files, target, index, self.input_shape, blank, PadToSize())
        workers = (os.cpu_count() or 1) if self.num_workers is None else self.num_workers
        self.datasets["test"].index = readable(images, workers).nonzero().squeeze(1)

    def left_out(self) -> list[int]:
        """Return the positions of the images that cannot be read. Requires `setup`."""
        dataset = self.datasets["test"]
        return _others(dataset.index, len(dataset.source.images))


def _others(index: Tensor, number: int) -> list[int]:
    """Return the positions below `number` that are not in `index`."""
    return sorted(set(range(number)) - set(index.tolist()))


def new_images(folder: str, like: L.LightningDataModule) -> L.LightningDataModule:
    """Return a data module that provides all images of a folder for prediction.

    Args:
        folder: Folder of the images.
        like: Data module with which the network was trained.

    Raises:
        TypeError: If `like` is not one of lkd's data modules.
    """
    return NewDetectionImages(folder, like) if isinstance(like, DetectionDataModule) else NewImages(folder, like)
