"""Training batches that are created on a GPU by replaying a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lkd._compat import tree_leaves, tree_map_only
from lkd.datamodules.dataset import ImageDataset
from lkd.devices.capture import Capture
from lkd.types import Batch


class BatchGraph:
    """Capture the creation of a batch on a GPU as a graph and replay it: a single launch instead of dozens.

    A replayed batch is compared bitwise with an ordinary one before the graph is used. If they differ, or if the
    creation of a batch cannot be captured (such as a custom transform that reads its random numbers on the host),
    batches are created without a graph.

    Args:
        dataset: Images on a GPU.
        capture: Capture implementation of the device.
        size: Number of images per batch; batches of other sizes are created without a graph.

    Attributes:
        batch: Batch that each replay overwrites; `None` before the first replay.
    """

    def __init__(self, dataset: ImageDataset, capture: Capture, size: int) -> None:
        self.dataset, self.capture, self.size = dataset, capture, size
        self.batch: Batch | None = None
        self._is_possible = True
        self._replay: Callable[[], Any] | None = None
        self._position = torch.zeros(size, dtype=torch.int64, device=dataset.index.device)
        self._version = torch.zeros_like(self._position)
        self._captured_settings = ""
        self._number: int | None = None  # variant for which the static tensors are filled

    def take(self, epoch: int, position: Tensor) -> Batch:
        """Return samples of one epoch, as `ImageDataset.take` does. The next call overwrites them.

        Args:
            epoch: Number of the epoch.
            position: Positions in the dataset `(B,)`, int64, on its device.
        """
        if self._is_possible and len(position) == self.size:
            self._position.copy_(position)
            number = self.dataset.version_in(epoch)
            if number != self._number and self._settings() != self._captured_settings:
                self._replay = None  # a callback changed the augmentation
            if self._replay is None:
                self._try_capture(number)
                self._position.copy_(position)
            if self._replay is not None:
                self._begin(number)
                self._replay()
                return self.batch  # type: ignore[return-value]
        return self.dataset.take(epoch, position)

    def _begin(self, number: int) -> None:
        """Update the inputs that differ between epochs: the variant of the images and the random draws."""
        if number != self._number:
            self._number = number
            self._version.fill_(number)
            self.dataset.draw_for(self._version, number)

    def _try_capture(self, number: int) -> None:
        try:
            self._begin(number)
            self.capture.warm_up(self._make)  # the dataset records which draws it needs,
            self._number = None
            self._begin(number)  # and creates them here
            self._captured_settings = self._settings()
            self.batch, self._replay = self.capture.capture(self._make)
            self._position.copy_(self._position.flip(0))  # different images from those that the capture may have made
            usual = tree_map_only(Tensor, torch.clone, self._make())
            self._replay()
            pairs = zip(tree_leaves(usual), tree_leaves(self.batch), strict=True)
            if all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs):
                return
            reason = "a replayed batch differs from an ordinary one"
        except Exception as error:  # a custom transform may raise anything; an ordinary batch raises it again
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self._is_possible, self._replay, self.batch = False, None, None
        rank_zero_warn(f"training batches are created without a graph ({reason})")

    def _settings(self) -> str:
        """Return a text with all numbers of the augmentation, which are constants in a graph."""
        return repr((self.dataset.augment, self.dataset.mix, self.dataset.views, self.dataset.seed))

    def _make(self) -> Batch:
        return self.dataset.make(self._version, self.dataset.index.index_select(0, self._position))
