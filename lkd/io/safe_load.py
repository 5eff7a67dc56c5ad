"""Loading of untrusted PyTorch files: no code is executed, and declared sizes are checked."""

from __future__ import annotations

import argparse
import pickletools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from lkd.io.refused import Node, UntrustedError, shown, weigh

_PICKLES = 5  # pickles in PyTorch's legacy format: magic number, version, system, content, storage names
_SHARING = 10  # maximum ratio of the expanded size of the content to the number of instructions in the file
_FILLING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_NUMBERS = "?bhilqBHILQefd"


def _plain_dtype(code: object, *_: object) -> np.dtype[Any]:
    """Create a NumPy dtype, restricted to single numbers: an item of another type may be declared gigabytes in size."""
    dtype = np.dtype(code) if isinstance(code, str) and len(code) <= 3 else None
    if dtype is None or dtype.char not in _NUMBERS:
        raise UntrustedError(f"it contains the NumPy type {shown(code)}, which is not a scalar type")
    return dtype


# Types that training scripts save besides the weights: options as a Namespace, and accuracies as NumPy numbers, whose
# constructor has another name in files from before NumPy 2.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_plain_dtype, "numpy.dtype"),
    *(type(np.dtype(code)) for code in _NUMBERS),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def read_torch(file: Path) -> object:
    """Load a file written by `torch.save`.

    PyTorch's `weights_only` prevents code execution. Checks that it lacks are added: before loading, against compressed
    content (PyTorch writes none) that expands from a few bytes, and against objects that contain each other such that
    hashing or printing them takes forever; after loading, against tensors that declare more numbers than the file has.

    Args:
        file: The file.

    Raises:
        UntrustedError: If a check fails.
        Exception: Almost any exception if the file is corrupt or would require code execution.
    """
    zipped = is_zip(file)
    with file.open("rb") as opened:
        _check_zip(opened) if zipped else _check_pickles(opened, _PICKLES)
    with torch.serialization.safe_globals(_HARMLESS):
        content: object = torch.load(file, map_location="cpu", weights_only=True)
    _check_tensors(content, file.stat().st_size)
    return content


def is_zip(file: Path) -> bool:
    """Return whether a file is in PyTorch's zip format (since 1.6), by the same criterion as in PyTorch."""
    with file.open("rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def _check_zip(file: IO[bytes]) -> None:
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UntrustedError("its content is compressed, but torch.save never compresses")
        names = {entry.filename.lower() for entry in entries}
        whole = sum(entry.file_size for entry in entries) <= size and len(names) == len(entries)
        # With data before the first or after the last file, two readers may disagree about the content of an archive.
        if not whole or archive.comment or min((entry.header_offset for entry in entries), default=0):
            raise UntrustedError("it is a zip archive that was not written by torch.save")
        if (broken := archive.testzip()) is not None:  # torch.save writes checksums, but torch.load ignores them
            raise UntrustedError(f"the checksum of its entry {shown(broken)} is wrong")
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):
                with archive.open(entry) as opened:
                    _check_pickles(opened, 1)


def _check_pickles(file: IO[bytes], number: int) -> None:
    """Check that the objects the unpickler would create are not disproportionately large when expanded."""
    made: list[Node] = []
    steps = 0
    with suppress(Exception):  # at the end of a pickle, or if it is corrupt, the unpickler stops as well and reports it
        for _ in range(number):
            outline = _Outline(made)
            for code, argument, _ in pickletools.genops(file):
                steps += 1
                outline.follow(code, argument)
    weigh(made, 10**6 + _SHARING * steps)


class _Outline:
    """Unpickler that creates no objects, and only records which objects contain which others.

    Args:
        made: List to which the recorded objects are added.
    """

    def __init__(self, made: list[Node]) -> None:
        self.made = made
        self.stack: list[Node | None] = []
        self.marks: list[int] = []
        self.memo: dict[int, Node | None] = {}

    def follow(self, code: pickletools.OpcodeInfo, argument: Any) -> None:
        """Process one instruction."""
        if code.name == "MARK":
            self.marks.append(len(self.stack))
        elif code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
        else:
            taken = self._take(code.stack_before)
            if code.name in _FILLING and taken[0] is not None:
                taken[0].extend(taken[1:])
                self.stack.append(taken[0])
            elif code.stack_after:
                node = taken if taken or code.name.startswith("EMPTY") else None
                self.made += [] if node is None else [node]
                self.stack.append(node)

    def _take(self, wanted: Sequence[pickletools.StackObject]) -> Node:
        start = len(self.stack) - len(wanted)
        if pickletools.markobject in wanted:
            start = self.marks.pop() - list(wanted).index(pickletools.markobject)
        if start < 0:
            raise IndexError("the stack is empty")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken


def _check_tensors(content: object, size: int) -> None:
    numbers = 0
    for name, tensor in _tensors(content, ""):
        numbers += tensor.numel()
        if numbers > 4 * size:  # a tensor may occur under several names
            raise UntrustedError(f"{shown(name)} has {tensor.numel():,} numbers, but the file has only {size:,} bytes")


def _tensors(content: object, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, str(key) if isinstance(key, str | int) else type(key).__name__)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensors(value, name)
