"""Means of curves without waiting for the device in every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

_TOGETHER = 64


class Meter:
    """Sums named scalars on their device; reads them out, once in a while, as means.

    It also remembers, on the device, the first step at which each of them was not finite.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._waiting: list[tuple[int, Tensor]] = []  # steps that are not summed yet
        self._sums: Tensor | None = None
        self._first_bad: Tensor | None = None
        self._count = 0

    def update(self, values: Mapping[str, Tensor], step: int) -> None:
        """Add one step's values.

        Args:
            values: Scalars on one device. Where the names are others than in the step before, as when a weight
                rises from 0, it starts again.
            step: The step's number, for the error if one of them is not finite.
        """
        if self._names != tuple(values):
            self._names, self._waiting, self._sums, self._first_bad, self._count = tuple(values), [], None, None, 0
        self._waiting.append((step, torch.stack([value.detach().float() for value in values.values()])))
        if len(self._waiting) == _TOGETHER:
            self._sum()

    def _sum(self) -> None:
        """Sum what waits: once for many steps, as each operation takes as long for one number as for a hundred."""
        if not self._waiting:
            return
        steps, values = zip(*self._waiting, strict=True)
        stacked = torch.stack(values)
        number = torch.tensor(steps, dtype=torch.float32).to(stacked.device, non_blocking=True)[:, None]
        sums, bad = stacked.sum(0), torch.where(stacked.isfinite(), torch.inf, number).amin(0)
        self._sums = sums if self._sums is None else self._sums + sums
        self._first_bad = bad if self._first_bad is None else torch.minimum(self._first_bad, bad)
        self._count, self._waiting = self._count + len(steps), []

    def first_bad(self, gather: Callable[[Tensor], Tensor]) -> dict[str, int]:
        """Name to the first step at which it was not finite, for those that were not.

        Args:
            gather: Brings a tensor of all processes together: `(...)` to `(world, ...)` or, alone, unchanged.
        """
        self._sum()
        if self._first_bad is None:
            return {}
        steps = gather(self._first_bad).view(-1, len(self._names)).amin(0).tolist()
        return {name: int(step) for name, step in zip(self._names, steps, strict=True) if step != torch.inf}

    def means(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Name to mean over the steps and processes since the last reading; starts again.

        Args:
            gather: As for `first_bad`.
        """
        self._sum()
        if self._sums is None:
            return {}
        means = (gather(self._sums) / self._count).view(-1, len(self._names)).mean(0).tolist()
        names = self._names
        self._names, self._sums, self._first_bad, self._count = (), None, None, 0
        return dict(zip(names, means, strict=True))


class WeightedMean(Metric):
    """Mean of values, each with its weight; 0 if nothing weighs, and not finite if a value is not.

    torchmetrics' `MeanMetric` looks for NaN in every step, which waits for the device; told not to (up to 1.9), it
    forgets the weights.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor) -> None:
        """Add a value.

        Args:
            value: A scalar.
            weight: A scalar, at least 0.
        """
        self.total += value * weight
        self.weight += weight

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / torch.where(self.weight > 0, self.weight, 1)
