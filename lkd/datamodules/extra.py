"""Training images that are not the data set's own."""

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
    """Training images from elsewhere, which are augmented and normalised as the data set's own."""

    @abstractmethod
    def images(
        self, shape: tuple[int, int, int], num_classes: int, normalization: Normalization, device: torch.device
    ) -> ImageSource:
        """Finds or makes them.

        Args:
            shape: Channels, height and width of an image, if that matters: others are brought to it.
            num_classes: Number of classes of the data.
            normalization: How the data's images are normalised.
            device: Where to compute, if anything.

        Returns:
            A data set of (image, class), see `ImageSource`; the class is `IGNORE_INDEX` where there is none.
        """


@dataclass(frozen=True)
class UnlabelledFolder(ExtraImages):
    """All images in a folder, at any depth, without a label: folders in it are no classes.

    So it may be another data set's, whose images have the teacher's answers for labels: a transfer set.

    Args:
        root: The folder.

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531), section 2.
    """

    root: str

    def images(
        self, shape: tuple[int, int, int], num_classes: int, normalization: Normalization, device: torch.device
    ) -> ImageFiles:
        """See `ExtraImages.images`."""
        return read_all(Path(self.root).expanduser())
