"""Data modules of images and masks in files."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

from lkd.datamodules.base import Split
from lkd.datamodules.files import split_folder, split_name
from lkd.datamodules.folder import IMAGENET_STATISTICS
from lkd.datamodules.mask_files import IGNORED, MaskedFiles, listed, paired
from lkd.datamodules.segmentation import SegmentationDataModule
from lkd.datamodules.transforms.base import BatchTransform, ImageTransform, RandomHorizontalFlip
from lkd.datamodules.transforms.scaling import PadToSize, RandomScaledCrop
from lkd.io.refused import shown


class MaskedFilesDataModule(SegmentationDataModule):
    """Base class of data modules that read images and masks from files. Subclasses override `find`.

    A mask is an image with one channel whose pixels are class numbers; palettes are ignored. Training images are scaled
    at random and cropped to `image_size` by default; evaluation uses whole images. If the images differ in size,
    smaller ones are padded on the right and at the bottom, and the padding is ignored.

    Args:
        image_size: Height and width of the training crops, or one number for both; by default the largest height and
            width of all images.
        eval_size: Height and width of images in evaluation, or one number for both; larger images are scaled down to
            fit. By default the largest height and width of all images, so that images are evaluated at their full size.
        label_map: Class of each label in the mask files; labels that are mapped to 255 are ignored. Labels that are not
            mapped are class indices.
        kwargs: Arguments of `SegmentationDataModule`.

    Raises:
        ValueError: If a size is less than 1 pixel, or `label_map` contains a label or a class that is out of range.
    """

    resize = PadToSize()

    def __init__(
        self,
        image_size: int | tuple[int, int] | None = None,
        eval_size: int | tuple[int, int] | None = None,
        label_map: dict[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_size, self.eval_size = _pair("image_size", image_size), _pair("eval_size", eval_size)
        if wrong := [label for label in (label_map or {}) if not 0 <= label <= IGNORED]:
            raise ValueError(f"label_map: labels must be between 0 and {IGNORED}, got {wrong[0]}")
        self.mean, self.std = IMAGENET_STATISTICS[3]
        super().__init__(**kwargs)
        self.label_map = label_map
        if wrong := [c for c in (label_map or {}).values() if not (0 <= c < self.num_classes or c == IGNORED)]:
            raise ValueError(
                f"label_map maps a label to {wrong[0]}, but there are {self.num_classes} classes, 0 to "
                f"{self.num_classes - 1}; use {IGNORED} for labels that are ignored"
            )
        if self.image_size is not None:
            self.input_shape = (3, *self.image_size)
        self._whole_size = self.eval_size

    @abstractmethod
    def find(self, split: Split) -> tuple[Path, list[str], list[str]] | None:
        """Find the files of a split.

        Args:
            split: "train", "val" or "test".

        Returns:
            A folder, and the names of the images and of their masks in it. If `None` for "val", validation images are
            split from "train".
        """

    @property
    def whole_shape(self) -> tuple[int, int, int]:
        """Shape `(3, H, W)` of images in evaluation."""
        return (3, *self._whole_size) if self._whole_size is not None else self.input_shape

    def default_augment(self) -> list[ImageTransform | BatchTransform]:
        """Return random scaling with cropping, and random horizontal flips."""
        return [RandomScaledCrop(), RandomHorizontalFlip()]

    def setup(self, stage: str) -> None:
        """Find the size of the images, and open the splits that a stage needs."""
        if self._whole_size is None:
            sizes = [(1, 1)]
            for split in ("train", "val", "test"):
                with suppress(FileNotFoundError):  # reported when the split is opened
                    sizes += [files.largest()] if (files := self.make_dataset(split)) is not None else []
            heights, widths = zip(*sizes, strict=True)
            self._whole_size = max(heights), max(widths)
        if self.image_size is None:
            self.input_shape = self.whole_shape
        super().setup(stage)

    def make_dataset(self, split: Split) -> MaskedFiles | None:
        """Find the images and masks of a split; see `ImageDataModule.make_dataset`."""
        found = self.find(split)
        return None if found is None else MaskedFiles(*found, self.num_classes, self.label_map)


def _pair(name: str, size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Return height and width, after checking them."""
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"{name} must be a height and a width of at least 1 pixel, got {[height, width]}")
    return height, width


class SegmentationFolderDataModule(MaskedFilesDataModule):
    """Images in `root/train/images/` and masks with the same names in `root/train/masks/`; likewise `val` and `test`.

    Instead of the folders, `root/train.txt` (`val.txt`, `test.txt`) may list the files of each split: one image and its
    mask per line, relative to `root`, separated by a tab or a space. If there is a `train.txt`, folders are not used as
    splits. Without `test`, `val` is the test set; without `val`, validation images are held
    out from the training images.

    Args:
        root: Folder of the dataset.
        num_classes: Number of classes.
        class_names: Names of the classes; by default their numbers.
        kwargs: Arguments of `MaskedFilesDataModule`.

    Raises:
        ValueError: If the number of names differs from the number of classes.
    """

    def __init__(self, root: str, num_classes: int, class_names: tuple[str, ...] = (), **kwargs: Any) -> None:
        if class_names and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names, but there are {num_classes} classes")
        self.num_classes, self.class_names = num_classes, class_names
        super().__init__(**kwargs)
        self.root = root

    def find(self, split: Split) -> tuple[Path, list[str], list[str]] | None:
        """Find the files of a split; see `MaskedFilesDataModule.find`."""
        root = Path(self.root).expanduser()
        if (root / "train.txt").is_file():
            name = split_name([name for name in ("val", "test") if (root / f"{name}.txt").is_file()], split)
            return None if name is None else (root, *listed(root / f"{name}.txt", root))
        folder = split_folder(root, split)
        if folder is None:
            return None
        if not (folder / "images").is_dir():
            raise FileNotFoundError(
                f"folder {shown(folder / 'images')} not found; expected images in it and masks in "
                f"{shown(folder / 'masks')}, or a list of both in {shown(root / f'{split}.txt')}"
            )
        return folder, *paired(folder, folder / "images", folder / "masks")
