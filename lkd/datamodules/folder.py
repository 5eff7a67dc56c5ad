"""Datasets that are folders of image files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lkd.datamodules.base import ImageDataModule, Split
from lkd.datamodules.decoding import report
from lkd.datamodules.files import ImageFiles, class_folders, is_flat, read_tree, split_folder
from lkd.datamodules.split import stratified
from lkd.datamodules.transforms.base import (
    BatchTransform,
    CenterCrop,
    ImageTransform,
    RandomHorizontalFlip,
    RandomResizedCrop,
)
from lkd.io.refused import shown

IMAGENET_STATISTICS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    1: ((0.449,), (0.226,)),  # averages over the color channels
}
"""Mean and standard deviation of each channel of ImageNet, by the number of channels."""


class ImageFolderDataModule(ImageDataModule):
    """Image folders `root/train/<class>/` and `root/test/<class>/`; classes are the sorted folder names.

    If `root/val/<class>/` exists as well, it is used for validation. Without `root/test`, it is the test set, and
    validation images are held out from the training images.

    Images may also be in `root/<class>/`. They are then split at random, stratified by class: `test_size` of them form
    the test set and `val_size` of the rest the validation set. The split depends on the file names and on `split_seed`,
    and the sizes of its parts are printed.

    By default, `mean` and `std` are those of ImageNet, and images are augmented by `RandomResizedCrop` and
    `RandomHorizontalFlip`.

    Args:
        root: Folder of the dataset.
        image_size: Height and width to which images are resized.
        in_channels: 3 for color, 1 for grayscale.
        crop_ratio: Fraction of the shorter side that the center crop covers in evaluation; images that already have
            the size are not cropped.
        test_size: Fraction (below 1) or number of the images in `root/<class>/` that form the test set, stratified by
            class; 0 for none.
        kwargs: Arguments of `ImageDataModule`.

    Raises:
        ValueError: If `image_size` is less than 1.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        in_channels: Literal[1, 3] = 3,
        crop_ratio: float = 0.875,
        *,
        test_size: int | float = 0.2,
        **kwargs: Any,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        self.mean, self.std = IMAGENET_STATISTICS[in_channels]
        self.input_shape = (in_channels, image_size, image_size)
        super().__init__(**kwargs)
        self.root, self.test_size = root, test_size
        self._is_reported = False
        self.resize = CenterCrop(crop_ratio)

    def default_augment(self) -> list[ImageTransform | BatchTransform]:
        """Return random resized crops and horizontal flips."""
        return [RandomResizedCrop(), RandomHorizontalFlip()]

    def setup(self, stage: str) -> None:
        """Find the classes, and open the splits that a stage needs."""
        root = Path(self.root)
        if not root.is_dir():
            raise FileNotFoundError(f"folder {shown(root)} not found; set root to the folder of the images")
        self.class_names = class_folders(root if is_flat(root) else root / "train")
        self.num_classes = len(self.class_names)
        super().setup(stage)

    def make_dataset(self, split: Split) -> ImageFiles | None:
        """Open the images of a split; see `ImageDataModule.make_dataset`."""
        if is_flat(root := Path(self.root)):
            return None if split == "val" else self._split(read_tree(root, self.class_names), split)
        folder = split_folder(root, split)
        return None if folder is None else read_tree(folder, self.class_names)

    def _split(self, files: ImageFiles, split: Split) -> ImageFiles:
        """Return the training or test images of a folder without splits."""
        if not self.test_size and split == "test":
            raise ValueError(f"{shown(files.folder)} has no test images because test_size is 0; increase it")
        target, test = torch.from_numpy(files.targets), torch.zeros(len(files), dtype=torch.bool)
        if self.test_size:
            test[stratified(target, self.test_size, self.split_seed, "test_size", ("test", "training"))] = True
        if not self._is_reported:
            self._report_split(files, target[~test], int(test.sum()))
        return files.part(test if split == "test" else ~test)

    def _report_split(self, files: ImageFiles, training: Tensor, test: int) -> None:
        self._is_reported = True
        val = len(stratified(training, self.val_size, self.split_seed)) if self.val_size else 0
        report(
            f"{files.folder}: {len(files):,} images in {self.num_classes} classes, stratified split with split_seed "
            f"{self.split_seed}: {len(training) - val:,} training, {val:,} validation, {test:,} test"
        )


class ImageNetDataModule(ImageFolderDataModule):
    """ImageNet (ILSVRC 2012), unpacked to `root/train/<class>/` and `root/val/<class>/`; the latter is the test set.

    `test_size` is not used, because ImageNet has a test set.

    References:
        Russakovsky et al.: ImageNet large scale visual recognition challenge (2014), arXiv:1409.0575.
    """

    num_classes = 1000

    def setup(self, stage: str) -> None:
        """Check the number of class folders, and open the splits that a stage needs."""
        found = len(class_folders(Path(self.root) / "train"))
        if found != 1000:
            raise ValueError(
                f"{self.root}/train has {found} class folders, but ImageNet has 1000; use ImageFolderDataModule for "
                "other classes"
            )
        super().setup(stage)
