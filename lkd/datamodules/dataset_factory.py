"""Datasets of image sources: the readable images, decoded once if they fit in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lkd.datamodules.dataset import ImageDataset
from lkd.datamodules.decoding import resident
from lkd.datamodules.files import few, is_plain
from lkd.datamodules.sources import ImageSource
from lkd.datamodules.transforms.base import Augmentation, ImageTransform, divide
from lkd.datamodules.transforms.mixing import Mix
from lkd.datamodules.transforms.views import Views
from lkd.datamodules.unreadable import readable
from lkd.types import IGNORE_INDEX, Normalization


@dataclass(frozen=True)
class DatasetFactory:
    """Create the datasets of a data module.

    Attributes:
        dataset_class: Class of the datasets.
        class_names: Names of the classes.
        input_shape: Shape `(C, H, W)` of randomly cropped images.
        whole_shape: Shape `(C, H, W)` of the other images.
        resize: Deterministic transform of images of a different size to `whole_shape`.
        normalization: Mean and standard deviation of each channel.
        resident_limit: Maximum size in bytes of images held in memory.
        unreadable: What to do with image files that cannot be read.
        decoders: Number of processes that decode images.
    """

    dataset_class: type[ImageDataset]
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    whole_shape: tuple[int, int, int]
    resize: ImageTransform
    normalization: Normalization
    resident_limit: int
    unreadable: Literal["fail", "skip"]
    decoders: int

    def dataset(
        self,
        source: ImageSource,
        target: Tensor,
        chosen: Tensor | None = None,
        augment: Augmentation = (),
        views: Views | None = None,
        mix: Mix | None = None,
    ) -> ImageDataset:
        """Create a dataset.

        Args:
            source: The images.
            target: Their classes `(N,)`, int64.
            chosen: Which images are used `(N,)`, bool; `None` for all.
            augment: Augmentation.
            views: Views of each image in a batch; `None` for a single one.
            mix: Mixing of each image with another one.
        """
        first, changes = divide(augment)
        channels, height, width = self.whole_shape if first is None else self.input_shape
        return self.dataset_class(
            source,
            target,
            torch.arange(len(target)) if chosen is None else chosen.nonzero().squeeze(1),
            (channels + self.dataset_class.extra_channels, height, width),
            self.normalization,
            first or self.resize,
            changes,
            views=views,
            mix=mix,
        )

    def whole(self, split: str, source: ImageSource, target: Tensor) -> ImageDataset:
        """Create the dataset of all readable images of a source, without augmentation.

        Args:
            split: Name of the split, for error messages.
            source: The images.
            target: Their classes `(N,)`.
        """
        usable = self.readable(split, source, target)
        return self.dataset(self.resident(source, target, usable), target, usable)

    def readable(self, split: str, source: ImageSource, target: Tensor) -> Tensor:
        """Find the images that are used, according to `unreadable`.

        Args:
            split: Name of the split, for error messages.
            source: The images.
            target: Their classes `(N,)`.

        Returns:
            Whether each image is used `(N,)`, bool.

        Raises:
            ValueError: If no image of a class can be read.
        """
        if self.unreadable == "fail" or not is_plain(source):
            return torch.ones(len(target), dtype=torch.bool)
        usable = readable(self.dataset(source, target), self.decoders)
        if gone := sorted(set(target.tolist()) - set(target[usable].tolist())):
            names = few(["(none)" if number == IGNORE_INDEX else self.class_names[number] for number in gone])
            raise ValueError(
                f"no {split} image of these classes in {source.folder} can be read: {names}; replace the files"
            )
        return usable

    def resident(self, source: ImageSource, target: Tensor, usable: Tensor) -> ImageSource:
        """Decode the images of a source if this is useful and they fit.

        Args:
            source: The images.
            target: Their classes `(N,)`.
            usable: Which images are needed `(N,)`, bool.

        Returns:
            The decoded images, or the source unchanged.
        """
        dataset = self.dataset(source, target, usable)
        if dataset.stored is not None or len(target) * math.prod(dataset.shape) > self.resident_limit:
            return source
        return resident(dataset, self.decoders)
