"""Data sets that are folders of image files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lkd.datamodules.base import ImageDataModule, Split
from lkd.datamodules.decoding import say
from lkd.datamodules.extra import ExtraImages
from lkd.datamodules.files import ImageFiles, class_folders, is_flat, read_tree, split_folder
from lkd.datamodules.split import stratified
from lkd.datamodules.transforms.base import (
    BatchTransform,
    CenterCrop,
    ImageTransform,
    RandomHorizontalFlip,
    RandomResizedCrop,
)
from lkd.datamodules.transforms.mixing import Mix
from lkd.datamodules.transforms.views import Views
from lkd.io.refused import shown

IMAGENET_STATISTICS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    1: ((0.449,), (0.226,)),  # the means of the colours'
}
"""Mean and standard deviation of each channel of ImageNet's images, by the number of channels."""


class ImageFolderDataModule(ImageDataModule):
    """Any folder of images, `root/train/<class>/` and `root/test/<class>/`; the classes are the sorted names.

    If there is `root/val/<class>/` too, it is used for validation. Without `root/test`, it is the test set,
    and validation images are cut from the training images.

    Images may also be in `root/<class>/`. They are then split at random, by class: `test_size` of them are the test
    set, `val_size` of the rest the validation set. The split depends on the names of the files and on `split_seed`, and
    its numbers are printed.

    Args:
        root: The folder.
        image_size: Height and width that images are brought to.
        in_channels: 3 for colour, 1 for gray.
        crop_ratio: Share of an image's shorter side that is evaluated, at its centre; images that have the
            size already are taken whole.
        batch_size: Images in a batch, in each process.
        num_workers: Processes that read images; by default up to 4.
        val_size: Share (below 1) or number of training images held out for validation, by class; 0: none.
        label_size: Share (below 1) or number of training images that keep their label, by class; 1.0: all, 0: none.
        drop_unlabelled: Leave the others out of training; otherwise they stay, without a label, for the teacher.
        split_seed: Seed of these choices; not the run's, so that teacher and students agree.
        seed: Seed of order and augmentation; by default the run's.
        augment: Random changes of training images; by default RandomResizedCrop and RandomHorizontalFlip.
        mean: Mean of each channel, of pixels in [0, 1]; by default ImageNet's.
        std: Standard deviation of each channel; by default ImageNet's.
        views: Which views of each training image a batch has; by default the image alone.
        mix: How each training image is mixed with another one; by default not at all.
        resident_limit: Bytes that images may take for them to be decoded once, instead of in every epoch; 0: never.
        unreadable: Whether an image file that cannot be read ends the run, when it is met (`fail`), or is left out
            before the training (`skip`); the other images keep their index.
        labels_per_class: In place of `label_size`: how many training images of each class keep their label.
        extra: Training images from elsewhere, beside the data set's own; with `label_size` 0 and `drop_unlabelled`
            instead of them. See `UnlabelledFolder`, `DeepInversion`.
        test_size: Share (below 1) or number of the images of `root/<class>/` that are the test set, by class; 0: none.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        in_channels: Literal[1, 3] = 3,
        crop_ratio: float = 0.875,
        batch_size: int = 128,
        num_workers: int | None = None,
        val_size: int | float = 0.1,
        label_size: int | float = 1.0,
        drop_unlabelled: bool = False,
        split_seed: int = 0,
        seed: int | None = None,
        augment: list[ImageTransform | BatchTransform] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        views: Views | None = None,
        mix: Mix | None = None,
        resident_limit: int = 4 * 2**30,
        unreadable: Literal["fail", "skip"] = "fail",
        labels_per_class: int | None = None,
        extra: ExtraImages | None = None,
        test_size: int | float = 0.2,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be 1 or more, got {image_size}")
        self.mean, self.std = IMAGENET_STATISTICS[in_channels]
        self.input_shape = (in_channels, image_size, image_size)
        own = (batch_size, num_workers, val_size, label_size, drop_unlabelled, split_seed)
        rest = (views, mix, resident_limit, unreadable, labels_per_class, extra)
        super().__init__(*own, seed, augment, mean, std, *rest)
        self.root, self.test_size = root, test_size
        self._is_reported = False
        self.resize = CenterCrop(crop_ratio)

    def default_augment(self) -> list[ImageTransform | BatchTransform]:
        """Parts of the image, and their mirror images."""
        return [RandomResizedCrop(), RandomHorizontalFlip()]

    def setup(self, stage: str) -> None:
        """Finds the classes, and opens the splits that a stage needs."""
        root = Path(self.root)
        self.class_names = class_folders(root if is_flat(root) else root / "train")
        self.num_classes = len(self.class_names)
        super().setup(stage)

    def make_dataset(self, split: Split) -> ImageFiles | None:
        """See `ImageDataModule.make_dataset`."""
        if is_flat(root := Path(self.root)):
            return None if split == "val" else self._split(read_tree(root, self.class_names), split)
        folder = split_folder(root, split)
        return None if folder is None else read_tree(folder, self.class_names)

    def _split(self, files: ImageFiles, split: Split) -> ImageFiles:
        """The training or the test images of a folder that has no splits."""
        if not self.test_size and split == "test":
            raise ValueError(f"test_size is 0, so no image in {shown(files.folder)} is for the test; raise it")
        target, test = torch.from_numpy(files.targets), torch.zeros(len(files), dtype=torch.bool)
        if self.test_size:
            test[stratified(target, self.test_size, self.split_seed, "test_size", ("test", "training"))] = True
        if not self._is_reported:
            self._report_split(files, target[~test], int(test.sum()))
        return files.part(test if split == "test" else ~test)

    def _report_split(self, files: ImageFiles, training: Tensor, test: int) -> None:
        self._is_reported = True
        val = len(stratified(training, self.val_size, self.split_seed)) if self.val_size else 0
        say(
            f"{files.folder}: {len(files):,} images in {self.num_classes} class folders, split by class with "
            f"split_seed {self.split_seed}: {len(training) - val:,} for training, {val:,} for validation, {test:,} "
            "for test"
        )


class ImageNetDataModule(ImageFolderDataModule):
    """ImageNet (ILSVRC 2012), unpacked to `root/train/<class>/` and `root/val/<class>/`, the test set.

    Args:
        root: The folder.
        image_size: Height and width that images are brought to.
        in_channels: 3 for colour, 1 for gray.
        crop_ratio: Share of an image's shorter side that is evaluated, at its centre.
        batch_size: Images in a batch, in each process.
        num_workers: Processes that read images; by default up to 4.
        val_size: Share (below 1) or number of training images held out for validation, by class; 0: none.
        label_size: Share (below 1) or number of training images that keep their label, by class; 1.0: all, 0: none.
        drop_unlabelled: Leave the others out of training; otherwise they stay, without a label, for the teacher.
        split_seed: Seed of these choices; not the run's, so that teacher and students agree.
        seed: Seed of order and augmentation; by default the run's.
        augment: Random changes of training images; by default RandomResizedCrop and RandomHorizontalFlip.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel.
        views: Which views of each training image a batch has; by default the image alone.
        mix: How each training image is mixed with another one; by default not at all.
        resident_limit: Bytes that images may take for them to be decoded once, instead of in every epoch; 0: never.
        unreadable: Whether an image file that cannot be read ends the run, when it is met (`fail`), or is left out
            before the training (`skip`); the other images keep their index.
        labels_per_class: In place of `label_size`: how many training images of each class keep their label.
        extra: Training images from elsewhere, beside the data set's own; with `label_size` 0 and `drop_unlabelled`
            instead of them. See `UnlabelledFolder`, `DeepInversion`.
        test_size: Not used, as ImageNet has a test set.

    References:
        Russakovsky et al.: ImageNet large scale visual recognition challenge (2014), arXiv:1409.0575.
    """

    num_classes = 1000

    def setup(self, stage: str) -> None:
        """Finds the classes, and opens the splits that a stage needs."""
        found = len(class_folders(Path(self.root) / "train"))
        if found != 1000:
            raise ValueError(
                f"{self.root}/train has {found} class folders, ImageNet has 1000; "
                "for another choice of classes use ImageFolderDataModule"
            )
        super().setup(stage)
