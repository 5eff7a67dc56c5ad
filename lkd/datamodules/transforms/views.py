"""Several views of each training image, for methods that compare them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lkd.datamodules.classes import ClassIndex
from lkd.datamodules.draws import PARTNER, uniform
from lkd.datamodules.transforms.base import BatchTransform, ImageTransform, divide
from lkd.datamodules.transforms.randaugment import RandAugment
from lkd.types import IGNORE_INDEX, Batch


@dataclass(frozen=True, eq=False)
class View:
    """Specification of one view of the images of a batch, from which the dataset creates it.

    Args:
        index: Positions of the images in the source `(B,)`, int64.
        number: Number of the augmentation; 0 is the one without `Views`, and each has its own random numbers.
        augment: Transforms of this view; `None`: those of the dataset, then `then`. Ignored for number 0.
        then: Transforms after those of the dataset.
        turns: Number of counterclockwise rotations by 90 degrees.
        is_labelled: Whether the view is classified; the targets of others are `IGNORE_INDEX`.
        is_mixed: Whether the dataset's `mix`, if any, applies to the view.
    """

    index: Tensor
    number: int = 0
    augment: Sequence[ImageTransform | BatchTransform] | None = None
    then: Sequence[BatchTransform] = ()
    turns: int = 0
    is_labelled: bool = True
    is_mixed: bool = True

    def shares_images(self, other: View) -> bool:
        """Return whether two views show the same augmented images."""
        return (
            self.index is other.index
            and self.number == other.number
            and self.augment is other.augment
            and self.then is other.then
            and self.is_mixed == other.is_mixed
        )

    def finish(self, batch: Batch) -> Batch:
        """Rotate augmented images and remove labels.

        Args:
            batch: The augmented images.
        """
        if self.turns:
            batch = batch._replace(input=batch.input.rot90(self.turns, (2, 3)))
        return batch if self.is_labelled else batch._replace(target=torch.full_like(batch.target, IGNORE_INDEX))


class Views(ABC):
    """Plan of the views of training images. A batch has all first views, then all second views, ...: `Batch.views`.

    Like an image, its views are a pure function of (seed, epoch, index of the image).
    """

    @abstractmethod
    def plan(self, seed: int, epoch: Tensor, index: Tensor, classes: ClassIndex) -> list[View]:
        """Specify the views of some images.

        Args:
            seed: Seed of the augmentation.
            epoch: Epoch of each image `(B,)`, int64.
            index: Positions in the source `(B,)`, int64.
            classes: Finds other images of the same class.
        """

    def check(self, shape: tuple[int, int, int]) -> None:  # noqa: B027  # most views support any shape
        """Check that the views support images of a given shape.

        Args:
            shape: Channels, height and width.

        Raises:
            ValueError: If they do not.
        """


@dataclass(frozen=True)
class StrongView(Views):
    """Two views of each image: one augmented as usual, one more strongly. Both have the label.

    Args:
        augment: Transforms of the second view; by default those of the first, then RandAugment. Image files are read
            once per view, so each view has its own RandomResizedCrop.
    """

    augment: list[ImageTransform | BatchTransform] | None = None

    def __post_init__(self) -> None:
        divide(self.augment or ())

    def plan(self, seed: int, epoch: Tensor, index: Tensor, classes: ClassIndex) -> list[View]:
        """Return the usual view and the strongly augmented one."""
        return [View(index), View(index, 1, self.augment, (RandAugment(),))]


@dataclass(frozen=True)
class RotatedViews(Views):
    """Four views of each augmented image: rotated by 0, 90, 180 and 270 degrees.

    The rotated views have no label and are not classified. Images must be square.
    """

    def plan(self, seed: int, epoch: Tensor, index: Tensor, classes: ClassIndex) -> list[View]:
        """Return the image and its counterclockwise rotations by 90, 180 and 270 degrees."""
        return [View(index, turns=turns, is_labelled=turns == 0) for turns in range(4)]

    def check(self, shape: tuple[int, int, int]) -> None:
        """Check that images are square.

        Raises:
            ValueError: If they are not.
        """
        _, height, width = shape
        if height != width:
            raise ValueError(
                f"RotatedViews rotates images by 90 degrees, so they must be square, got {height}x{width}; resize them "
                "to a square"
            )


@dataclass(frozen=True)
class ClassPartner(Views):
    """Two views: the image, and another training image of the same class, drawn again in each epoch.

    The partner has its own index and no label, so it is not classified. An image without a label, or the only one of
    its class, is its own partner under another augmentation.
    """

    def plan(self, seed: int, epoch: Tensor, index: Tensor, classes: ClassIndex) -> list[View]:
        """Return the image and its partner."""
        draw = uniform(seed, epoch, index, PARTNER)[:, 0]
        return [View(index), View(classes.another(index, draw), 1, is_labelled=False)]
