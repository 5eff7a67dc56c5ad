"""Dataset of images with masks."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lkd.datamodules.dataset import ImageDataset
from lkd.datamodules.transforms.base import BatchTransform
from lkd.types import IGNORE_INDEX, Batch

IGNORED = 255
"""Label of pixels without a class in masks."""


class MaskDataset(ImageDataset):
    """Dataset of images with masks. The last channel of an image is its mask, so both are moved by the same draws.

    The channel holds `255 - class`: transforms fill with 0, which then means `IGNORED`.
    """

    extra_channels: ClassVar[int] = 1

    def transformed(self, image: Tensor, transform: BatchTransform, draws: Tensor) -> Tensor:
        """Apply a transform to images and masks if it moves pixels, otherwise to the images alone."""
        if transform.moves_pixels:
            return transform(image, draws)
        return torch.cat((transform(image[:, :-1], draws), image[:, -1:]), 1)

    def unmixed(self, epoch: Tensor, index: Tensor) -> Batch:
        """Read, augment and normalize images, and return their masks `(B, H, W)` as targets."""
        image = self.augmented(self.images(epoch, index), epoch, index)
        mask = IGNORED - image[:, -1].long()
        ignored = (mask == IGNORED) | (self.target[index] == IGNORE_INDEX).view(-1, 1, 1)
        return Batch(self.normalized(image[:, :-1]), mask.masked_fill(ignored, IGNORE_INDEX), index, version=epoch)
