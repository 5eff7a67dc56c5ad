"""Modules whose training steps can be replayed from a captured graph."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, MutableMapping
from typing import Any, Protocol

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from lkd._compat import ModuleHooks
from lkd.modules.meter import ValueName
from lkd.types import Batch


class EvalReplay(Protocol):
    """Evaluation of validation batches by a captured graph; implemented by `lkd.callbacks.eval_graph.EvalGraph`."""

    def update(self, metrics: MutableMapping[str, Metric], batch: Batch) -> bool:
        """Update the metrics as `update_metrics` does, and return whether this was possible."""


class StepReplay(Protocol):
    """Execution of whole training steps by a captured graph; implemented by `lkd.callbacks.step_graph.StepGraph`."""

    def prepare(self, batch: Batch) -> bool:
        """Prepare for a batch, and return whether `run` should execute its step."""

    def run(self, batch: Batch) -> tuple[tuple[ValueName, ...], Tensor]:
        """Execute a step, and return the names and values `(C,)` that `training_values` computes."""


class ReplayableModule(ModuleHooks, L.LightningModule):
    """A LightningModule whose training steps and validation batches can be replays of captured graphs.

    Lightning's automatic optimization remains in use. In a replayed step, `training_step` runs the graph. The graph
    includes the backward pass and the optimizer's update, so the hooks for these do nothing.
    """

    step_graph: StepReplay | None = None
    """Executes training steps instead of `training_values`, `backward` and the optimizer; set by `Speed`."""
    eval_graph: EvalReplay | None = None
    """Evaluates validation batches instead of `update_metrics` where possible; set by `Speed`."""
    _replays = False  # whether the current step is a replay of `step_graph`

    @abstractmethod
    def read(self, batch: Any) -> Batch:
        """Convert a batch from the data module to a `Batch` that the task understands.

        Args:
            batch: One batch.
        """

    @abstractmethod
    def training_values(self, batch: Batch) -> dict[ValueName, Tensor]:
        """Compute the loss and all other logged values of a training step.

        Args:
            batch: One batch.

        Returns:
            A mapping from names to scalars. The loss, which carries the gradient, comes first.
        """

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Prepare the step graph, if there is one; at this point all callbacks have prepared the step."""
        self._replays = False  # `prepare` runs ordinary steps to capture the graph
        if self.step_graph is not None:
            self._replays = self.step_graph.prepare(self.read(batch))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients, unless a graph has already computed them."""
        if not self._replays:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients, unless a graph has already cleared them."""
        if not self._replays:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Update the weights; if a graph updates them, only call the closure, which runs the graph."""
        if self._replays and optimizer_closure is not None:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
