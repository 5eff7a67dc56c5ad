"""Random numbers as a pure function of (seed, epoch, index): no state, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from lkd import devices

ORDER, SPLIT, PARTNER, SUBSET, IMAGE = 2**32 - 1, 2**32 - 2, 2**32 - 3, 2**32 - 4, 2**31
"""Streams of the training order, of the validation split, of the choice of another image of the same class, of the
order in which a limited evaluation takes its images, and the first of those that read an image.

Batch transforms draw from the streams 0, 1, 2, ... in their order.
"""

VIEW = 2**20
"""How far the streams of an image's next view lie behind those of this one."""

MIX = 2**19
"""How far behind a view's first stream those lie that mix it with another image; its transforms draw before."""

_WORD = 0xFFFFFFFF
_PIECE = 2**16  # indices hashed at a time: what fits a processor's cache
_TABLE = 2**26  # bytes of draws that are kept, at most


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10, a random bijection of 128-bit counters.

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
        # An int64 product wraps around, which leaves its 64 bits as those of the unsigned product. Only what
        # is multiplied must be free of higher bits; the rest is masked once, at the end.
        product = (even * multiplier).flip(0)
        even = ((product >> 32) ^ odd ^ round_key) & _WORD
        odd = product
        round_key = round_key + weyl
    return torch.stack((even[0], odd[0], even[1], odd[1])) & _WORD


def _words(seed: int, epoch: int | Tensor, index: Tensor, stream: int | Tensor) -> Tensor:
    zero = 0 * (index + epoch + stream)  # of the shape that all broadcast to
    counter = torch.stack([zero + word for word in (index & _WORD, index >> 32, epoch, stream)])
    return philox(counter, (seed & _WORD, seed >> 32 & _WORD))


def uniform(seed: int, epoch: int | Tensor, index: Tensor, stream: int | Tensor) -> Tensor:
    """Four uniform numbers for each sample, in [0, 1).

    Args:
        seed: Any integer; its low 64 bits count.
        epoch: Epoch of each sample, broadcast against `index`.
        index: Samples `(...)`, int64.
        stream: Tells apart numbers that serve different purposes, broadcast against `index`.

    Returns:
        `(..., 4)`, float32, multiples of 2^-24. That is as fine as float32 is just below 1, so that
        `floor(number * n)` never rounds up to `n`.

    Example:
        >>> uniform(seed=0, epoch=0, index=torch.tensor([0]), stream=0)
        tensor([[0.3990, 0.8805, 0.7357, 0.6055]])
    """
    words = _words(seed, epoch, index, stream) >> 8
    return words.movedim(0, -1).to(torch.float32) * 2.0**-24


def successive(seed: int, epoch: int | Tensor, index: Tensor, first: int, count: int) -> Tensor:
    """The draws of samples from successive streams, those of `uniform`.

    Args:
        seed: Any integer; its low 64 bits count.
        epoch: Epoch of each sample, broadcast against `index`.
        index: Samples `(B,)`, int64.
        first: The first stream.
        count: Number of streams.

    Returns:
        `(B, 4 * count)`, float32: one stream after the other.
    """
    streams = torch.arange(first, first + count, device=index.device)
    return uniform(seed, epoch, index, streams[:, None]).transpose(0, 1).flatten(1)


class Draws:
    """The draws of `successive`, made for all samples of an epoch at once and looked up batch by batch.

    That spares each batch some hundred small operations. The table is made when an epoch's second batch is asked for:
    the first may be its only one.

    Args:
        size: Number of samples.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._tables: dict[tuple[int, int], tuple[object, Tensor | None]] = {}
        self._single: tuple[Tensor, int] | None = None

    def __reduce__(self) -> tuple[type[Draws], tuple[int]]:
        return Draws, (self.size,)  # a worker makes its own

    def announce(self, epoch: Tensor, single: int) -> None:
        """Say that all values of a tensor are the same, which on a GPU cannot be seen without waiting for it.

        Args:
            epoch: The tensor that `__call__` will get, itself.
            single: Its value.
        """
        self._single = epoch, single

    def __call__(self, seed: int, epoch: Tensor, index: Tensor, first: int, count: int) -> Tensor:
        """See `successive`; here `epoch` is `(B,)`, int64."""
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
        """Make all tables that were asked for so far for another epoch, in place: a graph reads them at their address.

        Args:
            seed: As in `__call__`.
            epoch: The one epoch of the batches to come.
            device: Where the samples are.
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
        """The one value that a tensor has; None if there are several, or it is not known."""
        if self._single is not None and self._single[0] is epoch:
            return self._single[1]
        if epoch.is_cpu and len(epoch) and bool((epoch == epoch[0]).all()):
            return int(epoch[0])
        return None


def permutation(seed: int, epoch: int, size: int, stream: int = ORDER) -> Tensor:
    """A random order of `size` samples: they are sorted by a 63-bit hash of (seed, epoch, index).

    Unlike a generator seeded with `seed + epoch`, run 1 does not repeat the orders of run 0 an epoch early.

    Args:
        seed: Any integer; its low 64 bits count.
        epoch: Number of the epoch.
        size: Number of samples.
        stream: Tells apart orders that serve different purposes.

    Returns:
        `(size,)`, int64.
    """
    hashes = [torch.zeros(0, dtype=torch.int64)]
    for start in range(0, size, _PIECE):
        high, low = _words(seed, epoch, torch.arange(start, min(start + _PIECE, size)), stream)[:2]
        hashes.append((high << 31) | (low >> 1))
    return torch.cat(hashes).argsort(stable=True)
