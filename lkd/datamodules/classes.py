"""Images of the same class."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lkd.types import IGNORE_INDEX


class ClassIndex:
    """Index of images by class, which is computed on first use.

    Args:
        target: Class of every image of the source `(N,)`, int64.
        index: Positions in the source of the images to choose from `(M,)`, int64.
    """

    def __init__(self, target: Tensor, index: Tensor) -> None:
        self.target, self.index = target, index

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """Sort the images by class.

        Returns:
            The sorted images `(M,)`, and a table `(3, N)` with the rank of each image of the source, and the first rank
            and the size of its class.
        """
        target = self.target[self.index]
        name = torch.where(target == IGNORE_INDEX, -1 - self.index, target)  # images without a label are singletons
        _, group, size = torch.unique(name, return_inverse=True, return_counts=True)
        order = group.argsort(stable=True)
        table = torch.zeros(3, len(self.target), dtype=torch.int64, device=self.index.device)
        table[0, self.index[order]] = torch.arange(len(order), device=self.index.device)
        table[1:, self.index] = torch.stack((size.cumsum(0) - size, size))[:, group]
        return self.index[order], table

    def another(self, index: Tensor, draw: Tensor) -> Tensor:
        """Choose another image of the same class.

        Args:
            index: Positions in the source `(B,)`, int64.
            draw: Random numbers `(B,)`, uniform in [0, 1).

        Returns:
            Positions in the source `(B,)`; the image itself if it has no label or is the only one of its class.
        """
        order, table = self._table
        place, begin, size = table[:, index]
        step = 1 + (draw * (size - 1)).long()  # wraps around at the end of the class
        return order[begin + (place - begin + step) % size]
