"""Transforms that keep the aspect ratio of images of different sizes: random scaling with cropping, and padding."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from lkd.datamodules.transforms.base import ImageTransform, reduction


@dataclass(frozen=True)
class RandomScaledCrop(ImageTransform):
    """Scale an image by a random factor and crop a random part. It must be the first transform in `augment`.

    A scaled image that is smaller than the crop is padded with zeros on the right and at the bottom. Unlike
    `RandomResizedCrop`, this transform keeps the aspect ratio; it is the usual augmentation for segmentation.

    Args:
        scale: Range of the uniformly distributed factor.
        side: Length in pixels to which a factor of 1 scales the shorter side; by default, a factor of 1 keeps the size.

    Raises:
        ValueError: If the range is out of order or not positive, or `side` is less than 1.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    side: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"RandomScaledCrop: scale must satisfy 0 < low <= high, got {self.scale}")
        if self.side is not None and self.side < 1:
            raise ValueError(f"RandomScaledCrop: side must be at least 1 pixel, got {self.side}")

    def __call__(self, image: Image.Image, size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Scale and crop according to the first three draws."""
        return self.reduced(image, (image.height, image.width), size, draws)

    def least(self, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> tuple[int, int]:
        """Return the size to which the image is scaled."""
        low, high = self.scale
        factor = (low + (high - low) * float(draws[0, 0])) * (1 if self.side is None else self.side / min(full))
        height, width = (max(1, round(length * factor)) for length in full)
        return height, width

    def reduced(self, image: Image.Image, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Scale and crop an image that was decoded at a smaller size. Only the part in the crop is scaled."""
        scaled = self.least(full, size, draws)
        height, width = (min(lengths) for lengths in zip(size, scaled, strict=True))
        top = int(float(draws[0, 1]) * (scaled[0] - height + 1))
        left = int(float(draws[0, 2]) * (scaled[1] - width + 1))
        factor = reduction(image, full)
        rows, columns = full[0] / scaled[0] / factor, full[1] / scaled[1] / factor
        right, bottom = min((left + width) * columns, image.width), min((top + height) * rows, image.height)  # rounding
        box = (left * columns, top * rows, right, bottom)
        return _padded(image.resize((width, height), Image.Resampling.BILINEAR, box), size)


@dataclass(frozen=True)
class PadToSize(ImageTransform):
    """Pad an image with zeros on the right and at the bottom. A larger image is first scaled down to fit."""

    def __call__(self, image: Image.Image, size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Pad the image; the draws are not used."""
        return self.reduced(image, (image.height, image.width), size, draws)

    def least(self, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> tuple[int, int]:
        """Return the size to which the image is scaled."""
        factor = min(1.0, size[0] / full[0], size[1] / full[1])
        height, width = (max(1, round(length * factor)) for length in full)
        return height, width

    def reduced(self, image: Image.Image, full: tuple[int, int], size: tuple[int, int], draws: Tensor) -> Image.Image:
        """Pad an image that was decoded at a smaller size."""
        height, width = self.least(full, size, draws)
        if (height, width) != (image.height, image.width):
            factor = reduction(image, full)
            whole = (0, 0, full[1] / factor, full[0] / factor)
            image = image.resize((width, height), Image.Resampling.BILINEAR, whole)
        return _padded(image, size)


def _padded(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an image of exactly `size`, filled with zeros on the right and at the bottom."""
    return image if (image.height, image.width) == size else image.crop((0, 0, size[1], size[0]))
