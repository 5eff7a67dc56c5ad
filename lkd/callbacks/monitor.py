"""Summaries of the networks, training speed, and the layout of the charts in TensorBoard."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode

from lkd._compat import tree_map
from lkd.features.layers import evaluating
from lkd.tasks import Task


def _layout(task: Task) -> dict[str, dict[str, list[str | list[str]]]]:
    """Return TensorBoard's layout of the curves, with the main metric of the task first."""
    name = task.metric
    main = [f"{who}{name}" for who in ("train/", "val/", "val/teacher_", "val/knn_", "val/probe_")]
    return {
        "lkd": {
            task.metric_title: ["Multiline", main],
            "loss": ["Multiline", ["train/loss", "val/loss"]],
            "terms of the training loss": ["Multiline", ["train/(?!acc$|images_per_s$)"]],
            "terms of the validation loss": ["Multiline", [f"val/(?!loss$|agreement$|.*acc|.*{name})"]],
            "agreement with the teacher": ["Multiline", ["val/agreement"]],
        }
    }


class NetworkSize(NamedTuple):
    """Cost of a network.

    Attributes:
        name: Name of the network in the module.
        kind: Class name.
        parameters: Number of parameters.
        flops: Floating-point operations for one input; `None` if unknown.
    """

    name: str
    kind: str
    parameters: int
    flops: int | None


def network_size(name: str, network: nn.Module, example: Any | None) -> NetworkSize:
    """Count the parameters of a network and its floating-point operations for one input.

    Args:
        name: Name of the network in the result.
        network: Any module.
        example: One input `(1, ...)`. If `None`, operations are not counted.

    Returns:
        The counts. A multiply-add counts as two operations.
    """
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if example is None:
        return NetworkSize(name, type(network).__name__, parameters, None)
    example = fitting(example, network)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused transformer layers are not counted
    try:
        with torch.no_grad(), evaluating(network), FlopCounterMode(display=False) as counter:
            network(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    if isinstance(network, FSDPModule):  # it holds the unsharded weights until the next backward pass
        network.reshard()
    return NetworkSize(name, type(network).__name__, parameters, counter.get_total_flops())


def fitting(example: Any, network: nn.Module) -> Any:
    """Move an input to the device of a network, and convert its floating-point tensors to the network's dtype.

    Args:
        example: A tensor, or dicts, lists and tuples of tensors.
        network: Any module.
    """
    like = next((weight for weight in network.parameters() if weight.is_floating_point()), torch.empty(0))

    def fit(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(like.device, like.dtype if leaf.is_floating_point() else leaf.dtype)

    return tree_map(fit, example)


class NetworkSummary(L.Callback):
    """Show the parameters and operations of the networks in the terminal and in TensorBoard when `fit` starts.

    In TensorBoard, a custom layout (tab Custom Scalars) overlays the curves of training, validation and teacher.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Count in all processes, since a sharded network requires all of them; print and log on rank zero."""
        example = pl_module.example_input()
        sizes = [network_size(name, getattr(pl_module, name), example) for name in pl_module.network_names]
        self._show(trainer, sizes, pl_module.task)

    @rank_zero_only
    def _show(self, trainer: L.Trainer, sizes: list[NetworkSize], task: Task) -> None:
        table = Table("", "network", "parameters", "MFLOP per image", title_justify="left")
        rows = [(size.name, size.kind, f"{size.parameters:,}", _mega(size.flops)) for size in sizes]
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                lines = ["| | network | parameters | MFLOP per image |", "|---|---|---|---|"]
                lines += [f"| {' | '.join(row)} |" for row in rows]
                logger.experiment.add_text("networks", "\n".join(lines))
                logger.experiment.add_custom_scalars(_layout(task))


def _mega(flops: int | None) -> str:
    return "?" if flops is None else f"{flops / 1e6:,.2f}"


class ImagesPerSecond(L.Callback):
    """Log `train/images_per_s`, the training throughput over all processes, once per epoch, without validation."""

    def __init__(self) -> None:
        self._images = 0
        self._seconds = 0.0
        self._since = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start counting."""
        self._images, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the images of a batch and the time since the end of the previous one."""
        now = time.perf_counter()
        unpacked = pl_module.unpack(batch)
        self._images += len(unpacked.target) // unpacked.views
        self._seconds, self._since = self._seconds + now - self._since, now

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Exclude the time of the validation."""
        self._since = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the throughput of the epoch."""
        if self._seconds:
            pl_module.log("train/images_per_s", trainer.world_size * self._images / self._seconds, sync_dist=True)
