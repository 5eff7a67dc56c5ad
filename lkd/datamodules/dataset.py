"""From stored images to a `Batch`: reading, augmenting and normalising, a whole batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms.v2 import functional as TF

from lkd.datamodules.classes import ClassIndex
from lkd.datamodules.draws import IMAGE, VIEW, Draws, successive, uniform
from lkd.datamodules.files import ImageBytes, ImageFiles
from lkd.datamodules.sampler import read_keys
from lkd.datamodules.sources import ImageSource, Resident, located, original, parts, source_fingerprint
from lkd.datamodules.transforms.base import Augmentation, BatchTransform, CenterCrop, ImageTransform, divide
from lkd.datamodules.transforms.mixing import Mix
from lkd.datamodules.transforms.views import View, Views
from lkd.io.refused import said, shown
from lkd.io.tensor_cache import fingerprint
from lkd.types import IGNORE_INDEX, Batch, Mixed, Normalization

_TRIES = 10
_MODES = {1: "L", 3: "RGB"}


class ImageError(ValueError):
    """An image that cannot be read.

    A DataLoader's worker hands on its whole traceback as the message of a new exception of this class; only
    the sentence at its end is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f"{__name__}.ImageError: ", 1)[-1].strip())


class ImageDataset(Dataset[Batch]):
    """Some images of a source, ready for a network. Asked for the keys of a batch, it returns the `Batch`.

    An image is a pure function of (seed, epoch, index in the source); `view` is the part of it that runs on
    any device.

    Args:
        source: Where images come from.
        target: Class of every image of the source `(N,)`, int64.
        index: Positions in the source that this data set has `(M,)`, int64.
        shape: Channels, height and width to return.
        normalization: How to normalise.
        resize: Brings an image to the shape.
        augment: Changes a batch of uint8 images.
        seed: Seed of the augmentation.
        views: Makes several views of each image; None: there is one.
        mix: Mixes each image with another one; None: none is.

    Attributes:
        number: Which view of its images this is; each has its own draws.
        replay: How many augmented versions each image has: epoch `e` shows version `e mod replay`. None: a new one in
            every epoch.

    Raises:
        ValueError: If images that have to be read one by one shall have other than 1 or 3 channels, or the views need
            images of another shape.
    """

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
        # As tensors, so that a GPU divides, instead of multiplying by the reciprocal of a scalar.
        levels = ((255.0,), normalization.mean, normalization.std)
        self._levels = tuple(torch.tensor(level).view(-1, 1, 1) for level in levels)
        if self.stored is None and shape[0] not in _MODES:
            raise ValueError(f"images that are not in memory have 1 or 3 channels, got the shape {shape}")
        if views is not None:
            views.check(shape)

    @property
    def stored(self) -> Tensor | None:
        """All images of the source `(N, C, H, W)`, uint8, if they lie in memory and need no resizing."""
        if isinstance(self.source, Resident):
            return self.source.image
        if not (isinstance(self.source, TensorDataset) and isinstance(self.resize, CenterCrop)):
            return None
        image: Tensor = self.source.tensors[0]
        return image if tuple(image.shape[1:]) == self.shape else None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[int]) -> Batch:
        """Returns the samples of the keys; see `Key`."""
        epoch, position, padding = read_keys(keys)
        if (epoch == epoch[0]).all():
            return without_labels(self.take(int(epoch[0]), position), padding.bool())
        version = epoch if self.replay is None else epoch % self.replay
        batch = self.make(version.to(self.index.device), self.index[position.to(self.index.device)])
        return without_labels(batch, padding.bool())

    def take(self, epoch: int, position: Tensor) -> Batch:
        """Samples of one epoch.

        Args:
            epoch: Its number.
            position: Positions in this data set `(B,)`, int64.
        """
        index = self.index.index_select(0, position.to(self.index.device, non_blocking=True))
        number = self.version_in(epoch)
        version = torch.full_like(index, number)
        self._draws.announce(version, number)
        return self.make(version, index)

    def version_in(self, epoch: int) -> int:
        """Which augmented version of the images an epoch shows.

        Args:
            epoch: Its number.
        """
        return epoch if self.replay is None else epoch % self.replay

    def draw_for(self, version: Tensor, number: int) -> None:
        """Make the draws of one version for all images, in place, for a graph that reads them.

        Args:
            version: The tensor that `make` gets, itself.
            number: Its one value.
        """
        self._draws.announce(version, number)
        self._draws.refill(self.seed, number, self.index.device)

    def make(self, version: Tensor, index: Tensor) -> Batch:
        """Some images with all their views.

        Args:
            version: Which of its augmented versions each is `(B,)`, int64.
            index: Positions in the source `(B,)`, int64.
        """
        if self.views is None:
            return self.batch(version, index)
        return _joined(self._view_batches(self.views.plan(self.seed, version, index, self._classes), version))

    def _view_batches(self, views: Sequence[View], version: Tensor) -> list[Batch]:
        """Make one batch per view; views of the same augmented images share it."""
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
        """Name to a text for everything that decides the images that this data set makes."""
        return {
            "images": source_fingerprint(self.source),
            "choice of images": fingerprint(self.index, None if self.views is None else self.target),
            "augmentation": repr(
                (self.shape, self.normalization, self.resize, self.augment, self.mix, self.views, self.number)
            ),
            "seed": str(self.seed),
        }

    def contents(self) -> str | None:
        """A name for these images and their classes, the same wherever they lie; None if nothing tells which they are.

        In memory they count with their pixels (0.7 s per GB); files that are read one by one with their names and sizes
        (6 us each): a file in which only pixels have changed is not noticed.
        """
        sources: list[object] = []
        for part in parts(self.source):
            if isinstance(part, TensorDataset):
                sources += part.tensors
            elif type(part) is ImageFiles:
                sources.append(part.contents())
            else:
                return None
        return fingerprint(*sources, self.index, self.target)

    def batch(self, epoch: Tensor, index: Tensor) -> Batch:
        """Reads, augments, normalises and mixes images: one view.

        Args:
            epoch: `(B,)`, int64.
            index: Positions in the source `(B,)`, int64.
        """
        batch = self.unmixed(epoch, index)
        if self.mix is None:
            return batch
        plan = self.mix.plan(self.seed, epoch, index, self.index, self.number * VIEW)
        partner = self.unmixed(epoch[plan.row], plan.partner) if len(plan.row) else batch
        return self.mix.apply(plan, batch, partner)

    def unmixed(self, epoch: Tensor, index: Tensor) -> Batch:
        """The same, before any is mixed with another.

        Args:
            epoch: `(B,)`, int64.
            index: Positions in the source `(B,)`, int64.
        """
        image = self.view(self.images(epoch, index), epoch, index)
        return Batch(image, self.target[index], index, version=epoch)

    def variant(self, number: int, augment: Augmentation | None = None) -> ImageDataset:
        """The same images in another view: by other draws and, if told so, augmented otherwise.

        Args:
            number: The view's number; 0 is this one.
            augment: What is done to the images; without an `ImageTransform` they are brought to size as here.
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
        """The same images on a device, where batches are then made; this data set stays where it is.

        Args:
            device: Where to.
            source: The source's images and classes that are there already; by default they are copied.

        Raises:
            ValueError: If the images are not `stored`.
        """
        image = self.stored
        if image is None:
            raise ValueError(f"images that are read one by one cannot be moved to {device}; leave them to workers")
        other = copy(self)
        if source is None:
            source = Resident(image.to(device), self.target.to(device), original(self.source))
        other.source = source
        other.target, other.index = self.target.to(device), self.index.to(device)
        other._draws, other._levels = Draws(len(self.target)), tuple(level.to(device) for level in self._levels)
        other._classes = ClassIndex(other.target, other.index)
        return other

    def images(self, epoch: Tensor, index: Tensor) -> Tensor:
        """Reads images.

        Args:
            epoch: `(B,)`, int64.
            index: Positions in the source `(B,)`, int64.

        Returns:
            `(B, C, H, W)`, uint8.
        """
        if self.stored is not None:
            return self.stored.index_select(0, index)
        tries = IMAGE + self.number * VIEW + torch.arange(_TRIES, device=index.device)
        draws = uniform(self.seed, epoch[:, None], index[:, None], tries).cpu()
        return torch.stack([self._read(i, d) for i, d in zip(index.tolist(), draws, strict=True)]).to(index.device)

    def _read(self, index: int, draws: Tensor) -> Tensor:
        try:
            image, full = self._decode(index, draws)
            image = self.resize.reduced(image, full, self.shape[1:], draws)
        except Exception as error:  # decoders of broken files raise nearly every kind there is
            source, index = located(self.source, index)
            name = shown(source.path(index)) if isinstance(source, ImageFiles | ImageBytes) else f"number {index}"
            raise ImageError(f"image {name} cannot be read ({_reason(error)}); replace or remove it") from error
        tensor: Tensor = TF.pil_to_tensor(image)
        return tensor

    def _decode(self, index: int, draws: Tensor) -> tuple[Image.Image, tuple[int, int]]:
        """An image, and its full size: large JPEG files are decoded no larger than `resize` needs them."""
        mode = _MODES[self.shape[0]]
        source, index = located(self.source, index)
        # only an image that nobody else has may be decoded smaller
        if type(source) is ImageFiles or type(source) is ImageBytes:
            with source.open(index) as opened:
                full = opened.height, opened.width
                height, width = self.resize.least(full, self.shape[1:], draws)
                opened.draft(None, (width, height))
                return _eight_bit(opened).convert(mode), full
        image = _eight_bit(source[index][0]).convert(mode)
        return image, (image.height, image.width)

    def flaw(self, index: int) -> str:
        """Why an image cannot be read; empty if it can. It is decoded whole, as no draws decide what is wanted of it.

        Args:
            index: Its position in the source.
        """
        try:
            image = _eight_bit(self.source[index][0]).convert(_MODES[self.shape[0]])
            self.resize(image, self.shape[1:], torch.zeros(_TRIES, 4))
        except Exception as error:
            return _reason(error)
        return ""

    def view(self, image: Tensor, epoch: Tensor, index: Tensor) -> Tensor:
        """Augments and normalises images, on the device that they are on.

        Args:
            image: `(B, C, H, W)`, uint8.
            epoch: `(B,)`, int64.
            index: Positions in the source `(B,)`, int64.

        Returns:
            `(B, C, H, W)`, float32.
        """
        if self.augment:
            lengths = [transform.num_draws for transform in self.augment]
            drawn = successive if self.stored is None else self._draws
            draws = drawn(self.seed, epoch, index, self.number * VIEW, sum(lengths) // 4)
            for transform, own in zip(self.augment, draws.split(lengths, 1), strict=True):  # type: ignore[no-untyped-call]
                image = transform(image, own)
        # Three correctly rounded operations: so every device gets the same bits.
        level, mean, std = (level.to(image.device) for level in self._levels)
        return image.to(torch.float32).div_(level).sub_(mean).div_(std)


def _joined(views: Sequence[Batch]) -> Batch:
    parts = [(view.input, view.target, view.index, view.version) for view in views]
    image, target, index, version = (torch.cat(part) for part in zip(*parts, strict=True))
    return Batch(image, target, index, len(views), version, _joined_mixed(views))


def without_labels(batch: Batch, padding: Tensor) -> Batch:
    """The batch with the labels of some samples removed.

    Args:
        batch: A batch.
        padding: Which samples only fill up the batch `(B,)`, bool, on the CPU.
    """
    if not padding.any():  # as in training
        return batch
    unlabelled = padding.to(batch.target.device).repeat(batch.views)
    return batch._replace(target=batch.target.masked_fill(unlabelled, IGNORE_INDEX))


def _joined_mixed(views: Sequence[Batch]) -> Mixed | None:
    if all(view.mixed is None for view in views):
        return None
    parts = [view.mixed or Mixed.none(view.target) for view in views]
    target, weight = (torch.cat(part) for part in zip(*parts, strict=True))
    return Mixed(target, weight)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {said(error)}"


def _eight_bit(image: object) -> Image.Image:
    if isinstance(image, np.ndarray | Tensor) and image.dtype in (np.uint8, torch.uint8):
        image = TF.to_pil_image(image)
    if not isinstance(image, Image.Image):
        kind = getattr(image, "dtype", type(image).__name__)
        raise TypeError(f"expected a PIL image, or a uint8 array or tensor, got {kind}")
    if image.mode.startswith("I;16"):  # PIL's own conversion cuts off what is above 255
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"the range of pixels of mode {image.mode} is not known")
    return image
