"""Table of a teacher's logits for the images of a dataset."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkd._moved import renamed


@dataclass(frozen=True)
class Storage:
    """Storage format of logits.

    Args:
        dtype: Data type of the stored logits.
        top_k: Number of largest logits to store; the remaining probability is spread evenly over the other classes.
            `None` stores all logits.
    """

    dtype: torch.dtype
    top_k: int | None = None

    def pack(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Convert logits to the storage format.

        Args:
            logits: Logits `(..., K)`.

        Returns:
            All logits `(..., K)`; or, with `top_k`, two tensors: the `top_k` largest logits followed by the common
            logit of all other classes `(..., top_k + 1)`, and the classes of the largest logits `(..., top_k)` as
            int32.
        """
        classes = logits.shape[-1]
        if self.top_k is None or self.top_k >= classes:
            return (logits.to(self.dtype),)
        largest, place = logits.float().topk(self.top_k, dim=-1)
        rest = logits.float().scatter(-1, place, -math.inf).logsumexp(-1, keepdim=True)
        each = rest - math.log(classes - self.top_k)
        return torch.cat((largest, each), -1).to(self.dtype), place.to(torch.int32)

    def unpack(self, stored: tuple[Tensor, ...], num_classes: int) -> Tensor:
        """Convert stored logits back to float32 logits `(..., K)`.

        Args:
            stored: Result of `pack`.
            num_classes: Number of classes K.
        """
        values = stored[0].float()
        if len(stored) == 1:
            return values
        everywhere = values[..., -1:].expand(*values.shape[:-1], num_classes)
        return everywhere.scatter(-1, stored[1].long(), values[..., :-1])


class LogitTable:
    """Table of stored logits with one row per image.

    Args:
        storage: Storage format.
        stored: Stored tensors, each `(M, views, ...)`.
        index: Index of the image of each row in the dataset `(M,)`, int64.
        num_classes: Number of classes.
        device: Device of the table.
    """

    def __init__(
        self, storage: Storage, stored: tuple[Tensor, ...], index: Tensor, num_classes: int, device: torch.device
    ) -> None:
        self.storage, self.num_classes = storage, num_classes
        self.stored = tuple(part.to(device) for part in stored)
        self.seen = torch.zeros(len(index), dtype=torch.bool, device=device)
        self._row = torch.zeros(int(index.max()) + 1, dtype=torch.int64)
        self._row[index] = torch.arange(len(index))
        self._row = self._row.to(device)

    def load(self, stored: tuple[Tensor, ...]) -> bool:
        """Replace the contents of the table in place.

        Args:
            stored: Stored tensors, as in the constructor.

        Returns:
            Whether shapes and dtypes match. If not, nothing is changed.
        """
        pairs = list(zip(self.stored, stored, strict=False))
        if len(stored) != len(self.stored) or any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in pairs):
            return False
        for own, new in pairs:
            own.copy_(new)
        self.seen.fill_(False)
        return True

    def write(self, index: Tensor, logits: Tensor) -> None:
        """Store the logits of images.

        Args:
            index: Indices of the images in the dataset `(B,)`.
            logits: Logits `(views * B, K)`; the first views of all images come first.
        """
        row = self._row[index]
        for part, new in zip(self.stored, self.storage.pack(_by_image(logits, len(index))), strict=True):
            part[row] = new
        self.seen.index_fill_(0, row, True)

    def read(self, index: Tensor) -> Tensor:
        """Return the logits of images.

        Args:
            index: Indices of the images in the dataset `(B,)`.

        Returns:
            Float32 logits `(views * B, K)`; the first views of all images come first.
        """
        row = self._row[index]
        logits = self.storage.unpack(tuple(part[row] for part in self.stored), self.num_classes)
        return logits.transpose(0, 1).flatten(0, 1)


def _by_image(logits: Tensor, size: int) -> Tensor:
    return logits.view(-1, size, logits.shape[-1]).transpose(0, 1)


class SharedRows:
    """Memory-mapped table that several processes fill, each with its own rows.

    The memory is released with the last process that uses it.

    Args:
        rows: Number of rows.
        like: Tensors `(1, ...)` with the dtypes and shapes of the parts of a row.
        file: Path of a file created by `reserve`.
    """

    def __init__(self, rows: int, like: tuple[Tensor, ...], file: str) -> None:
        size = self.size(rows, like)
        whole = torch.from_file(file, shared=True, size=size, dtype=torch.uint8)
        lengths = [_padded(rows * _row_bytes(part)) for part in (*like, _SEEN)]
        parts = torch.split(whole, lengths)
        *stored, seen = (
            part[: rows * _row_bytes(row)].view(row.dtype).view(rows, *row.shape[1:])
            for part, row in zip(parts, (*like, _SEEN), strict=True)
        )
        self.stored: tuple[Tensor, ...] = tuple(stored)
        self.seen: Tensor = seen

    @staticmethod
    def size(rows: int, like: tuple[Tensor, ...]) -> int:
        """Return the size of the table in bytes, including one byte per row that marks it as written."""
        return sum(_padded(rows * _row_bytes(part)) for part in (*like, _SEEN))

    @staticmethod
    def reserve(folder: Path, size: int) -> str:
        """Create a file of zeros and allocate its disk space.

        The space is allocated in advance because writing to mapped memory cannot report a full disk.

        Args:
            folder: Folder of the file, which is created if it does not exist.
            size: Size in bytes.

        Returns:
            Path of the file.

        Raises:
            OSError: If there is not enough space, or if the folder is not writable.
        """
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=".filling.", dir=folder)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
            else:  # macOS
                for start in range(0, size, _PIECE):
                    os.write(handle, bytes(min(_PIECE, size - start)))
        except BaseException:
            Path(path).unlink()
            raise
        finally:
            os.close(handle)
        return path


_PIECE = 2**24
_SEEN = torch.zeros(1, dtype=torch.bool)


def _row_bytes(row: Tensor) -> int:
    return row[0].numel() * row.element_size()


def _padded(size: int) -> int:
    return -(-size // 64) * 64


def __getattr__(name: str) -> Any:
    """Provide former names."""
    return renamed(__name__, name)
