"""RandAugment and TrivialAugment, for a whole batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from lkd.datamodules.transforms.base import BatchTransform

_LEVELS = 31


class Operation(NamedTuple):
    """One operation of RandAugment and TrivialAugment.

    Attributes:
        change: Applies the operation to images `(B, C, H, W)` at a level.
        levels: Maps height and width of an image to the level of each magnitude `(31,)`.
        wide: The same for TrivialAugment.
        signed: Whether the level is negated for half of the images.
    """

    change: Callable[[Tensor, float], Tensor]
    levels: Callable[[int, int], Tensor]
    wide: Callable[[int, int], Tensor]
    signed: bool = False


def _up_to(last: float, first: float = 0.0) -> Callable[[int, int], Tensor]:
    return lambda height, width: torch.linspace(first, last, _LEVELS)


def _bits(dropped: int) -> Callable[[int, int], Tensor]:
    return lambda height, width: (8 - torch.arange(_LEVELS) / ((_LEVELS - 1) / dropped)).round()


def _moved(image: Tensor, x: float, y: float) -> Tensor:
    moved: Tensor = TF.affine(image, angle=0.0, translate=[int(x), int(y)], scale=1.0, shear=[0.0, 0.0])
    return moved


def _sheared(image: Tensor, x: float, y: float) -> Tensor:
    degrees = [math.degrees(math.atan(slope)) for slope in (x, y)]
    sheared: Tensor = TF.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])
    return sheared


OPERATIONS = {
    "Identity": Operation(lambda image, level: image, _up_to(0.0), _up_to(0.0)),
    "ShearX": Operation(lambda image, level: _sheared(image, level, 0.0), _up_to(0.3), _up_to(0.99), signed=True),
    "ShearY": Operation(lambda image, level: _sheared(image, 0.0, level), _up_to(0.3), _up_to(0.99), signed=True),
    "TranslateX": Operation(
        lambda image, level: _moved(image, level, 0.0),
        lambda height, width: torch.linspace(0.0, 150.0 / 331.0 * width, _LEVELS),
        _up_to(32.0),
        signed=True,
    ),
    "TranslateY": Operation(
        lambda image, level: _moved(image, 0.0, level),
        lambda height, width: torch.linspace(0.0, 150.0 / 331.0 * height, _LEVELS),
        _up_to(32.0),
        signed=True,
    ),
    "Rotate": Operation(lambda image, level: TF.rotate(image, level), _up_to(30.0), _up_to(135.0), signed=True),
    "Brightness": Operation(
        lambda image, level: TF.adjust_brightness(image, 1.0 + level), _up_to(0.9), _up_to(0.99), signed=True
    ),
    "Color": Operation(
        lambda image, level: TF.adjust_saturation(image, 1.0 + level), _up_to(0.9), _up_to(0.99), signed=True
    ),
    "Contrast": Operation(
        lambda image, level: TF.adjust_contrast(image, 1.0 + level), _up_to(0.9), _up_to(0.99), signed=True
    ),
    "Sharpness": Operation(
        lambda image, level: TF.adjust_sharpness(image, 1.0 + level), _up_to(0.9), _up_to(0.99), signed=True
    ),
    "Posterize": Operation(lambda image, level: TF.posterize(image, int(level)), _bits(4), _bits(6)),
    "Solarize": Operation(
        lambda image, level: TF.solarize(image, 255 * level), _up_to(0.0, first=1.0), _up_to(0.0, first=1.0)
    ),
    "AutoContrast": Operation(lambda image, level: TF.autocontrast(image), _up_to(0.0), _up_to(0.0)),
    "Equalize": Operation(lambda image, level: TF.equalize(image), _up_to(0.0), _up_to(0.0)),
}
"""The operations of torchvision's RandAugment and TrivialAugmentWide, in the same order."""


