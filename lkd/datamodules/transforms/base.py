"""Base classes of augmentation, crops and flips. Transforms draw no random numbers; each sample comes with its own.

The numbers are uniform in [0, 1). One implementation therefore serves an image in a worker and a whole batch on a GPU,
with the same result.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

_LARGEST = 2**26
"""Maximum number of pixels of a scaled image. A line of a million pixels, scaled to a height, would fill all memory."""


class BatchTransform(ABC):
    """Base class of transforms of a batch, in which each image uses its own random numbers.

    Attributes:
        num_draws: Number of random numbers per image; a multiple of 4.
        moves_pixels: Whether it moves pixels without changing their values, apart from filling with 0. It then
            applies to masks as well.
        fits_masks: Whether it may be applied to images with masks. Not if it moves pixels and changes their values, as
            the masks could not follow.
    """

    num_draws: int = 4
    moves_pixels: ClassVar[bool] = False
    fits_masks: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, image: Tensor, draws: Tensor) -> Tensor:
        """Transform a batch.

        Args:
            image: Images `(B, C, H, W)`, uint8, on any device.
            draws: Random numbers `(B, num_draws)`, uniform in [0, 1), on the same device.

        Returns:
            Transformed images `(B, C, H, W)`, uint8.
        """


class ImageTransform(ABC):
    """Base class of transforms that bring one image of any size to the size of the batch."""

    @abstractmethod
    def __call__(self, image: Image.Image, size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Transform an image.

        Args:
            image: Image of mode L or RGB.
            size: Height and width to return.
            draws: Random numbers `(10, 4)`, uniform in [0, 1).
        """

    def least(self, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> tuple[int, int]:
        """Return the smallest size at which an image may be decoded.

        JPEG files can be decoded faster at a half, a quarter or an eighth of their size.

        Args:
            full: Height and width of the image.
            size: Height and width to return.
            draws: Random numbers `(10, 4)`, uniform in [0, 1).

        Returns:
            Minimum height and width of the whole image; by default its full size.
        """
        return full

    def reduced(self, image: Image.Image, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Transform an image that was decoded at a smaller size, but not smaller than `least`.

        Args:
            image: Image at its full size, or at a half, a quarter or an eighth of it, rounded up.
            full: Full height and width of the image.
            size: Height and width to return.
            draws: Random numbers `(10, 4)`, uniform in [0, 1).

        Returns:
            The same as for the full image, except for how pixels are averaged.
        """
        return self(image, size, draws)


Augmentation: TypeAlias = "Sequence[ImageTransform | BatchTransform]"
"""Transforms of an image in order; an `ImageTransform`, if any, comes first."""


def divide(augment: Augmentation) -> tuple[ImageTransform | None, tuple[BatchTransform, ...]]:
    """Split an augmentation into the transform that resizes an image, if any, and the transforms of batches.

    Args:
        augment: The transforms in order.

    Raises:
        ValueError: If an `ImageTransform` is not the first transform.
    """
    first = [transform for transform in augment if isinstance(transform, ImageTransform)]
    if first and (len(first) > 1 or first[0] is not augment[0]):
        name = type(first[-1]).__name__
        raise ValueError(f"{name} must be the first transform in augment, because it resizes images to a common size")
    return (first[0] if first else None), tuple(t for t in augment if isinstance(t, BatchTransform))


@dataclass(frozen=True)
class RandomCrop(BatchTransform):
    """Pad with zeros and crop at a random position to the original size.

    Args:
        padding: Number of pixels added on each side.

    Raises:
        ValueError: If the padding is negative.
    """

    padding: int = 4
    moves_pixels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"RandomCrop: padding must be at least 0 pixels, got {self.padding}")

    def __call__(self, image: Tensor, draws: Tensor) -> Tensor:
        """Shift every image according to its first two draws."""
        b, c, h, w = image.shape
        padded = F.pad(image, (self.padding,) * 4)
        top, left = (draws[:, :2] * (2 * self.padding + 1)).long().view(b, 2, 1, 1).unbind(1)
        # Each row of a crop is w contiguous bytes of the padded batch: b * c * h short copies, which on a CPU take a
        # third of the time of gathering pixels.
        plane = torch.arange(b * c, device=image.device).view(b, c, 1)
        row = plane * padded.shape[2] + top + torch.arange(h, device=image.device)
        start = (row * padded.shape[3] + left).flatten()
        return padded.flatten().unfold(0, w, 1).index_select(0, start).view(b, c, h, w)


@dataclass(frozen=True)
class RandomHorizontalFlip(BatchTransform):
    """Flip images horizontally at random.

    Args:
        p: Probability that an image is flipped.

    Raises:
        ValueError: If the probability is not between 0 and 1.
    """

    p: float = 0.5
    moves_pixels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"RandomHorizontalFlip: the probability p must be between 0 and 1, got {self.p}")

    def __call__(self, image: Tensor, draws: Tensor) -> Tensor:
        """Flip the images whose first draw is below `p`."""
        size = len(image)
        both = torch.cat((image, image.flip(-1)))
        # Selecting whole images takes a quarter of the time of torch.where on a CPU.
        return both.index_select(0, torch.arange(size, device=image.device) + size * (draws[:, 0] < self.p))


@dataclass(frozen=True)
class CenterCrop(ImageTransform):
    """Scale an image so that the crop covers `ratio` of its tighter side, and crop the center.

    An image that already has the size is returned unchanged, so small images stored at the size of the networks are not
    blurred.

    Args:
        ratio: Fraction of the tighter side that is kept; 0.875 is 224 out of 256.

    Raises:
        ValueError: If the ratio is not greater than 0 and at most 1.
    """

    ratio: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"CenterCrop: ratio must be greater than 0 and at most 1, got {self.ratio}")

    def __call__(self, image: Image.Image, size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Crop the center; the draws are not used."""
        return self.reduced(image, (image.height, image.width), size, draws)

    def least(self, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> tuple[int, int]:
        """Return the size to which the image is scaled."""
        if full == size:
            return full
        height, width = (round(side / self.ratio) for side in size)
        if height * full[1] >= width * full[0]:
            return height, height * full[1] // full[0]
        return width * full[0] // full[1], width

    def reduced(self, image: Image.Image, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Crop the center of an image that was decoded at a smaller size."""
        if full == size:
            return image
        height, width = self.least(full, size, draws)
        if height * width > _LARGEST:
            raise ValueError(f"an image of {full[0]}x{full[1]} pixels is too narrow to be scaled ({height}x{width})")
        factor = reduction(image, full)
        whole = (0, 0, full[1] / factor, full[0] / factor)  # the last row and column may be only partly covered
        scaled = image.resize((width, height), Image.Resampling.BILINEAR, whole)
        center: Image.Image = TF.center_crop(scaled, list(size))
        return center


@dataclass(frozen=True)
class RandomResizedCrop(ImageTransform):
    """Crop a random part of the image and scale it to the size. Must be the first transform in `augment`.

    Args:
        scale: Range of the area of the part, as a fraction of the image.
        ratio: Range of the aspect ratio of the part (width divided by height).

    Raises:
        ValueError: If a range is out of order or contains invalid values.

    References:
        Szegedy et al.: Going deeper with convolutions (2014), arXiv:1409.4842, section 6. As in torchvision, a part
        that does not fit is drawn again, up to ten times; then the largest centered part is used.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"RandomResizedCrop: scale must satisfy 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"RandomResizedCrop: ratio must satisfy 0 < low <= high, got {self.ratio}")

    def __call__(self, image: Image.Image, size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Crop the part chosen by `box`."""
        return self.reduced(image, (image.height, image.width), size, draws)

    def least(self, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> tuple[int, int]:
        """Return the size at which the chosen part has the target size; this may exceed the full size."""
        _, _, height, width = self.box(*full, draws)
        return -(-full[0] * size[0] // height), -(-full[1] * size[1] // width)

    def reduced(self, image: Image.Image, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Crop the part, chosen on the full image, of an image that was decoded at a smaller size."""
        top, left, height, width = self.box(*full, draws)
        factor = reduction(image, full)
        # Crop whole pixels first, so that none outside the part contributes; then the exact box in `resize`.
        outer = left // factor, top // factor, -(-(left + width) // factor), -(-(top + height) // factor)
        inner = left / factor, top / factor, (left + width) / factor, (top + height) / factor
        box = (inner[0] - outer[0], inner[1] - outer[1], inner[2] - outer[0], inner[3] - outer[1])
        return image.crop(outer).resize((size[1], size[0]), Image.Resampling.BILINEAR, box)

    def box(self, height: int, width: int, draws: Tensor) -> tuple[int, int, int, int]:
        """Choose the part.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            draws: Random numbers `(tries, 4)`, uniform in [0, 1): area, ratio, vertical and horizontal position.

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


def reduction(image: Image.Image, full: tuple[int, int]) -> int:
    """Return the factor by which an image was reduced when it was decoded.

    Args:
        image: Decoded image.
        full: Height and width of the full image.
    """
    size = image.height, image.width
    return next(factor for factor in (1, 2, 4, 8) if (-(-full[0] // factor), -(-full[1] // factor)) == size)
