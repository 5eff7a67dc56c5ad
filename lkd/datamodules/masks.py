"""Dataset of images with masks."""

from __future__ import annotations

from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from lkd.datamodules.dataset import ImageDataset, ImageError, reason
from lkd.datamodules.mask_files import IGNORED, MaskedFiles, MaskError
from lkd.datamodules.sources import located
from lkd.datamodules.transforms.base import BatchTransform
from lkd.io.refused import shown
from lkd.types import IGNORE_INDEX, Batch


class MaskDataset(ImageDataset):
    """Dataset of images with masks. The mask is the last channel of its image, so both are transformed alike.

    The channel holds `255 - class`: transforms fill with 0, which then means `IGNORED`. A mask file is resized like its
    image, with nearest-neighbor interpolation.
    """

    extra_channels: ClassVar[int] = 1

    def read(self, index: int, draws: Tensor) -> Tensor:
        """Read an image and its mask `(C + 1, H, W)`, uint8; see `ImageDataset.read`."""
        image, full = self.read_image(index, draws)
        return torch.cat((image, TF.pil_to_tensor(self._mask(index, full, draws))))

    def flaw(self, index: int) -> str:
        """Return the reason why an image or its mask cannot be read; empty if both can be read."""
        if found := super().flaw(index):
            return found
        try:
            self.read(index, torch.zeros(10, 4))
        except ImageError as error:
            return str(error)
        return ""

    def _mask(self, index: int, full: tuple[int, int], draws: Tensor) -> Image.Image:
        source, index = located(self.source, index)
        if not isinstance(source, MaskedFiles):
            raise TypeError(f"expected a source of type MaskedFiles, got {type(source).__name__}")
        try:
            mask = source.mask(index, full)
        except Exception as error:  # decoders raise almost any exception for corrupt files
            name, text = shown(source.masks.path(index)), str(error) if isinstance(error, MaskError) else reason(error)
            raise ImageError(f"mask {name} cannot be read ({text}); correct or remove it") from error
        return self.resize(mask, self.shape[1:], draws)

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
