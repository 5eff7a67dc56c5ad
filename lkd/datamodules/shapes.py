"""Generated images of shapes with masks, for tests and demonstrations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lkd.datamodules.base import Split
from lkd.datamodules.mask_files import IGNORED
from lkd.datamodules.segmentation import SegmentationDataModule

_SHAPES = 3
"""Number of shapes in an image; later ones cover earlier ones."""


class SyntheticSegmentationDataModule(SegmentationDataModule):
    """Images of discs, squares, diamonds and crosses on a noisy background. They are the same in every run.

    Colors, sizes and positions are random, so that only the shape determines the class. The outline of each shape, one
    pixel wide, is ignored.

    Args:
        size: Height and width of the images.
        train_size: Number of training images, including those for validation.
        test_size: Number of test images.
        kwargs: Arguments of `SegmentationDataModule`.
    """

    class_names = ("background", "disc", "square", "diamond", "cross")

    def __init__(self, size: int = 32, train_size: int = 2000, test_size: int = 400, **kwargs: Any) -> None:
        self.num_classes, self.input_shape = len(self.class_names), (3, size, size)
        self.mean, self.std = (0.5,) * 3, (0.25,) * 3
        super().__init__(**kwargs)
        self.train_size, self.test_size = train_size, test_size

    def make_masks(self, split: Split) -> tuple[Tensor, Tensor] | None:
        """Generate the images and masks of a split."""
        if split == "val":
            return None
        generator = torch.Generator().manual_seed(1 if split == "train" else 2)
        number = self.train_size if split == "train" else self.test_size
        side = self.input_shape[1]
        image = 255 * torch.rand(number, 3, 1, 1, generator=generator).expand(-1, -1, side, side).clone()
        mask = torch.zeros(number, side, side, dtype=torch.uint8)
        for _ in range(_SHAPES):
            kind = torch.randint(1, self.num_classes, (number, 1, 1), generator=generator)
            radius = side * (0.12 + 0.14 * torch.rand(number, 1, 1, generator=generator))
            x, y = (_distance(side, number, generator) for _ in range(2))
            color = 255 * torch.rand(number, 3, 1, 1, generator=generator)
            outside = distance_outside(kind, x, y, radius)
            inside = outside <= 0
            image = torch.where(inside[:, None], color, image)
            mask = torch.where(inside, kind.to(torch.uint8), mask)
            mask = torch.where(outside.abs() < 0.5, IGNORED, mask)
        image += 24 * torch.randn(image.shape, generator=generator)
        return image.round().clamp(0, 255).to(torch.uint8), mask


def _distance(side: int, number: int, generator: torch.Generator) -> Tensor:
    """Return the distances `(N, 1, side)` of each column to a random center."""
    center = side * (0.15 + 0.7 * torch.rand(number, 1, 1, generator=generator))
    return (torch.arange(side) - center).abs()


def distance_outside(kind: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Return how far each pixel `(N, H, W)` lies outside the shape in its image; negative inside.

    Args:
        kind: 1 for a disc, 2 for a square, 3 for a diamond, 4 for a cross `(N, 1, 1)`.
        x: Distances of the columns from the center `(N, 1, W)`.
        y: Distances of the rows from the center `(N, 1, H)`.
        radius: Half the size of the shapes `(N, 1, 1)`.
    """
    y = y.transpose(1, 2)
    forms = (
        (x.square() + y.square()).sqrt() - radius,
        torch.maximum(x, y) - 0.85 * radius,
        x + y - 1.2 * radius,
        torch.maximum(torch.minimum(x, y) - 0.35 * radius, torch.maximum(x, y) - radius),
    )
    return torch.stack(forms).gather(0, (kind - 1).expand_as(forms[0])[None])[0]
