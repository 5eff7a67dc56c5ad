"""A teacher's logits for the images of a data set, in a table."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Storage:
    """How logits are stored.

    Args:
        dtype: Type of a logit.
        top_k: How many of the largest are stored; the others' probability is spread evenly over them. None: all.
    """

    dtype: torch.dtype
    top_k: int | None = None

    def pack(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Logits as they are stored.

        Args:
            logits: `(..., K)`.

        Returns:
            All logits `(..., K)`; or the `top_k` largest with, as the last, what each of the others is given
            `(..., top_k + 1)`, and the classes of the largest `(..., top_k)`, int32.
        """
        classes = logits.shape[-1]
        if self.top_k is None or self.top_k >= classes:
            return (logits.to(self.dtype),)
        largest, place = logits.float().topk(self.top_k, dim=-1)
        rest = logits.float().scatter(-1, place, -math.inf).logsumexp(-1, keepdim=True)
        each = rest - math.log(classes - self.top_k)
        return torch.cat((largest, each), -1).to(self.dtype), place.to(torch.int32)

    def unpack(self, stored: tuple[Tensor, ...], num_classes: int) -> Tensor:
        """The logits `(..., K)`, float32.

        Args:
            stored: What `pack` returned.
            num_classes: K.
        """
        values = stored[0].float()
        if len(stored) == 1:
            return values
        everywhere = values[..., -1:].expand(*values.shape[:-1], num_classes)
        return everywhere.scatter(-1, stored[1].long(), values[..., :-1])


class Answers:
    """Rows of stored logits, one for each image.

    Args:
        storage: How they are stored.
        stored: What there is, each `(M, views, ...)`.
        index: Position of each row's image in the source `(M,)`, int64.
        num_classes: Number of classes.
        device: Where they are wanted.
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
        """Replace the rows by others, in the same memory.

        Args:
            stored: As for the constructor.

        Returns:
            Whether they have the same shapes and types; if not, nothing is changed.
        """
        pairs = list(zip(self.stored, stored, strict=False))
        if len(stored) != len(self.stored) or any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in pairs):
            return False
        for own, new in pairs:
            own.copy_(new)
        self.seen.fill_(False)
        return True

    def write(self, index: Tensor, logits: Tensor) -> None:
        """Store logits.

        Args:
            index: Positions of images in the source `(B,)`.
            logits: `(views * B, K)`, all first views first.
        """
        row = self._row[index]
        for part, new in zip(self.stored, self.storage.pack(_by_image(logits, len(index))), strict=True):
            part[row] = new
        self.seen.index_fill_(0, row, True)

    def read(self, index: Tensor) -> Tensor:
        """The logits of images.

        Args:
            index: Positions of images in the source `(B,)`.

        Returns:
            `(views * B, K)`, float32, all first views first.
        """
        row = self._row[index]
        logits = self.storage.unpack(tuple(part[row] for part in self.stored), self.num_classes)
        return logits.transpose(0, 1).flatten(0, 1)


def _by_image(logits: Tensor, size: int) -> Tensor:
    return logits.view(-1, size, logits.shape[-1]).transpose(0, 1)


class SharedRows:
    """Memory that several processes write to, each its own rows. It vanishes with the last of them.

    Args:
        rows: Number of rows.
        like: Types and shapes of a row's parts, as tensors `(1, ...)`.
        file: An open file's path, made by `reserve`.
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
        """Bytes that are needed, with one more for each row, that says whether it was written."""
        return sum(_padded(rows * _row_bytes(part)) for part in (*like, _SEEN))

    @staticmethod
    def reserve(folder: Path, size: int) -> str:
        """Make a file of zeros that has its place on the disk: mapped memory cannot say that there is none.

        Args:
            folder: Where; it is made.
            size: In bytes.

        Returns:
            The file's path.

        Raises:
            OSError: If there is no room, or the folder cannot be written.
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
