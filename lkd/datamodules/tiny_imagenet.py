"""Tiny-ImageNet, which is not available in torchvision."""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets.utils import download_and_extract_archive

from lkd.datamodules.archives import ArchiveDataModule
from lkd.datamodules.base import Split
from lkd.datamodules.files import ImageFiles
from lkd.datamodules.sources import ImageSource
from lkd.datamodules.transforms.base import BatchTransform, ImageTransform, RandomCrop, RandomHorizontalFlip

_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


class TinyImageNetDataModule(ArchiveDataModule):
    """Tiny-ImageNet: 110,000 color images of 64x64 pixels in 200 classes.

    Its validation images are used as the test set, because the labels of its test images were never published.

    References:
        Le, Yang: Tiny ImageNet visual recognition challenge (2015).
    """

    title = "Tiny-ImageNet"
    archives = f"tiny-imagenet-200.zip ({_URL}) into {{root}}/ and unpack it there"
    num_classes = 200
    input_shape = (3, 64, 64)
    mean = (0.4802, 0.4481, 0.3975)
    std = (0.2302, 0.2265, 0.2262)

    def default_augment(self) -> list[ImageTransform | BatchTransform]:
        """Return shifts by up to eight pixels and horizontal flips."""
        return [RandomCrop(padding=8), RandomHorizontalFlip()]

    def tree(self) -> Path | None:
        """Return the unpacked archive, which is `root` or a folder in it."""
        folders = (Path(self.root), Path(self.root) / "tiny-imagenet-200")
        return next((folder for folder in folders if (folder / "train").is_dir()), None)

    def fetch(self) -> None:
        """Download and unpack the archive."""
        download_and_extract_archive(_URL, self.root, md5=_MD5)

    def read(self, train: bool, download: bool) -> ImageSource:
        """Raise an error: once unpacked, the archive is a folder of image files, which is read instead."""
        raise FileNotFoundError("folder tiny-imagenet-200 not found")

    def make_dataset(self, split: Split) -> ImageSource | None:
        """Open the images of a split; see `ImageDataModule.make_dataset`."""
        tree = self.tree()
        annotations = tree / "val" / "val_annotations.txt" if tree is not None else None
        if annotations is None or not annotations.is_file() or split == "train":
            return super().make_dataset(split)
        if split == "val":
            return None
        rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines()]
        return ImageFiles(
            annotations.parent / "images",
            [row[0] for row in rows],
            [self.class_names.index(row[1]) for row in rows],
        )
