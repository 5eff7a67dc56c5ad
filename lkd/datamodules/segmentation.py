"""Base class of data modules with images and masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lkd.datamodules.base import ImageDataModule, Split
from lkd.datamodules.mask_files import IGNORED
from lkd.datamodules.masks import MaskDataset
from lkd.datamodules.sources import ImageSource
from lkd.datamodules.transforms.base import RandomHorizontalFlip, divide


class SegmentationDataModule(ImageDataModule):
    """Base class of data modules with images and masks.

    For images of one size in memory, subclasses set the attributes of `ImageDataModule` and override `make_masks`; for
    files, see `SegmentationFolderDataModule`. Pixels with the label 255 have no class; their target is `IGNORE_INDEX`.
    Random scaling, crops and flips are applied to image and mask alike; all other transforms change only the image.
    `label_size` selects whole images.

    Args:
        batch_size: Number of images per batch in each process.
        kwargs: Arguments of `ImageDataModule`, except `views`, `mix` and `extra`.

    Raises:
        ValueError: If `views`, `mix` or `extra` is set, if `augment` contains `RandAugment` or `TrivialAugment`, which
            do not apply to masks, or if images and masks do not match.
    """

    _dataset_class = MaskDataset

    def __init__(self, batch_size: int = 16, **kwargs: Any) -> None:
        if given := [name for name in ("views", "mix", "extra") if kwargs.get(name) is not None]:
            raise ValueError(f"{type(self).__name__} does not support {given[0]}: it would not apply to the masks")
        if given := [type(one).__name__ for one in kwargs.get("augment") or () if not getattr(one, "fits_masks", True)]:
            raise ValueError(
                f"{given[0]} rotates and shears images without their masks; remove it from augment, or use transforms "
                "of colors, such as ColorJitter"
            )
        super().__init__(batch_size=batch_size, **kwargs)

    def make_masks(self, split: Split) -> tuple[Tensor, Tensor] | None:
        """Return the images and masks of a split.

        Args:
            split: "train", "val" or "test".

        Returns:
            Images `(N, C, H, W)` and masks `(N, H, W)`, uint8. If `None` for "val", validation images are split from
            "train".
        """
        raise NotImplementedError(f"{type(self).__name__} must override make_masks or make_dataset")

    def default_augment(self) -> list[Any]:
        """Return random horizontal flips."""
        return [RandomHorizontalFlip()]

    def make_dataset(self, split: Split) -> ImageSource | None:
        """Join images and masks to one tensor; see `ImageDataModule.make_dataset`."""
        first, _ = divide(self.augment or ())
        if first is not None:
            raise ValueError(
                f"{type(first).__name__} does not apply to masks in memory; remove it from augment, or read the images "
                "and masks from files"
            )
        made = self.make_masks(split)
        if made is None:
            return None
        image, mask = made
        self._check(image, mask, split)
        return TensorDataset(torch.cat((image, IGNORED - mask[:, None]), 1), torch.zeros(len(image), dtype=torch.int64))

    def _check(self, image: Tensor, mask: Tensor, split: Split) -> None:
        where = f"the {split} split of {type(self).__name__}"
        if mask.shape != (len(image), *image.shape[2:]) or {image.dtype, mask.dtype} != {torch.uint8}:
            raise ValueError(
                f"{where} must have uint8 images (N, C, H, W) and uint8 masks (N, H, W), got {image.dtype} "
                f"{tuple(image.shape)} and {mask.dtype} {tuple(mask.shape)}"
            )
        wrong = (mask >= self.num_classes) & (mask != IGNORED)
        if wrong.any():
            first = int(wrong.flatten(1).any(1).nonzero()[0])
            label = int(mask[wrong][0])
            raise ValueError(
                f"mask {first} of {where} contains the label {label}, but there are {self.num_classes} classes, 0 to "
                f"{self.num_classes - 1}; correct the mask or num_classes, or use {IGNORED} for pixels without a class"
            )
