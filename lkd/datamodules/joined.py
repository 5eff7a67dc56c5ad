"""Sources of images, one behind the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, TensorDataset

from lkd.datamodules.resident import Resident

if TYPE_CHECKING:
    from lkd.datamodules.dataset import ImageSource


class Joined(Dataset[Any]):
    """The images of two sources, the first one's first.

    Args:
        first: A source.
        second: Another one.
    """

    def __init__(self, first: ImageSource, second: ImageSource) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> Any:
        source, place = located(self, index)
        return source[place]


def parts(source: ImageSource) -> list[ImageSource]:
    """The sources that a joined one is made of; of any other, itself."""
    return [*parts(source.first), *parts(source.second)] if isinstance(source, Joined) else [source]


def located(source: ImageSource, index: int) -> tuple[ImageSource, int]:
    """Where an image comes from: the source that has it, and its position there."""
    while isinstance(source, Joined):
        begin = len(source.first)
        source, index = (source.first, index) if index < begin else (source.second, index - begin)
    return source, index


def join(first: ImageSource, second: ImageSource, shape: tuple[int, int, int] | None) -> ImageSource:
    """Images of two sources as one.

    Args:
        first: A source.
        second: Another one.
        shape: Channels, height and width of images that need no resizing, and so may lie in one tensor; None: all do.
    """
    image, target = [], []
    for source in (first, second):
        if not isinstance(source, TensorDataset) or source.tensors[0].shape[1:] != shape:
            return Joined(first, second)
        image.append(source.tensors[0])
        target.append(source.tensors[1])
    originals = [source.original if isinstance(source, Resident) else source for source in (first, second)]
    return Resident(torch.cat(image), torch.cat(target), Joined(*originals))
