"""Images of different sizes with boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torch.utils.data import Dataset

from lkd.datamodules.dataset import ImageError, reason
from lkd.datamodules.draws import uniform
from lkd.datamodules.files import ImageFiles
from lkd.datamodules.sampler import read_keys
from lkd.datamodules.sources import eight_bit
from lkd.io.refused import shown
from lkd.types import Batch


class Images(Protocol):
    """Images that are read one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Return an image `(C, H, W)`, uint8."""
        ...


class FileImages:
    """Image files that are read one by one.

    Args:
        files: The files.
    """

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        """Decode an image `(3, H, W)`, uint8.

        Raises:
            ImageError: If it cannot be read.
        """
        try:
            image, _ = self.files[index]
            pixels: Tensor = TF.pil_to_tensor(eight_bit(image).convert("RGB"))
        except Exception as error:  # decoders raise almost any exception for corrupt files
            raise ImageError(
                f"image {shown(self.files.path(index))} cannot be read ({reason(error)}); replace or remove it"
            ) from error
        return pixels


@dataclass(frozen=True)
class BoxSource:
    """Images with boxes. The boxes of all images are stored in one tensor, which workers share.

    Args:
        images: Images `(C, H_i, W_i)`, uint8, as a list or as an object that reads them one by one.
        boxes: Boxes of all images `(M, 4)`, float32: x1, y1, x2, y2 in pixels, with x1 < x2 and y1 < y2.
        labels: Classes of the boxes `(M,)`, int64; class 0, the background, does not occur.
        counts: Number of boxes of each image `(N,)`, int64.

    Raises:
        ValueError: If the numbers of images, boxes, labels and counts do not agree, or a box has no area.
    """

    images: Images
    boxes: Tensor
    labels: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        sizes = len(self.images), len(self.boxes), len(self.labels)
        if sizes != (len(self.counts), int(self.counts.sum()), len(self.boxes)) or self.boxes.shape[1:] != (4,):
            raise ValueError(
                f"boxes (M, 4), labels (M,) and counts (N,) must agree with the images, got {tuple(self.boxes.shape)}, "
                f"{tuple(self.labels.shape)} and {tuple(self.counts.shape)} for {sizes[0]} images"
            )
        empty = (self.boxes[:, 2:] <= self.boxes[:, :2]).any(1)
        if empty.any():
            first = int(empty.nonzero()[0])
            image = int(torch.searchsorted(self.counts.cumsum(0), first, right=True))
            raise ValueError(f"box {self.boxes[first].tolist()} of image {image} has no area; correct or remove it")

    def target(self, index: int) -> dict[str, Tensor]:
        """Return the boxes `(N_i, 4)` and labels `(N_i,)` of an image.

        Args:
            index: Position of the image.
        """
        start, count = int(self.counts[:index].sum()), int(self.counts[index])
        return {"boxes": self.boxes[start : start + count].clone(), "labels": self.labels[start : start + count]}


class BoxDataset(Dataset[Batch]):
    """Dataset of images with boxes; each item is a batch.

    Args:
        source: Images with boxes.
        index: Positions of the images of this dataset in the source `(N,)`, int64.
        flip: Probability that an image is flipped horizontally, as a function of (seed, epoch, position).
        seed: Seed of the flips.
    """

    def __init__(self, source: BoxSource, index: Tensor, flip: float = 0.0, seed: int = 0) -> None:
        self.source, self.index, self.flip, self.seed = source, index, flip, seed

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[int]) -> Batch:
        """Return the samples of the given keys as a batch; see `Key`."""
        epoch, position, _ = read_keys(keys)
        index = self.index[position]
        flipped = (uniform(self.seed, epoch, index, 0)[:, 0] < self.flip).tolist()
        samples = [self._sample(*sample) for sample in zip(index.tolist(), flipped, strict=True)]
        images, target = zip(*samples, strict=True)
        return Batch(list(images), list(target), index, version=epoch)

    def _sample(self, index: int, flipped: bool) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = self.source.images[index].float() / 255, self.source.target(index)
        if flipped:
            image, width, boxes = image.flip(2), image.shape[2], target["boxes"]
            target["boxes"] = torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), 1)
        return image, target
