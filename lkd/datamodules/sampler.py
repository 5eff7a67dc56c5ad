"""The samples that a process reads in an epoch, and their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lkd.datamodules.draws import permutation

_PADDING, _EPOCH = 39, 40  # bits


class Key(int):
    """Epoch, position and padding flag of a sample as one integer, which a sampler passes to `ImageDataset`.

    Creating a tuple per sample would dominate the time of the sampler. The epoch is part of the key because persistent
    workers do not know it otherwise. A plain position is the key of epoch 0.

    Args:
        epoch: Epoch, which together with the sample determines the augmentation.
        position: Position in the dataset, below 2^39.
        padding: Whether the sample only pads the share of a process and must not be counted.
    """

    def __new__(cls, epoch: int, position: int, padding: bool = False) -> Key:
        """Encode the three values as one number."""
        return super().__new__(cls, epoch << _EPOCH | padding << _PADDING | position)


def read_keys(keys: Sequence[int]) -> Tensor:
    """Decode keys.

    Args:
        keys: Keys of B samples.

    Returns:
        Epochs, positions, and 1 for padding `(3, B)`, int64.
    """
    whole = torch.tensor(keys, dtype=torch.int64)
    return torch.stack((whole >> _EPOCH, whole & (1 << _PADDING) - 1, whole >> _PADDING & 1))


class EpochSampler(DistributedSampler[int]):
    """Distribute the samples of an epoch among processes, in an order that is a function of (seed, epoch).

    It is a `DistributedSampler`, so Lightning does not replace it and calls `set_epoch`. If the samples cannot be
    divided evenly, a shuffled order continues with its first samples; any other order is extended with keys marked as
    padding.

    Args:
        dataset: The sampled dataset.
        num_replicas: Number of processes.
        rank: Rank of this process.
        shuffle: Whether the order is random.
        seed: Seed of the random order.
        padded: Whether all processes get the same number of samples. Otherwise some get one fewer, as in prediction.
        order: Fixed order, used without shuffling: positions `(N,)`, int64. `None` for the order of the dataset.

    Attributes:
        begin: Number of this process's samples to skip, because a resumed epoch has already processed them.
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
        """Return this process's share of the epoch: positions `(N,)`, int64, and which are padding `(N,)`, bool."""
        turn = torch.arange(self.rank, self.total_size, self.num_replicas)[self.begin :]
        position = turn % self.size
        if self.shuffle:
            return permutation(self.seed, self.epoch, self.size)[position], torch.zeros_like(turn, dtype=torch.bool)
        return position if self.order is None else self.order[position], turn >= self.size

    def __iter__(self) -> Iterator[int]:
        position, padding = self.deal()
        return iter((position | padding.long() << _PADDING | self.epoch << _EPOCH).tolist())
