"""Sources of images: the protocol, images in memory, and two sources as one."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms.v2 import functional as TF

from lkd.datamodules.files import is_plain
from lkd.io.tensor_cache import fingerprint, map_tensors


class ImageSource(Protocol):
    """Map-style dataset of (image, class), where the image is a PIL image, a uint8 array or a uint8 tensor.

    For images in memory, use a `TensorDataset(images, classes)` with images `(N, C, H, W)`, uint8: a batch is then one
    indexing operation. Other sources are read once if they fit into memory (`resident_limit`), so an image must be the
    same each time it is read.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Resident(TensorDataset):
    """Decoded images and their classes, held in memory in place of their source.

    Args:
        image: Images `(N, C, H, W)`, uint8.
        target: Classes `(N,)`, int64.
        original: The source.
        file: File from which the images are memory-mapped, if any; pickling then stores its path instead of the pixels.
    """

    def __init__(self, image: Tensor, target: Tensor, original: ImageSource, file: Path | None = None) -> None:
        super().__init__(image, target)
        self.original, self.file = original, file

    @property
    def image(self) -> Tensor:
        """All images `(N, C, H, W)`, uint8."""
        image: Tensor = self.tensors[0]
        return image

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if self.file is None else {**self.__dict__, "tensors": self.tensors[1:]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.file is not None:
            self.tensors = (map_tensors(self.file)["image"], *self.tensors)


class Joined(Dataset[Any]):
    """Two sources concatenated.

    Args:
        first: Source of the first images.
        second: Source of the remaining images.
    """

    def __init__(self, first: ImageSource, second: ImageSource) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> Any:
        source, place = located(self, index)
        return source[place]


def parts(source: ImageSource) -> list[ImageSource]:
    """Return the sources that a joined source consists of; for any other, the source itself."""
    return [*parts(source.first), *parts(source.second)] if isinstance(source, Joined) else [source]


def located(source: ImageSource, index: int) -> tuple[ImageSource, int]:
    """Return the part of a source that contains an image, and the position of the image in it."""
    while isinstance(source, Joined):
        begin = len(source.first)
        source, index = (source.first, index) if index < begin else (source.second, index - begin)
    return source, index


def join(first: ImageSource, second: ImageSource, shape: tuple[int, int, int] | None) -> ImageSource:
    """Concatenate two sources.

    Args:
        first: Source of the first images.
        second: Source of the remaining images.
        shape: Channels, height and width of images that require no resizing and hence may share a tensor; `None` if all
            require it.
    """
    image, target = [], []
    for source in (first, second):
        if not isinstance(source, TensorDataset) or source.tensors[0].shape[1:] != shape:
            return Joined(first, second)
        image.append(source.tensors[0])
        target.append(source.tensors[1])
    return Resident(torch.cat(image), torch.cat(target), Joined(original(first), original(second)))


def original(source: ImageSource) -> ImageSource:
    """Return the source from which images in memory were decoded; for any other, the source itself."""
    return source.original if isinstance(source, Resident) else source


def source_fingerprint(source: ImageSource) -> str:
    """Return a hash that identifies the images of a source; a random one if nothing identifies them."""
    undecoded = original(source)
    if len(parts(undecoded)) > 1:
        return fingerprint(*map(source_fingerprint, parts(undecoded)))
    if is_plain(undecoded):
        return undecoded.fingerprint()
    return fingerprint(*source.tensors) if isinstance(source, TensorDataset) else uuid.uuid4().hex


def eight_bit(image: object) -> Image.Image:
    """Convert an image of a source to a PIL image with eight bits per channel.

    Args:
        image: PIL image, or uint8 array or tensor.

    Raises:
        TypeError: If it is something else.
        ValueError: If its range of values is unknown.
    """
    if isinstance(image, np.ndarray | Tensor) and image.dtype in (np.uint8, torch.uint8):
        image = TF.to_pil_image(image)
    if not isinstance(image, Image.Image):
        kind = getattr(image, "dtype", type(image).__name__)
        raise TypeError(f"expected a PIL image, or a uint8 array or tensor, got {kind}")
    if image.mode.startswith("I;16"):  # PIL's own conversion clips values above 255
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"the pixel range of mode {image.mode} is unknown")
    return image
