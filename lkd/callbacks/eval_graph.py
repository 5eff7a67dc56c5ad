"""Validation on a GPU as captured graphs."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

from lkd import devices
from lkd.callbacks.graph_constants import constants_of, numbers_of
from lkd.devices.capture import Capture, copy_into, signature
from lkd.types import Batch

_TOLERANCE = 1e-4


class _Captured(NamedTuple):
    """A captured update: what it reads and does, how to replay it, and the metrics that it updates."""

    batch: Batch
    update: Callable[[], None]
    replay: Callable[[], Any]
    updated: list[Metric]


class EvalGraph:
    """Captures how a module measures one validation batch, once for each shape of a batch, and replays it.

    Networks and metrics run in the graph. The states of the metrics have fixed addresses while validation runs. Before
    a graph is used in a validation, a replay and an ordinary update from the same states must agree; if they do not, or
    the update cannot be captured (a metric that keeps lists, or waits for the device), validation goes on without
    graphs.

    Args:
        module: A `ClassificationModule`.
        capture: How the device captures.
    """

    def __init__(self, module: Any, capture: Capture) -> None:
        self.module, self.capture = module, capture
        self._is_possible = True
        self._graphs: dict[tuple[Any, ...], _Captured] = {}
        self._states: list[tuple[Metric, str, Tensor]] = []
        self._constants: tuple[Any, ...] = ()
        self._checked: set[tuple[Any, ...]] = set()  # graphs that agree with an ordinary update in this validation

    def begin(self) -> None:
        """Look at what the graphs depend on before a validation: in training, anything may have changed."""
        names = tuple(self.module.stage_metrics("val"))
        constants = constants_of(self.module), numbers_of(self.module, public=True), names
        if constants != self._constants:
            self._graphs, self._states, self._constants = {}, [], constants
        self._checked.clear()

    def update(self, metrics: MutableMapping[str, Metric], batch: Batch) -> bool:
        """Measure one batch.

        Args:
            metrics: The metrics of the stage, by name.
            batch: The batch.

        Returns:
            Whether that was done; otherwise an ordinary update is due.
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
        for metric in captured.updated:  # what torchmetrics notes of an update
            metric._update_count += 1
            metric._computed = None
        return True

    def _fix_states(self) -> None:
        """Let the metrics keep their states in the memory that the graphs use: a reset gives them new tensors."""
        for metric, name, static in self._states:
            current = getattr(metric, name)
            if current is not static:
                static.copy_(current)
                setattr(metric, name, static)

    def _try(self, metrics: MutableMapping[str, Metric], batch: Batch, name: tuple[Any, ...]) -> None:
        """Capture an update, if that was not done yet, and check it."""
        counts = {metric: metric._update_count for metric in metrics.values()}
        device = batch.target.device
        random = devices.rng_states(device)
        try:
            is_new = name not in self._graphs
            reason = "" if is_new else self._check(name, batch)
            if is_new or reason:  # code of a user may read the epoch, which is a constant in a graph
                self._capture(metrics, batch, name)
                reason = self._check(name, batch)
        except Exception as error:  # whatever the update of a user raises: the ordinary update raises it again
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        devices.set_rng_states(device, random)
        for metric, count in counts.items():
            metric._update_count = count
        self._checked.add(name)
        if reason:
            self._is_possible, self._graphs = False, {}
            rank_zero_warn(f"validation runs without graphs ({reason})")

    def _capture(self, metrics: MutableMapping[str, Metric], batch: Batch, name: tuple[Any, ...]) -> None:
        if not self._states:
            self._states = [
                (metric, state, getattr(metric, state)) for metric in metrics.values() for state in metric._defaults
            ]
        if kept := [type(metric).__name__ for metric, _, state in self._states if not isinstance(state, Tensor)]:
            raise TypeError(f"{kept[0]} keeps lists")
        self._fix_states()
        before = [state.clone() for _, _, state in self._states]
        static = tree_map_only(Tensor, torch.clone, batch)
        counts = {metric: metric._update_count for metric in metrics.values()}

        def update() -> None:
            self.module.update_metrics(metrics, static)
            self._fix_states()

        try:
            self.capture.warm_up(update)
            updated = [metric for metric, count in counts.items() if metric._update_count > count]
            _, replay = self.capture.capture(update)
        finally:
            self._fix_states()
            self._states_then_back_to(before)
        self._graphs[name] = _Captured(static, update, replay, updated)

    def _check(self, name: tuple[Any, ...], batch: Batch) -> str:
        """Describe the difference between a replay and an ordinary update; empty if they agree."""
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
        devices.set_rng_states(device, random)  # a criterion may draw
        captured.replay()
        found = self._states_then_back_to(before)
        pairs = zip(usual, found, strict=True)
        agree = all(torch.allclose(a.double(), b.double(), rtol=_TOLERANCE, equal_nan=True) for a, b in pairs)
        return "" if agree else "a replay differs from an ordinary update"

    def _states_then_back_to(self, before: list[Tensor]) -> list[Tensor]:
        """The states as they are; afterwards they are as before."""
        found = [state.clone() for _, _, state in self._states]
        for (_, _, state), old in zip(self._states, before, strict=True):
            state.copy_(old)
        return found
