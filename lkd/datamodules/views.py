"""Several views of each training image, for methods that compare them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lkd.datamodules.draws import PARTNER, uniform
from lkd.datamodules.randaugment import RandAugment
from lkd.datamodules.transforms import BatchTransform, ImageTransform, divide
from lkd.types import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from lkd.datamodules.dataset import ImageDataset


class Views(ABC):
    """Makes the views of training images. A batch then has all first views, all second views, ...: `Batch.views`.

    Views are a pure function of (seed, epoch, index of the image), as one image is.
    """

    @abstractmethod
    def __call__(self, dataset: ImageDataset, epoch: Tensor, index: Tensor) -> list[Batch]:
        """Makes the views of some images.

        Args:
            dataset: Where the images are: `dataset.batch` makes the view that there is without `Views`, and
                `dataset.variant(1).batch` another one.
            epoch: `(B,)`, int64.
            index: Positions in the source `(B,)`, int64.

        Returns:
            A `Batch` of B images for each view; the target of those that are not to be classified is `IGNORE_INDEX`.
        """

    def check(self, shape: tuple[int, int, int]) -> None:  # noqa: B027  # most take any
        """Refuse images of which it cannot make views.

        Args:
            shape: Channels, height and width.

        Raises:
            ValueError: If it cannot.
        """


@dataclass(frozen=True)
class StrongView(Views):
    """Each image twice: augmented as usual, and once more, more strongly. Both views have the label.

    Args:
        augment: What is done to the second view; by default what is done to the first, and then RandAugment. Images in
            files are read once for each view, so that each has its own RandomResizedCrop.
    """

    augment: list[ImageTransform | BatchTransform] | None = None

    def __post_init__(self) -> None:
        divide(self.augment or ())

    def __call__(self, dataset: ImageDataset, epoch: Tensor, index: Tensor) -> list[Batch]:
        """The image as usual, and augmented strongly."""
        augment = [*dataset.augment, RandAugment()] if self.augment is None else self.augment
        return [dataset.batch(epoch, index), dataset.variant(1, augment).batch(epoch, index)]


@dataclass(frozen=True)
class RotatedViews(Views):
    """Each augmented image four times: as it is, and turned by 90, 180 and 270 degrees.

    The turned ones have no label: they are not to be classified. For square images.
    """

    def __call__(self, dataset: ImageDataset, epoch: Tensor, index: Tensor) -> list[Batch]:
        """The image, and turned against the clock by one, two and three quarters."""
        upright = dataset.batch(epoch, index)
        turned = upright._replace(target=torch.full_like(upright.target, IGNORE_INDEX))
        return [upright, *(turned._replace(input=upright.input.rot90(k, (2, 3))) for k in (1, 2, 3))]

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse images that are not square."""
        _, height, width = shape
        if height != width:
            raise ValueError(
                f"RotatedViews turns images by 90 degrees, so they must be square; these are {height}x{width}: bring "
                "them to a square size"
            )


@dataclass(frozen=True)
class ClassPartner(Views):
    """Each image with another one of the same class, from all training images, chosen anew in each epoch.

    The partner has its own index, and no label: it is not to be classified. An image without a label, or the only one
    of its class, is its own partner, augmented otherwise.
    """

    def __call__(self, dataset: ImageDataset, epoch: Tensor, index: Tensor) -> list[Batch]:
        """The image and its partner."""
        draw = uniform(dataset.seed, epoch, index, PARTNER)[:, 0]
        partner = dataset.variant(1).batch(epoch, dataset.neighbour(index, draw))
        return [dataset.batch(epoch, index), partner._replace(target=torch.full_like(partner.target, IGNORE_INDEX))]
