"""Copies of images in the memory of a GPU."""

from __future__ import annotations

import torch

from lkd import devices
from lkd.datamodules.dataset import ImageDataset
from lkd.datamodules.sources import ImageSource


class Placement:
    """Images in memory that were copied to the GPU of this process. Datasets of the same images share one copy."""

    def __init__(self) -> None:
        self._copies: dict[int, ImageSource] = {}  # by the id of the original

    def place(self, dataset: ImageDataset, device: torch.device) -> ImageDataset:
        """Move a dataset to a GPU if its images require at most a quarter of the free memory.

        Args:
            dataset: The dataset; images that are not in memory stay where they are.
            device: The GPU.

        Returns:
            The dataset on the GPU, or the given one.
        """
        copy = self._copies.get(id(dataset.source))
        if dataset.stored is None or (copy is None and 4 * dataset.stored.nbytes > devices.free_memory(device)):
            return dataset
        placed = dataset.to(device, copy)
        self._copies[id(dataset.source)] = placed.source
        return placed

    def clear(self) -> None:
        """Release the memory."""
        self._copies.clear()

    def __len__(self) -> int:
        return len(self._copies)