def _check_channels(name: str, image: Tensor) -> None:
    if image.shape[1] not in (1, 3):
        raise ValueError(f"{name} requires images with 1 or 3 channels, got {image.shape[1]}; remove it from augment")


def _changed(image: Tensor, number: Tensor, level: Tensor) -> Tensor:
    """Change each image by an operation and a level (both on the CPU); images with equal ones are changed together."""
    changed = image.clone()
    for own, operation in enumerate(OPERATIONS.values()):
        rows = (number == own).nonzero().squeeze(1)
        for value in set(level[rows].tolist()):
            row = rows[level[rows] == value]
            changed[row] = operation.change(image[row], value)
    return changed


@dataclass(frozen=True)
class RandAugment(BatchTransform):
    """Apply operations chosen at random for each image, one after the other, all of the same magnitude.

    Operations and magnitudes are those of torchvision; pixels outside the image are filled with black. Images with the
    same operation are processed together.

    Args:
        num_ops: Number of operations, at least 1.
        magnitude: Magnitude of the operations, 0 to 30.

    Raises:
        ValueError: If `num_ops` is less than 1, or the magnitude is out of range.

    References:
        Cubuk et al.: RandAugment: Practical automated data augmentation with a reduced search space, NeurIPS 2020
        (arXiv 1909.13719).
    """

    num_ops: int = 2
    magnitude: int = 10
    fits_masks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.num_ops < 1:
            raise ValueError(f"RandAugment: num_ops must be at least 1, got {self.num_ops}")
        if not 0 <= self.magnitude < _LEVELS:
            raise ValueError(f"RandAugment: magnitude must be between 0 and {_LEVELS - 1}, got {self.magnitude}")

    @property
    def num_draws(self) -> int:  # type: ignore[override]
        """Two draws per operation, rounded up to a multiple of 4."""
        return 4 * math.ceil(self.num_ops / 2)

    def __call__(self, image: Tensor, draws: Tensor) -> Tensor:
        """Change every image; the first draw of each pair chooses the operation, the second its sign.

        Raises:
            ValueError: If the images have a number of channels other than 1 or 3.
        """
        _check_channels("RandAugment", image)
        levels = [operation.levels(*image.shape[2:])[self.magnitude] for operation in OPERATIONS.values()]
        for kind, sign in draws.cpu().T[: 2 * self.num_ops].reshape(self.num_ops, 2, -1):
            number = (kind * len(OPERATIONS)).long()
            image = _changed(image, number, _signed(torch.stack(levels)[number], number, sign))
        return image


@dataclass(frozen=True)
class TrivialAugment(BatchTransform):
    """Apply one operation to each image, chosen at random with a random magnitude. It has no hyperparameters.

    Operations and magnitudes are those of torchvision's `TrivialAugmentWide`; pixels outside the image are filled with
    black. Images with the same operation and magnitude are processed together.

    References:
        Müller, Hutter: TrivialAugment: Tuning-free yet state-of-the-art data augmentation, ICCV 2021
        (arXiv 2103.10158), the wide space of table 1.
    """

    fits_masks: ClassVar[bool] = False

    def __call__(self, image: Tensor, draws: Tensor) -> Tensor:
        """Change every image; the draws choose operation, sign and magnitude.

        Raises:
            ValueError: If the images have a number of channels other than 1 or 3.
        """
        _check_channels("TrivialAugment", image)
        kind, sign, strength, _ = draws.cpu().T
        number = (kind * len(OPERATIONS)).long()
        levels = torch.stack([operation.wide(*image.shape[2:]) for operation in OPERATIONS.values()])
        return _changed(image, number, _signed(levels[number, (strength * _LEVELS).long()], number, sign))


def _signed(level: Tensor, number: Tensor, sign: Tensor) -> Tensor:
    """Negate the level for half of the images, according to `sign`, if the operation has a sign."""
    signed = torch.tensor([operation.signed for operation in OPERATIONS.values()])
    return torch.where(signed[number] & (sign < 0.5), -level, level)
