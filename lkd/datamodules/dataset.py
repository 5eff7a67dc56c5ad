"""From stored images to a `Batch`: read, augment and normalize a whole batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms.v2 import functional as TF

from lkd.datamodules.batches import joined, without_labels
from lkd.datamodules.classes import ClassIndex
from lkd.datamodules.draws import IMAGE, VIEW, Draws, successive, uniform
from lkd.datamodules.files import ImageBytes, ImageFiles, is_plain
from lkd.datamodules.sampler import read_keys
from lkd.datamodules.sources import ImageSource, Resident, eight_bit, located, original, parts, source_fingerprint
from lkd.datamodules.transforms.base import Augmentation, BatchTransform, CenterCrop, ImageTransform, divide
from lkd.datamodules.transforms.mixing import Mix
from lkd.datamodules.transforms.views import View, Views
from lkd.io.refused import said, shown
from lkd.io.tensor_cache import fingerprint
from lkd.types import Batch, Normalization

_TRIES = 10
_MODES = {1: "L", 3: "RGB"}


class ImageError(ValueError):
    """Raised if an image cannot be read.

    A DataLoader worker re-raises this exception with its whole traceback as the message; only the original message is
    kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f"{__name__}.ImageError: ", 1)[-1].strip())


class ImageDataset(Dataset[Batch]):
    """Dataset that prepares images of a source for a network. Indexing with the keys of a batch returns a `Batch`.

    An image is a pure function of (seed, epoch, index in the source). The part that `view` computes runs on any device.

    Args:
        source: Source of the images.
        target: Class of every image of the source `(N,)`, int64.
        index: Positions in the source of the images of this dataset `(M,)`, int64.
        shape: Channels, height and width of the returned images.
        normalization: Normalization of the images.
        resize: Transform of an image to the shape.
        augment: Transforms of a batch of uint8 images.
        seed: Seed of the augmentation.
        views: Creates several views of each image; `None` for a single one.
        mix: Mixes each image with another one; `None` for no mixing.

    Attributes:
        number: Number of the view that this dataset creates; each view has its own random numbers.
        replay: Number of augmented variants of each image: epoch `e` uses variant `e % replay`. `None` for a new one in
            every epoch.

    Raises:
        ValueError: If `shape` has a number of channels other than 1 or 3 and the images are not in memory, or if the
            views require images of another shape.
    """

    extra_channels: ClassVar[int] = 0
    """Number of channels of the stored images that are not passed to the network, such as a mask."""

    def __init__(
        self,
        source: ImageSource,
        target: Tensor,
        index: Tensor,
        shape: tuple[int, int, int],
        normalization: Normalization,
        resize: ImageTransform,
        augment: Sequence[BatchTransform] = (),
        seed: int = 0,
        views: Views | None = None,
        mix: Mix | None = None,
    ) -> None:
        self.source, self.target, self.index = source, target, index
        self.shape, self.normalization = shape, normalization
        self.resize, self.augment, self.seed = resize, tuple(augment), seed
        self.views, self.mix, self.number = views, mix, 0
        self.replay: int | None = None
        self._draws, self._classes = Draws(len(target)), ClassIndex(target, index)
        # Tensors, because a GPU would replace a division by a scalar with a multiplication by its reciprocal.
        levels = ((255.0,), normalization.mean, normalization.std)
        self._levels = tuple(torch.tensor(level).view(-1, 1, 1) for level in levels)
        if self.stored is None and shape[0] - self.extra_channels not in _MODES:
            raise ValueError(f"images that are not in memory must have 1 or 3 channels, got shape {shape}")
        if views is not None:
            views.check(shape)

    @property
    def stored(self) -> Tensor | None:
        """All images of the source `(N, C, H, W)`, uint8, if they are in memory and require no resizing."""
        if isinstance(self.source, Resident):
            return self.source.image
        if not (isinstance(self.source, TensorDataset) and isinstance(self.resize, CenterCrop)):
            return None
        image: Tensor = self.source.tensors[0]
        return image if tuple(image.shape[1:]) == self.shape else None

    @property
    def _mode(self) -> str:
        return _MODES[self.shape[0] - self.extra_channels]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[int]) -> Batch:
        """Return the samples of some keys; see `Key`."""
        epoch, position, padding = read_keys(keys)
        if (epoch == epoch[0]).all():
            return without_labels(self.take(int(epoch[0]), position), padding.bool())
        version = epoch if self.replay is None else epoch % self.replay
        batch = self.make(version.to(self.index.device), self.index[position.to(self.index.device)])
        return without_labels(batch, padding.bool())

    def take(self, epoch: int, position: Tensor) -> Batch:
        """Return samples of one epoch.

        Args:
            epoch: Number of the epoch.
            position: Positions in this dataset `(B,)`, int64.
        """
        index = self.index.index_select(0, position.to(self.index.device, non_blocking=True))
        number = self.version_in(epoch)
        version = torch.full_like(index, number)
        self._draws.announce(version, number)
        return self.make(version, index)

    def version_in(self, epoch: int) -> int:
        """Return the number of the augmented variant that an epoch uses.

        Args:
            epoch: Number of the epoch.
        """
        return epoch if self.replay is None else epoch % self.replay

    def draw_for(self, version: Tensor, number: int) -> None:
        """Compute the random numbers of one variant for all images, in place, for a graph that reads them.

        Args:
            version: The tensor object that is passed to `make`; all its values are `number`.
            number: Number of the variant.
        """
        self._draws.announce(version, number)
        self._draws.refill(self.seed, number, self.index.device)

    def make(self, version: Tensor, index: Tensor) -> Batch:
        """Create a batch of images with all their views.

        Args:
            version: Number of each image's augmented variant `(B,)`, int64.
            index: Positions in the source `(B,)`, int64.
        """
        if self.views is None:
            return self.batch(version, index)
        return joined(self._view_batches(self.views.plan(self.seed, version, index, self._classes), version))

    def _view_batches(self, views: Sequence[View], version: Tensor) -> list[Batch]:
        """Create one batch per view; views of the same augmented images share it."""
        made: list[tuple[View, Batch]] = []
        for view in views:
            batch = next((batch for other, batch in made if view.shares_images(other)), None)
            if batch is None:
                augment = view.augment if view.augment is not None else (*self.augment, *view.then)
                own = self if view.number == 0 else self.variant(view.number, augment)
                batch = (own.batch if view.is_mixed else own.unmixed)(version, view.index)
            made.append((view, batch))
        return [view.finish(batch) for view, batch in made]

    def made_from(self) -> dict[str, str]:
        """Return everything that determines the images of this dataset, as a mapping from name to text."""
        return {
            "images": source_fingerprint(self.source),
            "choice of images": fingerprint(self.index, None if self.views is None else self.target),
            "augmentation": repr(
                (self.shape, self.normalization, self.resize, self.augment, self.mix, self.views, self.number)
            ),
            "seed": str(self.seed),
        }

    def contents(self) -> str | None:
        """Return a hash of the images and their classes that is independent of their location; `None` if it is unknown.

        Images in memory are hashed with their pixels (0.7 s per GB); files that are read one by one are identified by
        their names and sizes (6 us each), so a file in which only pixels changed is not detected.
        """
        sources: list[object] = []
        for part in parts(self.source):
            if isinstance(part, TensorDataset):
                sources += part.tensors
            elif is_plain(part):
                sources.append(part.contents())
            else:
                return None
        return fingerprint(*sources, self.index, self.target)

    def batch(self, epoch: Tensor, index: Tensor) -> Batch:
        """Read, augment, normalize and mix images: one view.

        Args:
            epoch: Epoch of each image `(B,)`, int64.
            index: Positions in the source `(B,)`, int64.
        """
        batch = self.unmixed(epoch, index)
        if self.mix is None:
            return batch
        plan = self.mix.plan(self.seed, epoch, index, self.index, self.number * VIEW)
        partner = self.unmixed(epoch[plan.row], plan.partner) if len(plan.row) else batch
        return self.mix.apply(plan, batch, partner)

    def unmixed(self, epoch: Tensor, index: Tensor) -> Batch:
        """Read, augment and normalize images without mixing them.

        Args:
            epoch: Epoch of each image `(B,)`, int64.
            index: Positions in the source `(B,)`, int64.
        """
        image = self.view(self.images(epoch, index), epoch, index)
        return Batch(image, self.target[index], index, version=epoch)

    def variant(self, number: int, augment: Augmentation | None = None) -> ImageDataset:
        """Return a dataset with another view of the same images.

        The view has its own random numbers and optionally another augmentation.

        Args:
            number: Number of the view; 0 is that of this dataset.
            augment: Transforms of the view. Without an `ImageTransform`, images are resized as in this dataset.
        """
        other = copy(self)
        other.views, other.number = None, number
        if augment is not None:
            first, other.augment = divide(augment)
            if first is not None:
                other.resize = first
                other.source = original(self.source)
        return other

    def to(self, device: torch.device, source: ImageSource | None = None) -> ImageDataset:
        """Return a copy of this dataset on a device, where its batches are then created.

        Args:
            device: The device.
            source: Images and classes of the source that are already on the device; by default they are copied.

        Raises:
            ValueError: If the images are not `stored`.
        """
        image = self.stored
        if image is None:
            raise ValueError(
                f"cannot move images to {device}, as they are read one by one; let workers load them instead"
            )
        other = copy(self)
        if source is None:
            source = Resident(image.to(device), self.target.to(device), original(self.source))
        other.source = source
        other.target, other.index = self.target.to(device), self.index.to(device)
        other._draws, other._levels = Draws(len(self.target)), tuple(level.to(device) for level in self._levels)
        other._classes = ClassIndex(other.target, other.index)
        return other

    def images(self, epoch: Tensor, index: Tensor) -> Tensor:
        """Read images.

        Args:
            epoch: Epoch of each image `(B,)`, int64.
            index: Positions in the source `(B,)`, int64.

        Returns:
            Images `(B, C, H, W)`, uint8.
        """
        if self.stored is not None:
            return self.stored.index_select(0, index)
        tries = IMAGE + self.number * VIEW + torch.arange(_TRIES, device=index.device)
        draws = uniform(self.seed, epoch[:, None], index[:, None], tries).cpu()
        return torch.stack([self.read(i, d) for i, d in zip(index.tolist(), draws, strict=True)]).to(index.device)

    def read(self, index: int, draws: Tensor) -> Tensor:
        """Read one image `(C, H, W)`, uint8, from its file.

        Args:
            index: Position in the source.
            draws: Random numbers of `resize`.

        Raises:
            ImageError: If it cannot be read.
        """
        return self.read_image(index, draws)[0]

    def read_image(self, index: int, draws: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Read one image without its extra channels, and return it with its full height and width; see `read`."""
        try:
            image, full = self._decode(index, draws)
            image = self.resize.reduced(image, full, self.shape[1:], draws)
        except Exception as error:  # decoders raise almost any exception for corrupt files
            source, index = located(self.source, index)
            name = shown(source.path(index)) if isinstance(source, ImageFiles | ImageBytes) else f"number {index}"
            raise ImageError(f"image {name} cannot be read ({reason(error)}); replace or remove it") from error
        tensor: Tensor = TF.pil_to_tensor(image)
        return tensor, full

    def _decode(self, index: int, draws: Tensor) -> tuple[Image.Image, tuple[int, int]]:
        """Return an image and its full size. Large JPEG files are decoded no larger than `resize` requires."""
        mode = self._mode
        source, index = located(self.source, index)
        # Custom sources may need the full-size image.
        if is_plain(source) or type(source) is ImageBytes:
            with source.open(index) as opened:
                full = opened.height, opened.width
                height, width = self.resize.least(full, self.shape[1:], draws)
                opened.draft(None, (width, height))
                return eight_bit(opened).convert(mode), full
        image = eight_bit(source[index][0]).convert(mode)
        return image, (image.height, image.width)

    def flaw(self, index: int) -> str:
        """Return the reason why an image cannot be read; empty if it can be read. The image is decoded at full size.

        Args:
            index: Position of the image in the source.
        """
        try:
            image = eight_bit(self.source[index][0]).convert(self._mode)
            self.resize(image, self.shape[1:], torch.zeros(_TRIES, 4))
        except Exception as error:
            return reason(error)
        return ""

    def view(self, image: Tensor, epoch: Tensor, index: Tensor) -> Tensor:
        """Augment and normalize images, on their device.

        Args:
            image: Images `(B, C, H, W)`, uint8.
            epoch: Epoch of each image `(B,)`, int64.
            index: Positions in the source `(B,)`, int64.

        Returns:
            Images `(B, C, H, W)`, float32.
        """
        return self.normalized(self.augmented(image, epoch, index))

    def augmented(self, image: Tensor, epoch: Tensor, index: Tensor) -> Tensor:
        """Augment images, on their device.

        Args:
            image: Images `(B, C, H, W)`, uint8.
            epoch: Epoch of each image `(B,)`, int64.
            index: Positions in the source `(B,)`, int64.

        Returns:
            Images `(B, C, H, W)`, uint8.
        """
        if self.augment:
            lengths = [transform.num_draws for transform in self.augment]
            drawn = successive if self.stored is None else self._draws
            draws = drawn(self.seed, epoch, index, self.number * VIEW, sum(lengths) // 4)
            for transform, own in zip(self.augment, draws.split(lengths, 1), strict=True):  # type: ignore[no-untyped-call]
                image = self.transformed(image, transform, own)
        return image

    def transformed(self, image: Tensor, transform: BatchTransform, draws: Tensor) -> Tensor:
        """Apply one transform of the augmentation.

        Args:
            image: Images `(B, C, H, W)`, uint8.
            transform: The transform.
            draws: Random numbers of each image `(B, num_draws)`.
        """
        return transform(image, draws)

    def normalized(self, image: Tensor) -> Tensor:
        """Normalize images `(B, C, H, W)`, uint8; returns float32."""
        # Three correctly rounded operations give the same bits on every device.
        level, mean, std = (level.to(image.device) for level in self._levels)
        return image.to(torch.float32).div_(level).sub_(mean).div_(std)


def reason(error: Exception) -> str:
    """Describe an error in one line."""
    return f"{type(error).__name__}: {said(error)}"
