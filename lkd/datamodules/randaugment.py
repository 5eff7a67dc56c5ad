"""RandAugment, a whole batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from lkd.datamodules.transforms import BatchTransform

_LEVELS = 31


class Operation(NamedTuple):
    """One of the things that RandAugment does to an image.

    Attributes:
        change: Changes images `(B, C, H, W)` by a level.
        levels: From an image's height and width, the level of each magnitude `(31,)`.
        signed: Whether half of the images get the level's negative.
    """

    change: Callable[[Tensor, float], Tensor]
    levels: Callable[[int, int], Tensor]
    signed: bool = False


def _up_to(last: float, first: float = 0.0) -> Callable[[int, int], Tensor]:
    return lambda height, width: torch.linspace(first, last, _LEVELS)


def _moved(image: Tensor, x: float, y: float) -> Tensor:
    moved: Tensor = TF.affine(image, angle=0.0, translate=[int(x), int(y)], scale=1.0, shear=[0.0, 0.0])
    return moved


def _sheared(image: Tensor, x: float, y: float) -> Tensor:
    degrees = [math.degrees(math.atan(slope)) for slope in (x, y)]
    sheared: Tensor = TF.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])
    return sheared


OPERATIONS = {
    "Identity": Operation(lambda image, level: image, _up_to(0.0)),
    "ShearX": Operation(lambda image, level: _sheared(image, level, 0.0), _up_to(0.3), signed=True),
    "ShearY": Operation(lambda image, level: _sheared(image, 0.0, level), _up_to(0.3), signed=True),
    "TranslateX": Operation(
        lambda image, level: _moved(image, level, 0.0),
        lambda height, width: torch.linspace(0.0, 150.0 / 331.0 * width, _LEVELS),
        signed=True,
    ),
    "TranslateY": Operation(
        lambda image, level: _moved(image, 0.0, level),
        lambda height, width: torch.linspace(0.0, 150.0 / 331.0 * height, _LEVELS),
        signed=True,
    ),
    "Rotate": Operation(lambda image, level: TF.rotate(image, level), _up_to(30.0), signed=True),
    "Brightness": Operation(lambda image, level: TF.adjust_brightness(image, 1.0 + level), _up_to(0.9), signed=True),
    "Color": Operation(lambda image, level: TF.adjust_saturation(image, 1.0 + level), _up_to(0.9), signed=True),
    "Contrast": Operation(lambda image, level: TF.adjust_contrast(image, 1.0 + level), _up_to(0.9), signed=True),
    "Sharpness": Operation(lambda image, level: TF.adjust_sharpness(image, 1.0 + level), _up_to(0.9), signed=True),
    "Posterize": Operation(
        lambda image, level: TF.posterize(image, int(level)),
        lambda height, width: (8 - torch.arange(_LEVELS) / ((_LEVELS - 1) / 4)).round(),
    ),
    "Solarize": Operation(lambda image, level: TF.solarize(image, 255 * level), _up_to(0.0, first=1.0)),
    "AutoContrast": Operation(lambda image, level: TF.autocontrast(image), _up_to(0.0)),
    "Equalize": Operation(lambda image, level: TF.equalize(image), _up_to(0.0)),
}
"""Those of torchvision's RandAugment, in its order."""


@dataclass(frozen=True)
class RandAugment(BatchTransform):
    """Some operations, chosen for each image, one after the other, all of the same strength.

    The operations and their strengths are torchvision's; what lies outside an image is black. Images that got the same
    operation are changed together.

    Args:
        num_ops: How many operations, 1 or more.
        magnitude: Their strength, 0 to 30.

    References:
        Cubuk et al.: RandAugment: Practical automated data augmentation with a reduced search space, NeurIPS 2020
        (arXiv 1909.13719).
    """

    num_ops: int = 2
    magnitude: int = 10

    def __post_init__(self) -> None:
        if self.num_ops < 1:
            raise ValueError(f"RandAugment needs 1 operation or more, got num_ops {self.num_ops}")
        if not 0 <= self.magnitude < _LEVELS:
            raise ValueError(f"RandAugment needs a magnitude between 0 and {_LEVELS - 1}, got {self.magnitude}")

    @property
    def num_draws(self) -> int:  # type: ignore[override]
        """Two for each operation, rounded up to a multiple of 4."""
        return 4 * math.ceil(self.num_ops / 2)

    def __call__(self, image: Tensor, draws: Tensor) -> Tensor:
        """Changes every image; of each pair of draws the first chooses the operation, the second the sign.

        Raises:
            ValueError: If the images have other than 1 or 3 channels.
        """
        if image.shape[1] not in (1, 3):
            raise ValueError(f"RandAugment changes gray or colour images, got {image.shape[1]} channels; leave it out")
        for kind, sign in draws.T[: 2 * self.num_ops].reshape(self.num_ops, 2, -1):
            image = self._changed(image, (kind * len(OPERATIONS)).long(), sign < 0.5)
        return image

    def _changed(self, image: Tensor, kind: Tensor, negative: Tensor) -> Tensor:
        changed = image.clone()
        for number, operation in enumerate(OPERATIONS.values()):
            level = float(operation.levels(*image.shape[2:])[self.magnitude])
            chosen = kind == number
            signs = ((-1.0, chosen & negative), (1.0, chosen & ~negative)) if operation.signed else ((1.0, chosen),)
            for sign, rows in signs:
                row = rows.nonzero().squeeze(1)
                if len(row):
                    changed[row] = operation.change(image[row], sign * level)
        return changed
