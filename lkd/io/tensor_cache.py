"""Files that are kept between runs: where they lie, what they are called, and that they are whole."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lkd.io.refused import said, shown

# What reading a file may raise that is damaged, or forged.
_DAMAGED = (SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, MemoryError)
_UMASK = os.umask(0o022)
os.umask(_UMASK)  # it can only be read by setting it; at import, as other threads make files too


def cache_folder(kind: str) -> Path:
    """Where kept files of a kind lie: below `$LKD_CACHE`, else `$XDG_CACHE_HOME/lkd`, else `~/.cache/lkd`.

    A user without a home has them below the folder for temporary files.

    Args:
        kind: Name of the folder there.
    """
    if own := os.environ.get("LKD_CACHE"):
        return Path(own) / kind
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "lkd" / kind
    try:
        return Path.home() / ".cache" / "lkd" / kind
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "lkd" / kind


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
            hashed.update(_bytes(part))
        else:
            hashed.update(repr(part).encode(errors="surrogateescape"))
        hashed.update(b"\0")
    return hashed.hexdigest()


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
        written.chmod(0o666 & ~_UMASK)  # as any new file's; tempfile lets nobody else read
        yield written
        _to_disk(written)
        written.replace(path)
        _to_disk(path.parent)
    finally:
        written.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # a folder, where the system cannot do it
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], made_from: Mapping[str, str]) -> None:
    """Keep tensors in a safetensors file, with a checksum and with what they were made from.

    Args:
        path: The file; it is replaced whole or not at all.
        tensors: Name to tensor.
        made_from: Name to value of everything that decides them.

    Raises:
        OSError: If the file cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as written:
        try:
            kept = {"made_from": dict(made_from), "checksum": _checksum(tensors)}
            save_file(tensors, written, {"lkd": json.dumps(kept)})
        except SafetensorError as error:  # its way to say that the disk is full
            raise OSError(str(error)) from error


def load_tensors(path: Path, wanted: Mapping[str, str]) -> dict[str, Tensor] | None:
    """Tensors that `save_tensors` kept, mapped into memory: processes that read them share it.

    Args:
        path: The file.
        wanted: What they must have been made from.

    Returns:
        Name to tensor, not to be written to; None if there is no such file or, which draws a warning, if it is torn,
        overwritten, or made from something else.
    """
    if not path.is_file():
        return None
    try:
        tensors, kept = _open(path)
        found = kept["made_from"]
        others = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        if others:
            reason = f"it was made from another {' and '.join(map(shown, others))}"
        elif kept["checksum"] != _checksum(tensors):
            reason = "its checksum is wrong"
        else:
            return tensors
    except _DAMAGED as error:
        reason = f"it cannot be read ({type(error).__name__}: {said(error)})"
    rank_zero_warn(f"{path} is not used, and made anew: {reason}")
    return None


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `load_tensors` has found whole, for another process.

    Args:
        path: The file.
    """
    return _open(path)[0]


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        return tensors, json.loads(file.metadata()["lkd"])


def made_from(path: Path) -> dict[str, str] | None:
    """What `save_tensors` was told that a file was made from; None if the file does not tell."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads(file.metadata()["lkd"])["made_from"])
    except _DAMAGED:
        return None


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 over names, types, shapes and bytes: tells a torn or overwritten file, not a forged one."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(_bytes(tensor), zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value))
    return f"{value:08x}"
