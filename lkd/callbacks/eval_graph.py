"""Validation steps as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lkd import devices
from lkd._compat import default_states, set_update_count, tree_map_only, update_count
from lkd.callbacks.graph_constants import constants_of, numbers_of
from lkd.devices.capture import Capture, copy_into, signature
from lkd.types import Batch

_TOLERANCE = 1e-4


class _Captured(NamedTuple):
    """A captured update of the metrics.

    Attributes:
        batch: Static batch that the graph reads.
        update: The captured function.
        replay: Replays the graph.
        updated: Metrics that the update changes.
    """

    batch: Batch
    update: Callable[[], None]
    replay: Callable[[], Any]
    updated: list[Metric]


class EvalGraph:
    """Captures the validation step of a module as a graph, once per batch shape, and replays it.

    The graph contains the networks and the metrics, whose states stay at fixed addresses during validation. At the
    beginning of each validation, every graph is checked: a replay and an ordinary update from the same states must
    agree. If they do not, or if the update cannot be captured because a metric keeps lists or synchronizes with the
    device, validation continues without graphs.

    Args:
        module: A `ClassificationModule`.
        capture: Capture implementation of the device.
    """

    def __init__(self, module: Any, capture: Capture) -> None:
        self.module, self.capture = module, capture
        self._is_possible = True
        self._graphs: dict[tuple[Any, ...], _Captured] = {}
        self._states: list[tuple[Metric, str, Tensor]] = []
        self._constants: tuple[Any, ...] = ()
        self._checked: set[tuple[Any, ...]] = set()  # graphs that passed the check in this validation

    def begin(self) -> None:
        """Prepare for a validation.

        Graphs are discarded if anything they depend on has changed since the last validation, and their checks are
        reset.
        """
        names = tuple(self.module.stage_metrics("val"))
        constants = constants_of(self.module), numbers_of(self.module, public=True), names
        if constants != self._constants:
            self._graphs, self._states, self._constants = {}, [], constants
        self._checked.clear()

    def update(self, metrics: MutableMapping[str, Metric], batch: Batch) -> bool:
        """Update the metrics with a batch by replaying a graph.

        Args:
            metrics: Metrics of the stage, by name.
            batch: The batch.

        Returns:
            Whether the metrics were updated. If not, the caller must update them in the ordinary way.
        """
        if not self._is_possible:
            return False
        name = signature(batch)
        if name not in self._checked:
            self._try(metrics, batch, name)
        if name not in self._graphs:
            return False
        captured = self._graphs[name]
        self._fix_states()
        copy_into(captured.batch, batch)
        captured.replay()
        for metric in captured.updated:  # as torchmetrics does in an update
            set_update_count(metric, update_count(metric) + 1)
        return True

    def _fix_states(self) -> None:
        """Move the metric states back to the memory that the graphs use, since a reset creates new tensors."""
        for metric, name, static in self._states:
            current = getattr(metric, name)
            if current is not static:
                static.copy_(current)
                setattr(metric, name, static)

    def _try(self, metrics: MutableMapping[str, Metric], batch: Batch, name: tuple[Any, ...]) -> None:
        """Capture an update for a new batch shape, and compare the graph with an ordinary update."""
        counts = {metric: update_count(metric) for metric in metrics.values()}
        device = batch.target.device
        random = devices.rng_states(device)
        try:
            is_new = name not in self._graphs
            reason = "" if is_new else self._check(name, batch)
            if is_new or reason:  # custom code may read the epoch, a constant in a graph
                self._capture(metrics, batch, name)
                reason = self._check(name, batch)
        except Exception as error:  # custom metrics may raise anything; the ordinary update raises it again
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        devices.set_rng_states(device, random)
        for metric, count in counts.items():
            set_update_count(metric, count)
        self._checked.add(name)
        if reason:
            self._is_possible, self._graphs = False, {}
            rank_zero_warn(f"validation runs without CUDA graphs: {reason}")

    def _capture(self, metrics: MutableMapping[str, Metric], batch: Batch, name: tuple[Any, ...]) -> None:
        if not self._states:
            self._states = [
                (metric, state, getattr(metric, state))
                for metric in metrics.values()
                for state in default_states(metric)
            ]
        if kept := [type(metric).__name__ for metric, _, state in self._states if not isinstance(state, Tensor)]:
            raise TypeError(f"{kept[0]} keeps its state in lists")
        self._fix_states()
        before = [state.clone() for _, _, state in self._states]
        static = tree_map_only(Tensor, torch.clone, batch)
        counts = {metric: update_count(metric) for metric in metrics.values()}

        def update() -> None:
            self.module.update_metrics(metrics, static)
            self._fix_states()

        try:
            self.capture.warm_up(update)
            updated = [metric for metric, count in counts.items() if update_count(metric) > count]
            _, replay = self.capture.capture(update)
        finally:
            self._fix_states()
            self._states_then_back_to(before)
        self._graphs[name] = _Captured(static, update, replay, updated)

    def _check(self, name: tuple[Any, ...], batch: Batch) -> str:
        """Return the difference between a replay and an ordinary update; empty if they agree."""
        captured = self._graphs[name]
        copy_into(captured.batch, batch)
        self._fix_states()
        before = [state.clone() for _, _, state in self._states]
        device = captured.batch.target.device
        random = devices.rng_states(device)
        try:
            captured.update()
        finally:
            usual = self._states_then_back_to(before)
        devices.set_rng_states(device, random)  # a criterion may use random numbers
        captured.replay()
        found = self._states_then_back_to(before)
        pairs = zip(usual, found, strict=True)
        agree = all(torch.allclose(a.double(), b.double(), rtol=_TOLERANCE, equal_nan=True) for a, b in pairs)
        return "" if agree else "a replay differs from an ordinary update"

    def _states_then_back_to(self, before: list[Tensor]) -> list[Tensor]:
        """Return copies of the metric states, and restore the previous ones."""
        found = [state.clone() for _, _, state in self._states]
        for (_, _, state), old in zip(self._states, before, strict=True):
            state.copy_(old)
        return found
