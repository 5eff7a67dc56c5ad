"""Random changes of brightness, contrast, saturation and hue, for a whole batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lkd import devices
from lkd.datamodules.transforms.base import BatchTransform

# Every step below is one correctly rounded operation, so that all devices compute the same bits: no fused multiply-adds
# (`add` with `alpha`), and no division by a scalar, which a GPU would replace with a multiplication.


def _blend(image: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """Return `factor * image + (1 - factor) * other`, clamped to valid levels."""
    return (image * factor + other * (1 - factor)).clamp_(0, 255).to(torch.uint8)


def _gray(image: Tensor) -> Tensor:
    """Convert to integer gray levels `(B, 1, H, W)`, float32."""
    if image.shape[1] == 1:
        return image.to(torch.float32)
    red, green, blue = image.to(torch.float32)[:, :, None].unbind(1)
    total: Tensor = red * 2989 + green * 5870 + blue * 1140  # exact, because it is below 2^24
    return ((total + 0.5) * 1e-4).floor_()


def _brightness(image: Tensor, factor: Tensor) -> Tensor:
    return _blend(image, 0.0, factor)


def _contrast(image: Tensor, factor: Tensor) -> Tensor:
    total = _gray(image).sum((1, 2, 3), keepdim=True, dtype=torch.int64)
    return _blend(image, total / torch.full_like(total, image.shape[2] * image.shape[3]), factor)


def _saturation(image: Tensor, factor: Tensor) -> Tensor:
    return _blend(image, _gray(image), factor)


def _hue(image: Tensor, factor: Tensor) -> Tensor:
    """Rotate the hue by a fraction of the color circle.

    With the hue in sixths of the circle, the largest level `v` of the channels and their spread `c`, each channel is
    `v - c * clamp(min(k, 4 - k), 0, 1)`, where `k` is the hue plus 5, 3 or 1 for red, green or blue, modulo 6.
    """
    levels = image.to(torch.float32)
    low, high = levels.aminmax(dim=1, keepdim=True)
    spread = high - low
    red, green, blue = levels[:, :, None].unbind(1)
    divisor = spread.clamp(min=1)  # gray has no hue, and none is needed
    of_green, of_blue = (blue - red) / divisor + 2, (red - green) / divisor + 4
    hue = torch.where(high == red, (green - blue) / divisor, torch.where(high == green, of_green, of_blue))
    corner = devices.constant((5.0, 3.0, 1.0), torch.float32, image.device).view(3, 1, 1)
    k = (corner + (hue + factor * 6)).remainder_(6)
    turned = high - spread * torch.minimum(k, 4 - k).clamp_(0, 1)
    return (turned * (255.999 / 255)).to(torch.uint8)  # as torchvision converts from [0, 1]


_CHANGES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_brightness, _contrast, _saturation, _hue)


@dataclass(frozen=True)
class ColorJitter(BatchTransform):
    """Change brightness, contrast, saturation and hue, with random factors and in a random order for each image.

    The result differs from torchvision's by at most one of 255 levels per change. Grayscale images have neither
    saturation nor hue.

    Args:
        brightness: Jitter of the brightness: a number v for factors from max(0, 1 - v) to 1 + v, or their range; 0 for
            no change.
        contrast: Jitter of the contrast, in the same format.
        saturation: Jitter of the saturation, in the same format.
        hue: Maximum rotation of the hue as a fraction of the color circle, up to 0.5, or a range within -0.5 to 0.5.

    Raises:
        ValueError: If a number is negative or too large, or a range is out of order.
    """

    brightness: float | tuple[float, float] = 0.0
    contrast: float | tuple[float, float] = 0.0
    saturation: float | tuple[float, float] = 0.0
    hue: float | tuple[float, float] = 0.0

    num_draws = 8

    def __post_init__(self) -> None:
        *factors, (left, right) = self.ranges
        for name, (low, high) in zip(("brightness", "contrast", "saturation"), factors, strict=True):
            if not 0 <= low <= high:
                raise ValueError(
                    f"ColorJitter: {name} must be at least 0, or a range 0 <= low <= high, got {getattr(self, name)}"
                )
        if not -0.5 <= left <= right <= 0.5:
            raise ValueError(f"ColorJitter: hue must be between 0 and 0.5, or a range in -0.5 to 0.5, got {self.hue}")

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """Minimum and maximum factor of brightness, contrast, saturation and hue."""
        factors = (self.brightness, self.contrast, self.saturation)
        around = [(max(0.0, 1 - v), 1 + v) if isinstance(v, int | float) else v for v in factors]
        return (*around, (-self.hue, self.hue) if isinstance(self.hue, int | float) else self.hue)

    def __call__(self, image: Tensor, draws: Tensor) -> Tensor:
        """Change every image: the first four draws determine the factors, the last four the order.

        Raises:
            ValueError: If the images have a number of channels other than 1 or 3.
        """
        if image.shape[1] not in (1, 3):
            raise ValueError(f"ColorJitter requires images with 1 or 3 channels, got {image.shape[1]}; remove it")
        idle = ((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (0.0, 0.0))
        chosen = [i for i in range(4 if image.shape[1] == 3 else 2) if tuple(self.ranges[i]) != idle[i]]
        low, high = (devices.constant(edge, torch.float32, image.device) for edge in zip(*self.ranges, strict=True))
        factors = low + (high - low) * draws[:, :4]
        factors = torch.stack([factors[:, i] for i in chosen], 1)[..., None, None, None] if chosen else factors
        orders = (
            torch.stack([draws[:, 4 + i] for i in chosen], 1).argsort(dim=1, stable=True) if chosen else draws[:, :0]
        )
        image = image.clone()
        for order in orders.T:
            image = self._one_change(image, order, chosen, factors)
        return image

    @staticmethod
    def _one_change(image: Tensor, order: Tensor, chosen: list[int], factors: Tensor) -> Tensor:
        """Apply one change to each image; `order` is its position in the list of enabled changes `(B,)`."""
        before = image
        for place, i in enumerate(chosen):
            if image.is_cpu:
                row = (order == place).nonzero().squeeze(1)
                if len(row):
                    image[row] = _CHANGES[i](image[row], factors[row, place])
            else:  # the host cannot select these images without synchronizing with the GPU
                image = torch.where(
                    (order == place)[:, None, None, None], _CHANGES[i](before, factors[:, place]), image
                )
        return image
