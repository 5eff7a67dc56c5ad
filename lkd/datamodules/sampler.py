"""Which samples a process reads in an epoch, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lkd.datamodules.draws import permutation

_PADDING, _EPOCH = 39, 40  # bits


class Key(int):
    """What a sampler asks of an `ImageDataset`: one number, as a tuple for each sample would take most of its time.

    The epoch travels with the sample, so that workers which outlive an epoch know it. A plain position is the key of
    epoch 0.

    Args:
        epoch: Decides the augmentation, together with the sample.
        position: Position in the data set, below 2^39.
        padding: Whether the sample only fills up a process's share and must not be counted.
    """

    def __new__(cls, epoch: int, position: int, padding: bool = False) -> Key:
        """Put the three into one number."""
        return super().__new__(cls, epoch << _EPOCH | padding << _PADDING | position)


def read_keys(keys: Sequence[int]) -> Tensor:
    """What keys say.

    Args:
        keys: B of them.

    Returns:
        `(3, B)`, int64: epochs, positions, and 1 for padding.
    """
    whole = torch.tensor(keys, dtype=torch.int64)
    return torch.stack((whole >> _EPOCH, whole & (1 << _PADDING) - 1, whole >> _PADDING & 1))


class EpochSampler(DistributedSampler[int]):
    """Deals the samples of an epoch out to the processes; the order is a function of (seed, epoch).

    A `DistributedSampler`, so that Lightning leaves it in place and calls `set_epoch`. Where the samples do
    not divide among the processes, a shuffled order begins again from its start; any other is filled up with keys
    marked as padding.

    Args:
        dataset: What is sampled from.
        num_replicas: Number of processes.
        rank: Number of this process.
        shuffle: Random order instead of the data set's own.
        seed: Seed of the random order.
        padded: Whether all processes get as many samples; without, some have one less, as prediction may.
        order: Positions in the order of every epoch `(N,)`, int64, where nothing is shuffled; None: the data set's own.

    Attributes:
        begin: How many of this process's samples are left out at the start: they have been seen.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        padded: bool = True,
        order: Tensor | None = None,
    ) -> None:
        super().__init__(cast("Dataset[object]", dataset), num_replicas, rank, shuffle=shuffle, seed=seed)
        self.size, self.begin, self.order = len(dataset), 0, order
        if not padded:
            self.total_size, self.num_samples = self.size, len(range(rank, self.size, num_replicas))

    def deal(self) -> tuple[Tensor, Tensor]:
        """This process's share of the epoch: positions `(N,)`, int64, and whether each only fills up `(N,)`, bool."""
        turn = torch.arange(self.rank, self.total_size, self.num_replicas)[self.begin :]
        position = turn % self.size
        if self.shuffle:
            return permutation(self.seed, self.epoch, self.size)[position], torch.zeros_like(turn, dtype=torch.bool)
        return position if self.order is None else self.order[position], turn >= self.size

    def __iter__(self) -> Iterator[int]:
        position, padding = self.deal()
        return iter((position | padding.long() << _PADDING | self.epoch << _EPOCH).tolist())
