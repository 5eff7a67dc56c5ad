"""Images without labels that a trained network is to classify."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch

from lkd.datamodules.base import ImageDataModule, Split
from lkd.datamodules.files import ImageFiles, read_all
from lkd.datamodules.webdataset import WebDatasetDataModule


class NewImages(ImageDataModule):
    """All images in a folder, at any depth, prepared as another data module prepares its images, for prediction.

    Files that cannot be read are reported and left out.

    Args:
        folder: The folder.
        like: The data module that the network was trained with; its files are not needed.

    Raises:
        TypeError: If it is not one of lkd's data modules, so that nothing tells how an image is prepared.
    """

    def __init__(self, folder: str, like: L.LightningDataModule) -> None:
        if not isinstance(like, ImageDataModule | WebDatasetDataModule):
            raise TypeError(
                f"{type(like).__name__} does not tell how it prepares an image, so new images cannot be prepared in "
                "the same way; predict with a data module of your own whose predict_dataloader reads them"
            )
        self.folder = Path(folder).expanduser()
        self.num_classes = getattr(like, "num_classes", 0)  # a folder's are counted once it is opened
        self.class_names = like.class_names
        self.input_shape, self.resize = like.input_shape, like.resize
        super().__init__(
            batch_size=like.batch_size,
            num_workers=like.num_workers,
            mean=like.mean,
            std=like.std,
            resident_limit=0,  # each is read once
            unreadable="skip",
        )

    def make_dataset(self, split: Split) -> ImageFiles | None:
        """See `ImageDataModule.make_dataset`."""
        return read_all(self.folder) if split == "test" else None

    def file_names(self) -> dict[int, str]:
        """Position of every image to its name in the folder, after `setup`."""
        source = self.datasets["test"].source
        if not isinstance(source, ImageFiles):
            raise TypeError(f"images that were read from files are {type(source).__name__}")
        return {number: source.path(number).relative_to(self.folder).as_posix() for number in range(len(source))}

    def left_out(self) -> list[int]:
        """Positions of the images that cannot be read, after `setup`."""
        dataset = self.datasets["test"]
        readable = torch.zeros(len(dataset.target), dtype=torch.bool)
        readable[dataset.index] = True
        return [int(number) for number in (~readable).nonzero()]
