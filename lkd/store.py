"""Files that are kept between runs: where they lie, what they are called, and that they are whole."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

_PIECE = 2**24


def cache_folder(kind: str) -> Path:
    """Where kept files of a kind lie: below `$LKD_CACHE`, else `$XDG_CACHE_HOME/lkd`, else `~/.cache/lkd`.

    Args:
        kind: Name of the folder there.
    """
    own = os.environ.get("LKD_CACHE")
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else (Path(home) if home else Path.home() / ".cache") / "lkd") / kind


def fingerprint(*parts: object) -> str:
    """A name for what something was made from: other parts, another name.

    Args:
        parts: Tensors count with type, shape and values; anything else with its `repr`.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> fingerprint(torch.zeros(2), "a") == fingerprint(torch.zeros(2), "b")
        False
    """
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            hashed.update(f"{part.dtype} {tuple(part.shape)}".encode())
            hashed.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            hashed.update(repr(part).encode(errors="surrogateescape"))
        hashed.update(b"\0")
    return hashed.hexdigest()


def checksum(path: Path) -> int:
    """CRC-32 of a file's bytes: tells a torn or overwritten file, not a forged one."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            value = zlib.crc32(piece, value)
    return value


_WHOLE = 0x2144DF1C  # the CRC-32 of anything with its own CRC-32 behind it, low byte first


def seal(path: Path) -> None:
    """Write a file's checksum behind its last byte, for `is_whole`."""
    value = checksum(path)
    with path.open("ab") as file:
        file.write(value.to_bytes(4, "little"))


def is_whole(path: Path) -> bool:
    """Whether a file is as `seal` left it: not cut short, and no byte another."""
    return checksum(path) == _WHOLE


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file that is there whole or not at all, whenever the machine stops.

    Args:
        path: The file; its folder is made.

    Yields:
        Where to write it: a new file in the same folder, which takes the place of `path` at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    written = Path(name)
    try:
        yield written
        with written.open("rb") as file:
            os.fsync(file.fileno())
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)
