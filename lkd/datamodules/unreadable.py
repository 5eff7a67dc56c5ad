"""Detection of unreadable image files before training. The result is cached for later runs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import PIL
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lkd.datamodules.decoding import in_pieces
from lkd.datamodules.files import ImageFiles, few, is_plain
from lkd.io.refused import shown
from lkd.io.tensor_cache import cache_folder, fingerprint, replacing

if TYPE_CHECKING:
    from lkd.datamodules.dataset import ImageDataset

_FORMAT = 1  # increase when the same files may give a different result
_PIECE = 64  # images read at a time


def readable(dataset: ImageDataset, num_workers: int) -> Tensor:
    """Find the images that can be read. Each image is decoded at full size, unless the result is cached.

    A warning reports the first unreadable images, their number, and the file that lists all of them.

    Args:
        dataset: Dataset that reads the images from files.
        num_workers: Number of processes that decode images, if decoding takes longer than a second.

    Returns:
        Which images can be read `(N,)`, bool.

    Raises:
        TypeError: If the images of the dataset are not files.
    """
    source = dataset.source
    if not is_plain(source):
        raise TypeError(f"unreadable images can only be skipped in image files, got {type(source).__name__}")
    versions = (_FORMAT, PIL.__version__, dataset.shape, dataset.resize)
    file = cache_folder("unreadable") / f"{fingerprint(source.fingerprint(), *versions)}.json"
    flaws = _kept(file, len(source))
    where = f"the full list is in {file}"
    if flaws is None:
        pieces = torch.arange(len(source)).split(_PIECE)  # type: ignore[no-untyped-call]
        found = in_pieces(partial(_flaws, dataset), pieces, num_workers, "checking images")
        flaws = {position: flaw for piece in found for position, flaw in piece.items()}
        try:
            _keep(file, source, flaws)
        except OSError as error:
            where = f"the list cannot be cached in {file.parent} ({error}), so every run will check all images"
    if flaws:
        worst = [f"{source.path(position)} ({flaw})" for position, flaw in flaws.items()]
        rank_zero_warn(
            f"{len(flaws):,} of {len(source):,} images in {shown(source.folder)} cannot be read and are skipped: "
            f"{few(worst)}; {where}"
        )
    whole = torch.ones(len(source), dtype=torch.bool)
    whole[list(flaws)] = False
    return whole


def _flaws(dataset: ImageDataset, index: Tensor) -> dict[int, str]:
    """Return the reason for each of some images that cannot be read, by position."""
    found = {position: dataset.flaw(position) for position in index.tolist()}
    return {position: flaw for position, flaw in found.items() if flaw}


def _keep(file: Path, source: ImageFiles, flaws: dict[int, str]) -> None:
    rows = [{"position": i, "file": str(source.path(i)), "reason": flaw} for i, flaw in flaws.items()]
    with replacing(file) as written:
        written.write_text(json.dumps({"images": rows}, indent=1))


def _kept(file: Path, size: int) -> dict[int, str] | None:
    try:
        flaws = {int(row["position"]): str(row["reason"]) for row in json.loads(file.read_text())["images"]}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return flaws if all(0 <= position < size for position in flaws) else None
