"""Augmentation that erases a part of the image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lkd import devices
from lkd.datamodules.transforms.base import BatchTransform

_TRIES = 10


def inside_boxes(image: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Return which pixels are inside a box; boxes may extend beyond the image.

    Args:
        image: Images `(B, C, H, W)`.
        top: First row of each image's box `(B,)`, int64.
        left: First column `(B,)`, int64.
        height: Number of rows `(B,)`, int64.
        width: Number of columns `(B,)`, int64.

    Returns:
        Mask `(B, 1, H, W)`, bool.
    """
    row, column = (torch.arange(size, device=image.device) for size in image.shape[2:])
    top, left, height, width = (edge[:, None] for edge in (top, left, height, width))
    in_row, in_column = (row >= top) & (row < top + height), (column >= left) & (column < left + width)
    return in_row[:, None, :, None] & in_column[:, None, None, :]


def _check_fill(name: str, fill: int | tuple[int, ...]) -> None:
    if not all(0 <= level <= 255 for level in ((fill,) if isinstance(fill, int) else fill)):
        raise ValueError(f"{name}: fill must be between 0 and 255, got {fill}")


def _filled(name: str, image: Tensor, inside: Tensor, fill: int | tuple[int, ...]) -> Tensor:
    if isinstance(fill, int):
        return image.masked_fill(inside, fill)
    if len(fill) != image.shape[1]:
        raise ValueError(
            f"{name}: fill has {len(fill)} levels, but images have {image.shape[1]} channels; specify one level per "
            "channel, or a single level"
        )
    level = devices.constant(fill, torch.uint8, image.device).view(-1, 1, 1)
    return torch.where(inside, level, image)


@dataclass(frozen=True)
class Cutout(BatchTransform):
    """Fill a square centered at a random pixel of the image; the part outside the image is cut off.

    Args:
        size: Side length of the square in pixels.
        fill: Level of its pixels, 0 to 255, or one level per channel.

    Raises:
        ValueError: If the size is less than 1, or a level is out of range.

    References:
        DeVries, Taylor: Improved regularization of convolutional neural networks with cutout (2017), arXiv:1708.04552,
        section 3.2. The authors use 16 pixels for CIFAR-10 and 8 for CIFAR-100, and fill with the mean, because their
        images are already normalized; in their code, an odd side is one pixel shorter.
    """

    size: int = 16
    fill: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Cutout: size must be at least 1 pixel, got {self.size}")
        _check_fill("Cutout", self.fill)

    def __call__(self, image: Tensor, draws: Tensor) -> Tensor:
        """Fill the square around the pixel chosen by the first two draws.

        Raises:
            ValueError: If `fill` has a different number of channels.
        """
        top, left = ((draws[:, i] * image.shape[2 + i]).long() - self.size // 2 for i in (0, 1))
        side = torch.full_like(top, self.size)
        return _filled("Cutout", image, inside_boxes(image, top, left, side, side), self.fill)


@dataclass(frozen=True)
class RandomErasing(BatchTransform):
    """Fill a random rectangle within the image.

    As in torchvision, a rectangle that does not fit is drawn again, up to ten times; then the image remains unchanged.

    Args:
        p: Probability that a part of an image is erased.
        scale: Range of the area of the part, as a fraction of the image.
        ratio: Range of the aspect ratio of the part (height divided by width).
        fill: Level of its pixels, 0 to 255, or one level per channel. Unlike in torchvision, it is applied before
            normalization, and is the same for all pixels.

    Raises:
        ValueError: If the probability, a range or a level is invalid.

    References:
        Zhong et al.: Random erasing data augmentation (2017), arXiv:1708.04896, algorithm 1. The paper draws the ratio
        uniformly, and fills with noise; torchvision and this implementation draw its logarithm uniformly.
    """

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    fill: int | tuple[int, ...] = 0

    num_draws = 4 * math.ceil((3 + 2 * _TRIES) / 4)

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"RandomErasing: the probability p must be between 0 and 1, got {self.p}")
        if not 0 <= self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"RandomErasing: scale must satisfy 0 <= low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"RandomErasing: ratio must satisfy 0 < low <= high, got {self.ratio}")
        _check_fill("RandomErasing", self.fill)

    def __call__(self, image: Tensor, draws: Tensor) -> Tensor:
        """Fill the rectangle chosen by `box`.

        Raises:
            ValueError: If `fill` has a different number of channels.
        """
        box = self.box(image.shape[2], image.shape[3], draws)
        return _filled("RandomErasing", image, inside_boxes(image, *box), self.fill)

    def box(self, height: int, width: int, draws: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose the rectangles.

        Args:
            height: Height of the images in pixels.
            width: Width of the images in pixels.
            draws: Random numbers `(B, 24)`, uniform in [0, 1): whether to erase, vertical and horizontal position,
                areas, ratios.

        Returns:
            Top, left, height and width `(B,)`, int64; the height is 0 for an image that remains unchanged.
        """
        (low, high), (flat, tall) = self.scale, self.ratio
        # In float64, so that all devices round the sides identically.
        area, shape = draws[:, 3 : 3 + 2 * _TRIES].double().view(-1, 2, _TRIES).unbind(1)
        pixels = height * width * (low + (high - low) * area)
        ratio = (math.log(flat) + (math.log(tall) - math.log(flat)) * shape).exp()
        h, w = (pixels * ratio).sqrt().round().long(), (pixels / ratio).sqrt().round().long()
        fits = (h < height) & (w < width)
        first = fits.long().argmax(1, keepdim=True)
        h, w = (side.gather(1, first).squeeze(1) for side in (h * fits, w))
        h = h * (draws[:, 0] < self.p)
        top, left = (draws[:, 1] * (height - h + 1)).long(), (draws[:, 2] * (width - w + 1)).long()
        return top, left, h, w
