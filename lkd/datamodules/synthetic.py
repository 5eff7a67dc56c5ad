"""Synthetic images, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from lkd.datamodules.base import ImageDataModule, Split


class SyntheticDataModule(ImageDataModule):
    """Synthetic images: a smooth pattern per class plus noise. They are the same in every run and easy to learn.

    Args:
        num_classes: Number of classes.
        input_shape: Channels, height and width.
        train_size: Number of training images, including those for validation.
        test_size: Number of test images.
        kwargs: Arguments of `ImageDataModule`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        train_size: int = 1000,
        test_size: int = 200,
        **kwargs: Any,
    ) -> None:
        self.num_classes = num_classes
        self.input_shape = input_shape
        self.mean, self.std = (0.5,) * input_shape[0], (0.25,) * input_shape[0]
        super().__init__(**kwargs)
        self.train_size = train_size
        self.test_size = test_size

    def make_dataset(self, split: Split) -> TensorDataset | None:
        """Generate the images of a split; see `ImageDataModule.make_dataset`."""
        if split == "val":
            return None
        size = self.train_size if split == "train" else self.test_size
        channels, height, width = self.input_shape
        coarse = torch.rand(self.num_classes, channels, 4, 4, generator=torch.Generator().manual_seed(0))
        smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        pattern = (smooth * 192).to(torch.uint8)
        generator = torch.Generator().manual_seed(1 if split == "train" else 2)
        noise = torch.randint(64, (size, *self.input_shape), dtype=torch.uint8, generator=generator)
        target = torch.arange(size) % self.num_classes
        return TensorDataset(noise.add_(pattern[target]), target)
