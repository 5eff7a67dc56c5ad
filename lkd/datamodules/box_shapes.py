"""Generated images of shapes with boxes, for tests and demonstrations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from lkd.datamodules.base import Split
from lkd.datamodules.boxes import BoxSource
from lkd.datamodules.detection import DetectionDataModule
from lkd.datamodules.shapes import distance_outside

_SHAPES = 3
"""Maximum number of shapes in an image; later ones cover earlier ones."""
_VISIBLE = 16
"""Minimum number of visible pixels of a shape; shapes with fewer have no box."""


class SyntheticDetectionDataModule(DetectionDataModule):
    """Generated images of discs, squares, diamonds and crosses on a noisy background, the same in every run.

    The images have random heights and widths. Each contains up to three shapes of random colors, sizes and positions,
    so that only the shape determines the class. Boxes enclose the visible pixels of a shape.

    Args:
        size: Minimum and maximum height and width of the images.
        train_size: Number of training images, including those for validation.
        test_size: Number of test images.
        kwargs: Arguments of `DetectionDataModule`.

    Raises:
        ValueError: If the minimum size is less than 16 pixels or greater than the maximum.
    """

    class_names = ("background", "disc", "square", "diamond", "cross")

    def __init__(
        self, size: tuple[int, int] = (48, 64), train_size: int = 1000, test_size: int = 200, **kwargs: Any
    ) -> None:
        if not 16 <= size[0] <= size[1]:
            raise ValueError(f"size must be [minimum, maximum] with 16 <= minimum <= maximum, got {list(size)}")
        self.num_classes, self.input_shape = len(self.class_names), (3, size[1], size[1])
        super().__init__(**kwargs)
        self.size, self.train_size, self.test_size = size, train_size, test_size

    def make_boxes(self, split: Split) -> BoxSource | None:
        """Generate the images and boxes of a split."""
        if split == "val":
            return None
        generator = torch.Generator().manual_seed(1 if split == "train" else 2)
        number = self.train_size if split == "train" else self.test_size
        made = [self._image(generator) for _ in range(number)]
        images, boxes, labels = zip(*made, strict=True)
        return BoxSource(list(images), torch.cat(boxes), torch.cat(labels), torch.tensor([len(own) for own in labels]))

    def _image(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return an image `(3, H, W)` with its boxes `(N, 4)` and their classes `(N,)`."""
        height, width = torch.randint(self.size[0], self.size[1] + 1, (2,), generator=generator).tolist()
        number = int(torch.randint(1, _SHAPES + 1, (), generator=generator))
        kind = torch.randint(1, self.num_classes, (number, 1, 1), generator=generator)
        center, color = (torch.rand(number, count, 1, 1, generator=generator) for count in (2, 3))
        radius = min(height, width) * (0.14 + 0.14 * torch.rand(number, 1, 1, generator=generator))
        places = zip((height, width), (0.15 + 0.7 * center).unbind(1), strict=True)
        y, x = ((torch.arange(side) - side * place).abs() for side, place in places)
        inside = distance_outside(kind, x, y, radius) <= 0
        covered = inside.flip(0).cumsum(0).flip(0) > inside.long()  # by a later shape
        visible = inside & ~covered
        noise = 0.1 * torch.randn(3, height, width, generator=generator)
        background = torch.rand(3, 1, 1, generator=generator).expand(3, height, width)
        image = torch.where(inside.any(0), (visible[:, None] * color).sum(0), background) + noise
        kept = visible.sum((1, 2)) >= _VISIBLE
        boxes = masks_to_boxes(visible[kept]) + torch.tensor([0.0, 0.0, 1.0, 1.0])  # a box includes its last pixel
        return (255 * image).round().clamp(0, 255).to(torch.uint8), boxes, kind.flatten()[kept]
