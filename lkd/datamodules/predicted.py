"""Names and sizes of the images for which `lkd predict` writes predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import torch

from lkd.datamodules.base import ImageDataModule
from lkd.datamodules.boxes import FileImages
from lkd.datamodules.detection import DetectionDataModule
from lkd.datamodules.files import ImageFiles
from lkd.datamodules.sources import original
from lkd.datamodules.transforms.scaling import PadToSize


class Frame(NamedTuple):
    """Part of the network's input that an image covers, and the size of the image file.

    Attributes:
        part: Number of rows and columns of the input that contain the image, from the top left corner.
        full: Height and width of the image file.
    """

    part: tuple[int, int]
    full: tuple[int, int]


class PredictedImages:
    """The images that a data module provides for prediction, by their positions (`Batch.index`).

    Args:
        data: A data module after `setup("predict")`. If it is not one of lkd's, or does not read files, the images have
            no names, and their size is that of the input.

    Attributes:
        files: The image files; `None` if the images are not files.
    """

    def __init__(self, data: object) -> None:
        self.files: ImageFiles | None = None
        self._resize = None
        if isinstance(data, ImageDataModule) and "test" in data.datasets:
            source = original(data.datasets["test"].source)
            self.files = source if isinstance(source, ImageFiles) else None
            self._resize = data.datasets["test"].resize
        elif isinstance(data, DetectionDataModule) and "test" in data.datasets:
            images = data.datasets["test"].source.images
            self.files = images.files if isinstance(images, FileImages) else None

    def frame(self, position: int, size: tuple[int, int]) -> Frame:
        """Return the frame of an image. It covers the whole input if the image was not padded.

        Args:
            position: Position of the image in its dataset.
            size: Height and width of the input.
        """
        if self.files is None or not isinstance(self._resize, PadToSize):
            return Frame(size, size)
        full = self.files.size(position)
        return Frame(self._resize.least(full, size, torch.empty(0)), full)

    def output_names(self) -> list[str] | None:
        """Return a file name without extension for the output of each image, such as `a/b` for `a/b.jpg`.

        All names are different: if the names of images differ only in their extension, all outputs are named after the
        whole file name (`a/b.jpg`). Outputs stay in their folder, even if the names of the images lead out of theirs.

        Returns:
            The names; `None` if the images are not files.
        """
        if self.files is None:
            return None
        names = [_inside(self.files.name(position)) for position in range(len(self.files))]
        stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
        numbers = [numbered(position) for position in range(len(names))]
        return next(choice for choice in (stems, names, numbers) if _are_different(choice))


def numbered(position: int) -> str:
    """Return the name of an image without a file name."""
    return f"{position:06d}"


def _inside(name: str) -> str:
    """Remove the root and `..` from a path, which a list of files may contain."""
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
    return str(PurePosixPath(*parts))


def _are_different(names: Sequence[str]) -> bool:
    return len({name.lower() for name in names}) == len(names)  # some file systems ignore the case
