"""Cache files: their location, their keys and their integrity."""

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
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lkd.io.refused import said, shown

# Exceptions raised when a corrupt or forged file is read.
_DAMAGED = (SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, MemoryError)
_UMASK = os.umask(0o022)
os.umask(_UMASK)  # it can only be read by setting it; done at import, before other threads create files


def cache_folder(kind: str) -> Path:
    """Return the cache folder of a kind: below `$LKD_CACHE`, or in the user's cache folder (`~/.cache/lkd` on Linux).

    For users without a home directory, it is below the folder for temporary files.

    Args:
        kind: Name of the subfolder.
    """
    if own := os.environ.get("LKD_CACHE"):
        return Path(own) / kind
    folder = user_cache_path("lkd", appauthor=False)
    return (folder if folder.is_absolute() else Path(tempfile.gettempdir()) / "lkd") / kind  # '~' without a home


def fingerprint(*parts: object) -> str:
    """Return a hash that identifies the inputs of a result.

    Args:
        parts: Inputs. Tensors are hashed with dtype, shape and values; other objects with their `repr`.

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


def network_fingerprint(network: nn.Module) -> str:
    """Return a hash that identifies a network: its layers, weights and buffers, including those that are not saved.

    Args:
        network: The network.
    """
    state = network.state_dict()
    unsaved = (buffer for name, buffer in network.named_buffers() if name not in state)
    return fingerprint(str(network), *state.values(), *unsaved)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically: even after a crash, it is either complete or unchanged.

    Args:
        path: The file; its folder is created.

    Yields:
        Path to write to: a new file in the same folder, which replaces `path` at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    written = Path(name)
    try:
        written.chmod(0o666 & ~_UMASK)  # default permissions; tempfile denies access to other users
        yield written
        _to_disk(written)
        written.replace(path)
        _to_disk(path.parent)
    finally:
        written.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows does not open folders
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError:  # some systems cannot sync a folder
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], made_from: Mapping[str, str]) -> None:
    """Save tensors to a safetensors file, with a checksum and a description of their inputs.

    Args:
        path: The file; it is replaced atomically.
        tensors: Mapping from name to tensor.
        made_from: Mapping from name to value of everything that determines the tensors.

    Raises:
        OSError: If the file cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as written:
        try:
            kept = {"made_from": dict(made_from), "checksum": _checksum(tensors)}
            save_file(tensors, written, {"lkd": json.dumps(kept)})
        except SafetensorError as error:  # raised if the disk is full
            raise OSError(str(error)) from error


def load_tensors(path: Path, wanted: Mapping[str, str]) -> dict[str, Tensor] | None:
    """Load tensors saved by `save_tensors`, memory-mapped, so that processes share the memory.

    Args:
        path: The file.
        wanted: Required inputs of the tensors, as in `made_from` of `save_tensors`.

    Returns:
        Mapping from name to tensor; the tensors must not be modified. `None` if the file does not exist or, with a
        warning, if it is corrupt or was created from other inputs.
    """
    if not path.is_file():
        return None
    try:
        tensors, kept = _open(path)
        found = kept["made_from"]
        others = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        if others:
            reason = f"it was created with different inputs: {', '.join(map(shown, others))}"
        elif kept["checksum"] != _checksum(tensors):
            reason = "its checksum is wrong"
        else:
            return tensors
    except _DAMAGED as error:
        reason = f"it cannot be read ({type(error).__name__}: {said(error)})"
    rank_zero_warn(f"{path} is ignored and will be recreated: {reason}")
    return None


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a file that `load_tensors` has already verified, for another process.

    Args:
        path: The file.
    """
    return _open(path)[0]


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        return tensors, json.loads(file.metadata()["lkd"])


def made_from(path: Path) -> dict[str, str] | None:
    """Return the inputs recorded in a file by `save_tensors`; `None` if there are none."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads(file.metadata()["lkd"])["made_from"])
    except _DAMAGED:
        return None


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Compute the CRC-32 of names, dtypes, shapes and bytes. It detects corrupt files, but not forged ones."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(_bytes(tensor), zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value))
    return f"{value:08x}"
