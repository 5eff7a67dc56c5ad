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
from lkd.datamodules.files import is_plain
from lkd.datamodules.sources import Resident
from lkd.datamodules.transforms.base import CenterCrop
from lkd.datamodules.transforms.scaling import PadToSize
from lkd.io.tensor_cache import cache_folder, fingerprint, load_tensors, map_tensors, save_tensors

_FORMAT = 1  # increase when the same files result in different pixels
_PIECE = 2**20  # bytes decoded at a time
_PATIENCE = 1.0  # seconds before worker processes are started
_Piece = TypeVar("_Piece")


def resident(dataset: ImageDataset, num_workers: int) -> Resident:
    """Decode the images that a dataset uses of its source, or open the cached result.

    Image files are cached in `cache_folder("images")` if everything that determines their pixels is known. Processes
    that open the same cache file share its memory.

    Args:
        dataset: Dataset that reads the images; its `resize` must be deterministic.
        num_workers: Number of processes that decode images, if decoding takes longer than a second.

    Raises:
        ImageError: If an image cannot be read.
    """
    made_from = _made_from(dataset)
    file = None if made_from is None else cache_folder("images") / f"{_name(made_from)}.safetensors"
    kept = None if file is None or made_from is None else load_tensors(file, made_from)
    image = None if kept is None else kept["image"]
    if image is not None and (image.dtype, image.shape) != (torch.uint8, (len(dataset.target), *dataset.shape)):
        image = None  # a correct checksum but wrong content: the file was not written by lkd
    if image is None:
        start = time.monotonic()
        image = _decoded(dataset, num_workers)
        seconds = time.monotonic() - start
        if file is not None and made_from is not None and _keep(image, file, made_from):
            image = map_tensors(file)["image"]
            report(f"Decoded {len(image):,} images in {seconds:.1f} s; cached in {file.parent}")
        else:
            file = None
            report(f"Decoded {len(image):,} images in {seconds:.1f} s")
    return Resident(image, dataset.target, dataset.source, file)


def _made_from(dataset: ImageDataset) -> dict[str, str] | None:
    """Return everything that determines the decoded images, as name to text; `None` if it is unknown."""
    source, resize = dataset.source, dataset.resize
    if not is_plain(source) or type(resize) not in (CenterCrop, PadToSize):
        return None
    versions = {"format": str(_FORMAT), "PIL": PIL.__version__, "torchvision": torchvision.__version__}
    some = {} if len(dataset) == len(source) else {"choice": fingerprint(dataset.index)}
    return {"files": source.fingerprint(), "shape": str(dataset.shape), "resize": repr(resize), **versions, **some}


def _name(made_from: Mapping[str, str]) -> str:
    return fingerprint(sorted(made_from.items()))


def _keep(image: Tensor, file: Path, made_from: Mapping[str, str]) -> bool:
    """Write images to a cache file. Return whether this succeeded."""
    try:
        save_tensors(file, {"image": image}, made_from)
    except OSError as error:
        rank_zero_warn(
            f"decoded images cannot be cached in {file.parent} ({error}), so every run will decode them again; set "
            f"LKD_CACHE to a folder with {image.nbytes / 1e6:,.0f} MB of free space, or resident_limit to 0 to decode "
            "images in workers"
        )
        return False
    return True


def _decoded(dataset: ImageDataset, num_workers: int) -> Tensor:
    """Return all images of the source `(N, C, H, W)`, uint8; those that are not in the dataset are zeros."""
    image = np.zeros((len(dataset.target), *dataset.shape), np.uint8)
    pieces = dataset.index.split(max(1, _PIECE // math.prod(dataset.shape)))  # type: ignore[no-untyped-call]
    read = in_pieces(partial(_images, dataset), pieces, num_workers, "decoding images")
    for index, part in zip(pieces, read, strict=True):
        image[index.numpy()] = part.numpy()  # not by PyTorch, whose threads would make a forked process hang
    return torch.from_numpy(image)


def in_pieces(
    read: Callable[[Tensor], _Piece], pieces: Sequence[Tensor], num_workers: int, title: str
) -> Iterator[_Piece]:
    """Process the images piece by piece and yield the results in order. After one second, workers take over.

    Processes are used instead of threads: decoding a small image runs so much Python code that two threads take longer
    than one, and a source may not be thread-safe.

    Args:
        read: Function that processes a piece.
        pieces: Positions of images.
        num_workers: Number of processes.
        title: Title of the progress bar.
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
        # A generator of its own, so that the global one does not depend on whether images were cached.
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
def report(line: str) -> None:
    """Print a line to stderr, on rank zero only.

    Args:
        line: The line.
    """
    Console(stderr=True, soft_wrap=True).print(line, highlight=False, markup=False)
