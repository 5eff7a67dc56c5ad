"""Training images that are not part of the dataset."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lkd.datamodules.files import ImageFiles, read_all
from lkd.types import Normalization

if TYPE_CHECKING:
    from lkd.datamodules.sources import ImageSource


class ExtraImages(ABC):
    """Source of additional training images, which are augmented and normalized like those of the dataset."""

    @abstractmethod
    def images(
        self, shape: tuple[int, int, int], num_classes: int, normalization: Normalization, device: torch.device
    ) -> ImageSource:
        """Find or create the images.

        Args:
            shape: Channels, height and width for images that are created; others are resized to it.
            num_classes: Number of classes of the dataset.
            normalization: Normalization of the dataset's images.
            device: Device for computations, if any.

        Returns:
            Dataset of (image, class), see `ImageSource`; the class of an image without a label is `IGNORE_INDEX`.
        """


@dataclass(frozen=True)
class UnlabelledFolder(ExtraImages):
    """All images of a folder, at any depth, without labels. Subfolders are not classes.

    The images may belong to another dataset. They form a transfer set, for which the teacher's logits are the only
    targets.

    Args:
        root: Folder of the images.

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531), section 2.
    """

    root: str

    def images(
        self, shape: tuple[int, int, int], num_classes: int, normalization: Normalization, device: torch.device
    ) -> ImageFiles:
        """Find the images; see `ExtraImages.images`."""
        return read_all(Path(self.root).expanduser())
