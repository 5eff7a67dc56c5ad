"""Which image files cannot be read: found out before the training, once, and kept for the next run."""

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
from lkd.datamodules.files import ImageFiles, few
from lkd.io.refused import shown
from lkd.io.tensor_cache import cache_folder, fingerprint, replacing

if TYPE_CHECKING:
    from lkd.datamodules.dataset import ImageDataset

_FORMAT = 1  # to be raised whenever the same files shall be judged otherwise
_PIECE = 64  # images that are read at a time


def readable(dataset: ImageDataset, num_workers: int) -> Tensor:
    """Which images can be read: each is decoded whole, unless it is kept what came of it.

    Those that cannot are told in a warning: the first of them, how many there are, and the file that lists all.

    Args:
        dataset: Reads the images, from files.
        num_workers: Processes that read what takes longer than a second.

    Returns:
        `(N,)`, bool.
    """
    source = dataset.source
    if type(source) is not ImageFiles:
        raise TypeError(f"only files can be left out, got {type(source).__name__}")
    versions = (_FORMAT, PIL.__version__, dataset.shape, dataset.resize)
    file = cache_folder("unreadable") / f"{fingerprint(source.fingerprint(), *versions)}.json"
    flaws = _kept(file, len(source))
    where = f"all are listed in {file}"
    if flaws is None:
        pieces = torch.arange(len(source)).split(_PIECE)  # type: ignore[no-untyped-call]
        found = in_pieces(partial(_flaws, dataset), pieces, num_workers, "looking for images that cannot be read")
        flaws = {position: flaw for piece in found for position, flaw in piece.items()}
        try:
            _keep(file, source, flaws)
        except OSError as error:
            where = f"that cannot be kept in {file.parent} ({error}), so every run reads all images to find out"
    if flaws:
        worst = [f"{source.path(position)} ({flaw})" for position, flaw in flaws.items()]
        rank_zero_warn(
            f"{len(flaws):,} of {len(source):,} images in {shown(source.folder)} cannot be read and are left out: "
            f"{few(worst)}; {where}"
        )
    whole = torch.ones(len(source), dtype=torch.bool)
    whole[list(flaws)] = False
    return whole


def _flaws(dataset: ImageDataset, index: Tensor) -> dict[int, str]:
    """Position to the reason, of those of some images that cannot be read."""
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
