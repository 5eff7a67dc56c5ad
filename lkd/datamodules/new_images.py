"""Images without labels, for prediction with a trained network."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch

from lkd.datamodules.base import ImageDataModule, Split
from lkd.datamodules.files import ImageFiles, read_all
from lkd.datamodules.webdataset import WebDatasetDataModule


class NewImages(ImageDataModule):
    """All images of a folder, at any depth, preprocessed as in another data module, for prediction.

    Files that cannot be read are reported and skipped.

    Args:
        folder: Folder of the images.
        like: Data module with which the network was trained; its files are not required.

    Raises:
        TypeError: If it is not one of lkd's data modules, as its preprocessing is then unknown.
    """

    def __init__(self, folder: str, like: L.LightningDataModule) -> None:
        if not isinstance(like, ImageDataModule | WebDatasetDataModule):
            raise TypeError(
                f"the preprocessing of {type(like).__name__} is unknown because it is not one of lkd's data modules; "
                "for prediction, use your own data module with a predict_dataloader that reads the new images"
            )
        self.folder = Path(folder).expanduser()
        self.num_classes = getattr(like, "num_classes", 0)  # unknown for a folder until it is opened
        self.class_names = like.class_names
        self.input_shape, self.resize = like.input_shape, like.resize
        super().__init__(
            batch_size=like.batch_size,
            num_workers=like.num_workers,
            mean=like.mean,
            std=like.std,
            resident_limit=0,  # each image is read only once
            unreadable="skip",
        )

    def make_dataset(self, split: Split) -> ImageFiles | None:
        """Open the images; see `ImageDataModule.make_dataset`."""
        return read_all(self.folder) if split == "test" else None

    def file_names(self) -> dict[int, str]:
        """Return the file name of every image, relative to the folder, by its position. Requires `setup`."""
        source = self.datasets["test"].source
        if not isinstance(source, ImageFiles):
            raise TypeError(f"expected a source of type ImageFiles, got {type(source).__name__}")
        return {number: source.path(number).relative_to(self.folder).as_posix() for number in range(len(source))}

    def left_out(self) -> list[int]:
        """Return the positions of the images that cannot be read. Requires `setup`."""
        dataset = self.datasets["test"]
        readable = torch.zeros(len(dataset.target), dtype=torch.bool)
        readable[dataset.index] = True
        return [int(number) for number in (~readable).nonzero()]
