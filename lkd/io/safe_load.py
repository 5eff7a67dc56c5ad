"""Reading PyTorch's files when nobody knows who wrote them: no code is run, and no figure in them is believed."""

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

_PICKLES = 5  # of PyTorch's format before zip: magic number, version, system, content, names of the storages
_SHARING = 10  # how many times as large a content may be, written out, as the file's instructions for it
_FILLING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_NUMBERS = "?bhilqBHILQefd"


def _plain_dtype(code: object, *_: object) -> np.dtype[Any]:
    """NumPy's maker of types, for single numbers alone: an item of others may be declared gigabytes large."""
    dtype = np.dtype(code) if isinstance(code, str) and len(code) <= 3 else None
    if dtype is None or dtype.char not in _NUMBERS:
        raise UntrustedError(f"it has a NumPy type {shown(code)} that no single number has")
    return dtype


# What training scripts save beside the weights: their options, a bag of attributes; accuracies as NumPy's numbers,
# whose maker has another name in files from before NumPy 2.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_plain_dtype, "numpy.dtype"),
    *(type(np.dtype(code)) for code in _NUMBERS),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def read_torch(file: Path) -> object:
    """What `torch.save` wrote.

    PyTorch's own `weights_only` keeps code from running. Before it come checks that it lacks: against compressed
    content (PyTorch writes none) that a few bytes of the file blow up, and against objects that contain one another so
    that they take forever to hash or to print; after it, against tensors that declare more numbers than there are.

    Args:
        file: The file.

    Raises:
        UntrustedError: If it fails a check.
        Exception: Nearly any, if it is damaged or would have to run code.
    """
    zipped = is_zip(file)
    with file.open("rb") as opened:
        _check_zip(opened) if zipped else _check_pickles(opened, _PICKLES)
    with torch.serialization.safe_globals(_HARMLESS):
        content: object = torch.load(file, map_location="cpu", weights_only=True)
    _check_tensors(content, file.stat().st_size)
    return content


def is_zip(file: Path) -> bool:
    """Whether a file is of PyTorch's format since 1.6: by what PyTorch knows it by, too."""
    with file.open("rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def _check_zip(file: IO[bytes]) -> None:
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UntrustedError("its content is compressed, and torch.save compresses nothing")
        names = {entry.filename.lower() for entry in entries}
        whole = sum(entry.file_size for entry in entries) <= size and len(names) == len(entries)
        # Two readers of an archive agree on what is in it if nothing stands before the first file and behind the last.
        if not whole or archive.comment or min((entry.header_offset for entry in entries), default=0):
            raise UntrustedError("it is a zip archive, but none that torch.save has made")
        if (broken := archive.testzip()) is not None:  # torch.save writes checksums, torch.load does not look at them
            raise UntrustedError(f"the checksum of its part {shown(broken)} is wrong")
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):
                with archive.open(entry) as opened:
                    _check_pickles(opened, 1)


def _check_pickles(file: IO[bytes], number: int) -> None:
    """Objects that the unpickler will make must be no larger, written out, than the file lets expect."""
    made: list[Node] = []
    steps = 0
    with suppress(Exception):  # where a pickle ends or is damaged the unpickler stops as well, and says so
        for _ in range(number):
            outline = _Outline(made)
            for code, argument, _ in pickletools.genops(file):
                steps += 1
                outline.follow(code, argument)
    weigh(made, 10**6 + _SHARING * steps)


class _Outline:
    """An unpickler that makes nothing, and notes of each object only which others it holds.

    Args:
        made: Where it notes them.
    """

    def __init__(self, made: list[Node]) -> None:
        self.made = made
        self.stack: list[Node | None] = []
        self.marks: list[int] = []
        self.memo: dict[int, Node | None] = {}

    def follow(self, code: pickletools.OpcodeInfo, argument: Any) -> None:
        """Follow one instruction."""
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
        if numbers > 4 * size:  # a tensor may be there under several names
            raise UntrustedError(f"{shown(name)} has {tensor.numel():,} numbers, and the file {size:,} bytes")


def _tensors(content: object, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, str(key) if isinstance(key, str | int) else type(key).__name__)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensors(value, name)
