"""Which samples a process reads in an epoch, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import repeat
from typing import NamedTuple, cast

import torch
from torch.utils.data import Dataset, DistributedSampler

from lkd.datamodules.draws import permutation


class Key(NamedTuple):
    """What a sampler asks of an `ImageDataset`.

    The epoch travels with the sample, so that workers which outlive an epoch know it.

    Attributes:
        epoch: Decides the augmentation, together with the sample.
        position: Position in the data set.
        padding: Whether the sample only fills up a process's share and must not be counted.
    """

    epoch: int
    position: int
    padding: bool = False


class EpochSampler(DistributedSampler[Key]):
    """Deals the samples of an epoch out to the processes; the order is a function of (seed, epoch).

    A `DistributedSampler`, so that Lightning leaves it in place and calls `set_epoch`. Where the samples do
    not divide among the processes, a shuffled order begins again from its start, and one in sequence is
    filled up with keys marked as padding.

    Args:
        dataset: What is sampled from.
        num_replicas: Number of processes.
        rank: Number of this process.
        shuffle: Random order instead of the data set's own.
        seed: Seed of the random order.
        padded: Whether all processes get as many samples; without, some have one less, as prediction may.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        padded: bool = True,
    ) -> None:
        super().__init__(cast("Dataset[object]", dataset), num_replicas, rank, shuffle=shuffle, seed=seed)
        self.size = len(dataset)
        if not padded:
            self.total_size, self.num_samples = self.size, len(range(rank, self.size, num_replicas))

    def __iter__(self) -> Iterator[Key]:
        position = torch.arange(self.rank, self.total_size, self.num_replicas)
        index = position % self.size
        if self.shuffle:
            index = permutation(self.seed, self.epoch, self.size)[index]
            padding = torch.zeros_like(position, dtype=torch.bool)
        else:
            padding = position >= self.size
        # A third of the time of calling Key for each.
        return map(Key._make, zip(repeat(self.epoch), index.tolist(), padding.tolist(), strict=False))
