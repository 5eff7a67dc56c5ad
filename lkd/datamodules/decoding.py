"""Decode images once, keep them in memory, and cache them on disk for later runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL
import torch
import torchvision
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader

from lkd.datamodules.dataset import ImageDataset
from lkd.datamodules.files import ImageFiles
from lkd.datamodules.sources import Resident
from lkd.datamodules.transforms.base import CenterCrop
from lkd.io.tensor_cache import cache_folder, fingerprint, load_tensors, map_tensors, save_tensors

_FORMAT = 1  # to be raised whenever the same files shall give other pixels
_PIECE = 2**20  # bytes that are decoded at a time
_PATIENCE = 1.0  # seconds before processes are started
_Piece = TypeVar("_Piece")


def resident(dataset: ImageDataset, num_workers: int) -> Resident:
    """Decodes the images that a data set has of a source, or opens what was kept of them.

    Image files of which all is known that decides their pixels are kept in `cache_folder("images")`. Processes that
    open the same file share its memory.

    Args:
        dataset: Reads the images; its `resize` must do without randomness.
        num_workers: Processes that read what takes longer than a second.

    Raises:
        ImageError: If an image cannot be read.
    """
    made_from = _made_from(dataset)
    file = None if made_from is None else cache_folder("images") / f"{_name(made_from)}.safetensors"
    kept = None if file is None or made_from is None else load_tensors(file, made_from)
    image = None if kept is None else kept["image"]
    if image is not None and (image.dtype, image.shape) != (torch.uint8, (len(dataset.target), *dataset.shape)):
        image = None  # its checksum is right and its content is not: someone has made it
    if image is None:
        start = time.monotonic()
        image = _decoded(dataset, num_workers)
        seconds = time.monotonic() - start
        if file is not None and made_from is not None and _keep(image, file, made_from):
            image = map_tensors(file)["image"]
            say(f"{len(image):,} images decoded in {seconds:.1f} s and kept in {file.parent}")
        else:
            file = None
            say(f"{len(image):,} images decoded in {seconds:.1f} s")
    return Resident(image, dataset.target, dataset.source, file)


def _made_from(dataset: ImageDataset) -> dict[str, str] | None:
    """Name to a text for all that decides the decoded images; None if that is not known."""
    source, resize = dataset.source, dataset.resize
    if type(source) is not ImageFiles or type(resize) is not CenterCrop:
        return None
    versions = {"format": str(_FORMAT), "PIL": PIL.__version__, "torchvision": torchvision.__version__}
    some = {} if len(dataset) == len(source) else {"choice": fingerprint(dataset.index)}
    return {"files": source.fingerprint(), "shape": str(dataset.shape), "resize": repr(resize), **versions, **some}


def _name(made_from: Mapping[str, str]) -> str:
    return fingerprint(sorted(made_from.items()))


def _keep(image: Tensor, file: Path, made_from: Mapping[str, str]) -> bool:
    """Writes images to a file, if that can be done."""
    try:
        save_tensors(file, {"image": image}, made_from)
    except OSError as error:
        rank_zero_warn(
            f"decoded images cannot be kept in {file.parent} ({error}), so every run decodes them again; set LKD_CACHE "
            f"to a folder with {image.nbytes / 1e6:,.0f} MB to spare, or resident_limit to 0 to leave them to workers"
        )
        return False
    return True


def _decoded(dataset: ImageDataset, num_workers: int) -> Tensor:
    """All images `(N, C, H, W)`, uint8; zeros for those of the source that the data set does not have."""
    image = np.zeros((len(dataset.target), *dataset.shape), np.uint8)
    pieces = dataset.index.split(max(1, _PIECE // math.prod(dataset.shape)))  # type: ignore[no-untyped-call]
    read = in_pieces(partial(_images, dataset), pieces, num_workers, "decoding images")
    for index, part in zip(pieces, read, strict=True):
        image[index.numpy()] = part.numpy()  # without PyTorch's threads, for which a forked process would wait
    return torch.from_numpy(image)


def in_pieces(
    read: Callable[[Tensor], _Piece], pieces: Sequence[Tensor], num_workers: int, title: str
) -> Iterator[_Piece]:
    """Do something with each piece of the images, in order; what a second is too short for is done by workers.

    Processes, as everywhere: around the decoding of a small image there is so much Python that two threads take longer
    than one, and whether threads may share a source is not known.

    Args:
        read: What to do.
        pieces: Positions of images.
        num_workers: How many processes.
        title: What a terminal is told.
    """
    console = Console(stderr=True)
    hidden = getattr(rank_zero_only, "rank", 0) != 0 or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(title, total=sum(map(len, pieces)))
        for index, result in zip(pieces, _in_turn(read, pieces, num_workers), strict=True):
            yield result
            progress.advance(task, len(index))


def _in_turn(read: Callable[[Tensor], _Piece], pieces: Sequence[Tensor], num_workers: int) -> Iterator[_Piece]:
    start, done = time.monotonic(), 0
    while done < len(pieces) and time.monotonic() - start < _PATIENCE:
        yield read(pieces[done])
        done += 1
    if done < len(pieces):
        # With its own generator, as the global one must not tell whether images had to be decoded.
        yield from DataLoader(
            pieces[done:],  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=read,  # type: ignore[arg-type]
            num_workers=num_workers,
            generator=torch.Generator(),
        )


def _images(dataset: ImageDataset, index: Tensor) -> Tensor:
    return dataset.images(torch.zeros_like(index), index)


@rank_zero_only
def say(what: str) -> None:
    """Print a line to stderr, once for all processes.

    Args:
        what: The line.
    """
    Console(stderr=True, soft_wrap=True).print(what, highlight=False, markup=False)
