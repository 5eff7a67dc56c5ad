"""Augmentation. Nothing here draws random numbers: every sample comes with its own, uniform in [0, 1).

So one implementation serves an image in a worker and a whole batch on a GPU, with the same result.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

_LARGEST = 2**26
"""Pixels that an image may be scaled to: a line of a million pixels, scaled to some height, would fill all memory."""


class BatchTransform(ABC):
    """Changes the images of a batch, each by its own draws.

    Attributes:
        num_draws: How many numbers it needs for an image; a multiple of 4.
    """

    num_draws: int = 4

    @abstractmethod
    def __call__(self, image: Tensor, draws: Tensor) -> Tensor:
        """Transforms a batch.

        Args:
            image: `(B, C, H, W)`, uint8, on any device.
            draws: `(B, num_draws)`, uniform in [0, 1), on the same device.

        Returns:
            `(B, C, H, W)`, uint8.
        """


class ImageTransform(ABC):
    """Brings one image of any size to the size of the batch, before the batch is made."""

    @abstractmethod
    def __call__(self, image: Image.Image, size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Transforms an image.

        Args:
            image: Of mode L or RGB.
            size: Height and width to return.
            draws: `(10, 4)`, uniform in [0, 1).
        """

    def least(self, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> tuple[int, int]:
        """How small an image may be decoded: JPEG files can be at a half, a quarter or an eighth, in less time.

        Args:
            full: The image's height and width.
            size: Height and width to return.
            draws: `(10, 4)`, uniform in [0, 1).

        Returns:
            The least height and width that the whole image must have; by default the full ones.
        """
        return full

    def reduced(self, image: Image.Image, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Transforms an image that was decoded smaller, no smaller than `least`.

        Args:
            image: At its full size, or a half, a quarter or an eighth of it, rounded up.
            full: Its full height and width.
            size: Height and width to return.
            draws: `(10, 4)`, uniform in [0, 1).

        Returns:
            What the full image gives, but for how pixels are averaged.
        """
        return self(image, size, draws)


Augmentation: TypeAlias = "Sequence[ImageTransform | BatchTransform]"
"""What is done to an image, in this order; an `ImageTransform`, if any, comes first."""


def divide(augment: Augmentation) -> tuple[ImageTransform | None, tuple[BatchTransform, ...]]:
    """Divide an augmentation into what brings an image to size, if anything does, and what changes batches.

    Args:
        augment: The transforms in their order.

    Raises:
        ValueError: If an `ImageTransform` is not the first.
    """
    first = [transform for transform in augment if isinstance(transform, ImageTransform)]
    if first and (len(first) > 1 or first[0] is not augment[0]):
        name = type(first[-1]).__name__
        raise ValueError(f"augment may have {name} in the first place only, as it brings images to one size")
    return (first[0] if first else None), tuple(t for t in augment if isinstance(t, BatchTransform))


@dataclass(frozen=True)
class RandomCrop(BatchTransform):
    """Pads with zeros and cuts the original size out again, at a random place.

    Args:
        padding: Pixels added on each side.
    """

    padding: int = 4

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"RandomCrop needs a padding of 0 or more pixels, got {self.padding}")

    def __call__(self, image: Tensor, draws: Tensor) -> Tensor:
        """Shifts every image by its first two draws."""
        b, c, h, w = image.shape
        padded = F.pad(image, (self.padding,) * 4)
        top, left = (draws[:, :2] * (2 * self.padding + 1)).long().view(b, 2, 1, 1).unbind(1)
        # Each row of a crop is w bytes in a row of the padded batch: b * c * h short copies, which on a CPU
        # take a third of the time of gathering pixels.
        plane = torch.arange(b * c, device=image.device).view(b, c, 1)
        row = plane * padded.shape[2] + top + torch.arange(h, device=image.device)
        start = (row * padded.shape[3] + left).flatten()
        return padded.flatten().unfold(0, w, 1).index_select(0, start).view(b, c, h, w)


@dataclass(frozen=True)
class RandomHorizontalFlip(BatchTransform):
    """Mirrors images left to right.

    Args:
        p: Probability of an image to be mirrored.
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"RandomHorizontalFlip needs a probability p between 0 and 1, got {self.p}")

    def __call__(self, image: Tensor, draws: Tensor) -> Tensor:
        """Mirrors the images whose first draw is below `p`."""
        size = len(image)
        both = torch.cat((image, image.flip(-1)))
        # Whole images are chosen: on a CPU a quarter of the time of torch.where.
        return both.index_select(0, torch.arange(size, device=image.device) + size * (draws[:, 0] < self.p))


@dataclass(frozen=True)
class CenterCrop(ImageTransform):
    """Scales an image so that the size covers `ratio` of its tighter side, and cuts out the centre.

    An image that has the size already is left as it is, so that small images stored at the networks' size are
    not blurred.

    Args:
        ratio: Share of the tighter side that is kept; 0.875 is 224 out of 256.
    """

    ratio: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"CenterCrop needs a ratio above 0 and up to 1, got {self.ratio}")

    def __call__(self, image: Image.Image, size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Cuts out the centre; the draws are not used."""
        return self.reduced(image, (image.height, image.width), size, draws)

    def least(self, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> tuple[int, int]:
        """No smaller than the size to which the image is scaled."""
        if full == size:
            return full
        height, width = (round(side / self.ratio) for side in size)
        if height * full[1] >= width * full[0]:
            return height, height * full[1] // full[0]
        return width * full[0] // full[1], width

    def reduced(self, image: Image.Image, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Cuts out the centre of an image that was decoded smaller."""
        if full == size:
            return image
        height, width = self.least(full, size, draws)
        if height * width > _LARGEST:
            raise ValueError(f"an image of {full[0]} x {full[1]} pixels is too narrow: scaled, {height} x {width}")
        factor = _reduction(image, full)
        whole = (0, 0, full[1] / factor, full[0] / factor)  # the last row and column may be only in part the image's
        scaled = image.resize((width, height), Image.Resampling.BILINEAR, whole)
        centre: Image.Image = TF.center_crop(scaled, list(size))
        return centre


@dataclass(frozen=True)
class RandomResizedCrop(ImageTransform):
    """Cuts out a random part of the image and scales it to the size; listed first in `augment`.

    Args:
        scale: Range of the part's area, as a share of the image's.
        ratio: Range of the part's width divided by its height.

    References:
        Szegedy et al.: Going deeper with convolutions (2014), arXiv:1409.4842, section 6. As in torchvision,
        a part that does not fit is drawn again, ten times at most; then the largest in the centre is taken.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"RandomResizedCrop needs a scale with 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"RandomResizedCrop needs a ratio with 0 < low <= high, got {self.ratio}")

    def __call__(self, image: Image.Image, size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Cuts out the part that `box` chooses."""
        return self.reduced(image, (image.height, image.width), size, draws)

    def least(self, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> tuple[int, int]:
        """So small that the chosen part has the size, or has all its pixels."""
        _, _, height, width = self.box(*full, draws)
        return -(-full[0] * size[0] // height), -(-full[1] * size[1] // width)

    def reduced(self, image: Image.Image, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Cuts out the part, chosen on the full image, of one that was decoded smaller."""
        top, left, height, width = self.box(*full, draws)
        factor = _reduction(image, full)
        # Whole pixels first, so that none from outside of the part is mixed in; then what they have too much.
        outer = left // factor, top // factor, -(-(left + width) // factor), -(-(top + height) // factor)
        inner = left / factor, top / factor, (left + width) / factor, (top + height) / factor
        box = (inner[0] - outer[0], inner[1] - outer[1], inner[2] - outer[0], inner[3] - outer[1])
        return image.crop(outer).resize((size[1], size[0]), Image.Resampling.BILINEAR, box)

    def box(self, height: int, width: int, draws: Tensor) -> tuple[int, int, int, int]:
        """Chooses the part.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            draws: `(tries, 4)`, uniform in [0, 1): area, ratio, vertical and horizontal place.

        Returns:
            Top, left, height and width in pixels.
        """
        (low, high), (narrow, wide) = self.scale, self.ratio
        for area, shape, vertical, horizontal in draws.tolist():
            pixels = height * width * (low + (high - low) * area)
            ratio = narrow * (wide / narrow) ** shape
            h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
            if 0 < h <= height and 0 < w <= width:
                return int(vertical * (height - h + 1)), int(horizontal * (width - w + 1)), h, w
        ratio = min(max(width / height, narrow), wide)
        h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
        return (height - h) // 2, (width - w) // 2, h, w


def _reduction(image: Image.Image, full: tuple[int, int]) -> int:
    """By how much an image was decoded smaller."""
    size = image.height, image.width
    return next(factor for factor in (1, 2, 4, 8) if (-(-full[0] // factor), -(-full[1] // factor)) == size)
