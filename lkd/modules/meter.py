"""Averages of logged values that do not synchronize with the device in each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

_TOGETHER = 64
"""Number of steps that are summed at once."""


class ValueName(NamedTuple):
    """Name of a value that each training step computes.

    Attributes:
        kind: The loss, one of its terms, a count of labelled images or pixels, or the mean logit of a network.
        name: Name of the term, the count or the network; empty for the loss.
    """

    kind: Literal["loss", "term", "count", "logits"]
    name: str = ""


LOSS = ValueName("loss")
CORRECT = ValueName("count", "correct")
LABELLED = ValueName("count", "labelled")


def named(values: Mapping[ValueName, Tensor] | Mapping[str, Tensor]) -> dict[ValueName, Tensor]:
    """Return the values of a step with typed names; in custom modules, strings name the loss and its terms."""
    return {
        key if isinstance(key, ValueName) else LOSS if key == "loss" else ValueName("term", key): value
        for key, value in values.items()
    }


class Meter:
    """Sum of named scalars on their device, read out occasionally as means.

    The meter also records, on the device, the first step at which each value was not finite.
    """

    def __init__(self) -> None:
        self._names: tuple[ValueName, ...] = ()
        self._waiting: list[tuple[int, Tensor]] = []  # steps not yet summed
        self._sums: Tensor | None = None
        self._first_bad: Tensor | None = None
        self._count = 0

    def update(self, values: Mapping[ValueName, Tensor], step: int) -> None:
        """Add the values of one step.

        Args:
            values: Scalars on one device. If the names differ from those of the previous step, as when a weight
                increases from 0, the meter restarts.
            step: Number of the step, used to report values that are not finite.
        """
        self.add(tuple(values), torch.stack([value.detach().float() for value in values.values()]), step)

    def add(self, names: tuple[ValueName, ...], row: Tensor, step: int) -> None:
        """Add the values of one step, given as a single tensor.

        Args:
            names: Names of the values, like the keys in `update`.
            row: Values `(C,)`, float32. The tensor is stored and must not be modified afterwards.
            step: Number of the step.
        """
        if self._names != names:
            self._names, self._waiting, self._sums, self._first_bad, self._count = names, [], None, None, 0
        self._waiting.append((step, row))
        if len(self._waiting) == _TOGETHER:
            self._sum()

    def _sum(self) -> None:
        """Sum the pending steps in one go, since an operation takes as long for one number as for a hundred."""
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
        """Return the state of the meters of all processes, for a checkpoint.

        Args:
            gather: As in `first_bad`.
        """
        steps, values = zip(*self._waiting, strict=True) if self._waiting else ((), ())
        tensors = {"waiting": torch.stack(values) if values else None, "sums": self._sums, "first_bad": self._first_bad}
        return {
            "names": [tuple(name) for name in self._names],
            "steps": list(steps),
            "count": self._count,
            **{name: None if part is None else _of_all(part, gather) for name, part in tensors.items()},
        }

    def restore(self, state: Mapping[str, Any], rank: int, device: torch.device) -> None:
        """Restore the meter from a `state`.

        Args:
            state: State returned by the method `state`.
            rank: Rank of this process. If the state has fewer processes, that of the last one is used.
            device: Device on which the steps run.
        """
        if any(isinstance(name, str) for name in state["names"]):
            return  # a checkpoint of lkd 0.1: the mean is reset
        waiting, sums, first_bad = (
            None if part is None else part[min(rank, len(part) - 1)].to(device)
            for part in (state["waiting"], state["sums"], state["first_bad"])
        )
        self._names = tuple(ValueName(*name) for name in state["names"])
        self._count = int(state["count"])
        self._waiting = [] if waiting is None else list(zip(state["steps"], waiting.unbind(), strict=True))
        self._sums, self._first_bad = sums, first_bad

    def first_bad(self, gather: Callable[[Tensor], Tensor]) -> dict[ValueName, int]:
        """Return the first step at which each value was not finite, by name; finite values are omitted.

        Args:
            gather: Function that gathers a tensor `(...)` from all processes as `(world, ...)`, or returns it unchanged
                if there is only one process.
        """
        self._sum()
        if self._first_bad is None:
            return {}
        steps = gather(self._first_bad).view(-1, len(self._names)).amin(0).tolist()
        return {name: int(step) for name, step in zip(self._names, steps, strict=True) if step != torch.inf}

    def means(self, gather: Callable[[Tensor], Tensor]) -> dict[ValueName, float]:
        """Return the means over the steps since the last call and over the processes, by name, and reset the meter.

        Args:
            gather: As in `first_bad`.
        """
        self._sum()
        if self._sums is None:
            return {}
        means = (gather(self._sums) / self._count).view(-1, len(self._names)).mean(0).tolist()
        names = self._names
        self._names, self._sums, self._first_bad, self._count = (), None, None, 0
        return dict(zip(names, means, strict=True))


def _of_all(part: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Gather a tensor `(...)` as `(world, ...)` on the CPU."""
    return gather(part).reshape(-1, *part.shape).cpu()
