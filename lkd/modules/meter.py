"""Means of curves without waiting for the device in every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lkd.types import IGNORE_INDEX

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
        self.add(tuple(values), torch.stack([value.detach().float() for value in values.values()]), step)

    def add(self, names: tuple[str, ...], row: Tensor, step: int) -> None:
        """Add one step's values that are in one tensor already.

        Args:
            names: Their names, as the keys in `update`.
            row: The values `(C,)`, float32; kept, so not to be changed afterwards.
            step: The step's number.
        """
        if self._names != names:
            self._names, self._waiting, self._sums, self._first_bad, self._count = names, [], None, None, 0
        self._waiting.append((step, row))
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

    def state(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What has been summed in all processes, as it is: for a checkpoint.

        Args:
            gather: As for `first_bad`.
        """
        steps, values = zip(*self._waiting, strict=True) if self._waiting else ((), ())
        tensors = {"waiting": torch.stack(values) if values else None, "sums": self._sums, "first_bad": self._first_bad}
        return {
            "names": list(self._names),
            "steps": list(steps),
            "count": self._count,
            **{name: None if part is None else _of_all(part, gather) for name, part in tensors.items()},
        }

    def restore(self, state: Mapping[str, Any], rank: int, device: torch.device) -> None:
        """Go on from a `state`.

        Args:
            state: What `state` has returned.
            rank: Which process this is; where there were fewer, it begins as their last.
            device: Where steps are made.
        """
        waiting, sums, first_bad = (
            None if part is None else part[min(rank, len(part) - 1)].to(device)
            for part in (state["waiting"], state["sums"], state["first_bad"])
        )
        self._names, self._count = tuple(state["names"]), int(state["count"])
        self._waiting = [] if waiting is None else list(zip(state["steps"], waiting.unbind(), strict=True))
        self._sums, self._first_bad = sums, first_bad

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


def _of_all(part: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """`(...)` as `(world, ...)`, on the CPU."""
    return gather(part).reshape(-1, *part.shape).cpu()


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


class Accuracy(Metric):
    """Share of samples whose largest logit, or given class, is the target; those without a label do not count.

    torchmetrics' `MulticlassAccuracy` selects the samples that have a label, which waits for the device to count them.
    """

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("correct", "total"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Add samples.

        Args:
            predictions: Logits `(B, K)`, or classes `(B,)`.
            target: `(B,)`; `IGNORE_INDEX` where there is no label.
        """
        classes = predictions.argmax(1) if predictions.dim() > target.dim() else predictions
        labelled = target != IGNORE_INDEX
        self.correct += ((classes == target) & labelled).sum()
        self.total += labelled.sum()

    def compute(self) -> Tensor:
        """The share so far; 0 if no sample has a label."""
        return self.correct / self.total.clamp(min=1)
