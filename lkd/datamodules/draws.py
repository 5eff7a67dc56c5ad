"""Random numbers as a pure function of (seed, epoch, index): stateless and identical on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from lkd import devices

ORDER, SPLIT, PARTNER, SUBSET, IMAGE = 2**32 - 1, 2**32 - 2, 2**32 - 3, 2**32 - 4, 2**31
"""Streams of the training order, the validation split, the choice of another image of the same class, the order of
images in a limited evaluation, and the first of those that read an image.

Batch transforms use the streams 0, 1, 2, ... in order.
"""

VIEW = 2**20
"""Offset between the streams of one view of an image and the next."""

MIX = 2**19
"""Offset within a view of the streams that mix the image with another one; its transforms use earlier streams."""

_WORD = 0xFFFFFFFF
_PIECE = 2**16  # indices hashed at a time, to fit into a processor cache
_TABLE = 2**26  # maximum size of a table of draws, in bytes


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Apply Philox4x32-10, a random bijection of 128-bit counters.

    Args:
        counter: Four 32-bit words `(4, ...)`, int64.
        key: Two 32-bit words.

    Returns:
        Four random 32-bit words `(4, ...)`, int64.

    References:
        Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 3.3.
    """
    pair = (2, *[1] * (counter.dim() - 1))
    weyl, multiplier, round_key = (
        devices.constant(words, torch.int64, counter.device).view(pair)
        for words in ((0x9E3779B9, 0xBB67AE85), (0xD2511F53, 0xCD9E8D57), key)
    )
    even, odd = counter[0::2], counter[1::2]
    for _ in range(10):
        # An int64 product wraps around, so its 64 bits equal those of the unsigned product. Only the factors must be
        # free of higher bits; the rest is masked once, at the end.
        product = (even * multiplier).flip(0)
        even = ((product >> 32) ^ odd ^ round_key) & _WORD
        odd = product
        round_key = round_key + weyl
    return torch.stack((even[0], odd[0], even[1], odd[1])) & _WORD


def _words(seed: int, epoch: int | Tensor, index: Tensor, stream: int | Tensor) -> Tensor:
    zero = 0 * (index + epoch + stream)  # has the broadcast shape
    counter = torch.stack([zero + word for word in (index & _WORD, index >> 32, epoch, stream)])
    return philox(counter, (seed & _WORD, seed >> 32 & _WORD))


def uniform(seed: int, epoch: int | Tensor, index: Tensor, stream: int | Tensor) -> Tensor:
    """Draw four uniform numbers in [0, 1) for each sample.

    Args:
        seed: Any integer; its low 64 bits are used.
        epoch: Epoch of each sample, broadcast against `index`.
        index: Samples `(...)`, int64.
        stream: Distinguishes numbers that serve different purposes, broadcast against `index`.

    Returns:
        Random numbers `(..., 4)`, float32, multiples of 2^-24. This is the resolution of float32 just below 1, so
        `floor(number * n)` never rounds up to `n`.

    Example:
        >>> uniform(seed=0, epoch=0, index=torch.tensor([0]), stream=0)
        tensor([[0.3990, 0.8805, 0.7357, 0.6055]])
    """
    words = _words(seed, epoch, index, stream) >> 8
    return words.movedim(0, -1).to(torch.float32) * 2.0**-24


def successive(seed: int, epoch: int | Tensor, index: Tensor, first: int, count: int) -> Tensor:
    """Draw the numbers of `uniform` from successive streams.

    Args:
        seed: Any integer; its low 64 bits are used.
        epoch: Epoch of each sample, broadcast against `index`.
        index: Samples `(B,)`, int64.
        first: The first stream.
        count: Number of streams.

    Returns:
        Random numbers `(B, 4 * count)`, float32: one stream after the other.
    """
    streams = torch.arange(first, first + count, device=index.device)
    return uniform(seed, epoch, index, streams[:, None]).transpose(0, 1).flatten(1)


class Draws:
    """Compute the numbers of `successive` for all samples of an epoch at once and look them up batch by batch.

    This saves about a hundred small operations per batch. The table is computed on the second batch of an epoch, as the
    first may be the only one.

    Args:
        size: Number of samples.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._tables: dict[tuple[int, int], tuple[object, Tensor | None]] = {}
        self._single: tuple[Tensor, int] | None = None

    def __reduce__(self) -> tuple[type[Draws], tuple[int]]:
        return Draws, (self.size,)  # each worker computes its own tables

    def announce(self, epoch: Tensor, single: int) -> None:
        """Record that all values of a tensor are equal, which on a GPU cannot be checked without a synchronization.

        Args:
            epoch: The tensor object that is passed to `__call__`.
            single: Its value.
        """
        self._single = epoch, single

    def __call__(self, seed: int, epoch: Tensor, index: Tensor, first: int, count: int) -> Tensor:
        """Draw numbers as `successive` does; `epoch` is `(B,)`, int64."""
        single = self._value(epoch)
        if single is None or self.size * count * 16 > _TABLE:
            return successive(seed, epoch, index, first, count)
        wanted = (seed, single, index.device)
        found, table = self._tables.get((first, count), (None, None))
        if found != wanted:
            self._tables[first, count] = wanted, None
            return successive(seed, epoch, index, first, count)
        if table is None:
            table = self._table(seed, single, index.device, first, count)
            self._tables[first, count] = wanted, table
        return table.index_select(0, index)

    def _table(self, seed: int, epoch: int, device: torch.device, first: int, count: int) -> Tensor:
        pieces = torch.arange(self.size, device=device).split(_PIECE)  # type: ignore[no-untyped-call]
        return torch.cat([successive(seed, epoch, piece, first, count) for piece in pieces])

    def refill(self, seed: int, epoch: int, device: torch.device) -> None:
        """Recompute all tables requested so far for another epoch, in place: a graph reads them at a fixed address.

        Args:
            seed: Seed as in `__call__`.
            epoch: The single epoch of the next batches.
            device: Device of the samples.
        """
        wanted = (seed, epoch, device)
        for (first, count), (found, table) in self._tables.items():
            if found == wanted and table is not None:
                continue
            fresh = self._table(seed, epoch, device, first, count)
            if table is not None and table.device == fresh.device:
                fresh = table.copy_(fresh)
            self._tables[first, count] = wanted, fresh

    def _value(self, epoch: Tensor) -> int | None:
        """Return the single value of a tensor; `None` if there are several or it is unknown."""
        if self._single is not None and self._single[0] is epoch:
            return self._single[1]
        if epoch.is_cpu and len(epoch) and bool((epoch == epoch[0]).all()):
            return int(epoch[0])
        return None


def permutation(seed: int, epoch: int, size: int, stream: int = ORDER) -> Tensor:
    """Return a random order of `size` samples, sorted by a 63-bit hash of (seed, epoch, index).

    Unlike with a generator seeded with `seed + epoch`, the orders of seed 1 do not repeat those of seed 0 one epoch
    earlier.

    Args:
        seed: Any integer; its low 64 bits are used.
        epoch: Number of the epoch.
        size: Number of samples.
        stream: Distinguishes orders that serve different purposes.

    Returns:
        Positions `(size,)`, int64.
    """
    hashes = [torch.zeros(0, dtype=torch.int64)]
    for start in range(0, size, _PIECE):
        high, low = _words(seed, epoch, torch.arange(start, min(start + _PIECE, size)), stream)[:2]
        hashes.append((high << 31) | (low >> 1))
    return torch.cat(hashes).argsort(stable=True)
