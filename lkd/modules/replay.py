"""Modules whose training steps a captured graph can take."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, MutableMapping
from typing import Any, Protocol

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from lkd.types import Batch


class EvalReplay(Protocol):
    """Measures validation batches: `lkd.callbacks.eval_graph.EvalGraph`."""

    def update(self, metrics: MutableMapping[str, Metric], batch: Batch) -> bool:
        """Measure one batch as `update_metrics` does; whether that was done."""


class StepReplay(Protocol):
    """Takes whole training steps: `lkd.callbacks.step_graph.StepGraph`."""

    def prepare(self, batch: Batch) -> bool:
        """Get ready for a batch; whether its step is to be taken by `run`."""

    def run(self, batch: Batch) -> tuple[tuple[str, ...], Tensor]:
        """Take a step; the names and values `(C,)` of what `training_values` computes."""


class ReplayableModule(L.LightningModule):
    """A LightningModule whose training steps and validation batches can be replays of captured graphs.

    Lightning's automatic optimization stays in charge. In a step that is a replay, `training_step` runs the graph. The
    graph includes the backward pass and the optimizer's update, so the hooks for these do nothing.
    """

    step_graph: StepReplay | None = None
    """Takes training steps in place of `training_values`, `backward` and the optimizer: for a callback (`Speed`)."""
    eval_graph: EvalReplay | None = None
    """Measures validation batches in place of `update_metrics`, where it can: for a callback (`Speed`)."""
    _replays = False  # whether the current step is a replay of `step_graph`

    @abstractmethod
    def unpack(self, batch: Any) -> Batch:
        """Convert what the data module gave to a `Batch`.

        Args:
            batch: One batch.
        """

    @abstractmethod
    def training_values(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss and everything else that is logged of a training step.

        Args:
            batch: One batch.

        Returns:
            Name to scalar: `loss`, with its gradient, comes first.
        """

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Get the graph of the step ready, where there is one: all callbacks have prepared the step by now."""
        self._replays = False  # to capture, `prepare` takes ordinary steps
        if self.step_graph is not None:
            self._replays = self.step_graph.prepare(self.unpack(batch))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients, unless a graph has done it already."""
        if not self._replays:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients, unless a graph has done it already."""
        if not self._replays:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Update the weights; where a graph does it, only run the step."""
        if self._replays and optimizer_closure is not None:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
