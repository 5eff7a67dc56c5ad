"""From stored images to a `Batch`: reading, augmenting and normalising, a whole batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms.v2 import functional as TF

from lkd.datamodules.draws import IMAGE, uniform
from lkd.datamodules.files import ImageFiles
from lkd.datamodules.sampler import Key
from lkd.datamodules.transforms import BatchTransform, CenterCrop, ImageTransform
from lkd.types import IGNORE_INDEX, Batch, Normalization

_TRIES = 10
_MODES = {1: "L", 3: "RGB"}


class ImageSource(Protocol):
    """Any map-style data set of (image, class): the image a PIL image, or a uint8 array or tensor.

    One in memory is best given as `TensorDataset(images, classes)` with images `(N, C, H, W)`, uint8: a batch
    is then taken out in one go.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


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

    Attributes:
        stored: All images of the source `(N, C, H, W)`, uint8, if they lie in memory and need no resizing.

    Raises:
        ValueError: If images that have to be read one by one shall have other than 1 or 3 channels.
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
    ) -> None:
        self.source, self.target, self.index = source, target, index
        self.shape, self.normalization = shape, normalization
        self.resize, self.augment, self.seed = resize, tuple(augment), seed
        self.stored: Tensor | None = None
        if isinstance(source, TensorDataset) and isinstance(resize, CenterCrop):
            image = source.tensors[0]
            self.stored = image if tuple(image.shape[1:]) == shape else None
        if self.stored is None and shape[0] not in _MODES:
            raise ValueError(f"images that are not in memory have 1 or 3 channels, got the shape {shape}")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Key | int) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key | int]) -> Batch:
        """Returns the samples of the keys; a plain position means epoch 0."""
        full = [key if isinstance(key, Key) else Key(0, key) for key in keys]
        epoch, position, padding = torch.tensor(full, dtype=torch.int64).unbind(1)
        index = self.index[position]
        image = self.view(self.images(epoch, index), epoch, index)
        return Batch(image, self.target[index].masked_fill(padding.bool(), IGNORE_INDEX), index)

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
        tries = torch.arange(IMAGE, IMAGE + _TRIES)
        draws = uniform(self.seed, epoch[:, None], index[:, None], tries)
        return torch.stack([self._read(i, d) for i, d in zip(index.tolist(), draws, strict=True)])

    def _read(self, index: int, draws: Tensor) -> Tensor:
        try:
            image = self.source[index][0]
            image = _eight_bit(image).convert(_MODES[self.shape[0]])
        except Exception as error:  # decoders of broken files raise nearly every kind there is
            source = self.source
            name = str(source.path(index)) if isinstance(source, ImageFiles) else f"number {index}"
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ImageError(f"image {name} cannot be read ({reason}); replace or remove it") from error
        tensor: Tensor = TF.pil_to_tensor(self.resize(image, self.shape[1:], draws))
        return tensor

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
            streams = torch.arange(len(self.augment), device=image.device)[:, None]
            for transform, draws in zip(self.augment, uniform(self.seed, epoch, index, streams), strict=True):
                image = transform(image, draws)
        # Three correctly rounded operations, with tensors on the device: a GPU would multiply by the
        # reciprocal of a scalar. So every device gets the same bits.
        norm = self.normalization
        level, mean, std = (
            torch.tensor(v, device=image.device).view(-1, 1, 1) for v in ((255.0,), norm.mean, norm.std)
        )
        return image.to(torch.float32).div_(level).sub_(mean).div_(std)


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
