"""Learning-rate schedules whose length is the length of the run."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, TypeAlias

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Interval: TypeAlias = Literal["epoch", "step"]
"""When a schedule is stepped: after each epoch, or after each optimizer step."""


class RunSchedule(LRScheduler):
    """Base class of schedules relative to the length of the run.

    Subclasses implement `rate`. lkd's modules set the length when training starts: the number of epochs, or of
    optimizer steps if `lr_scheduler_interval` is `step`. If a run is resumed with another length, the learning rate
    follows the schedule of the new length from then on, and a warning states both lengths.

    Args:
        optimizer: The optimizer, whose initial learning rates are multiplied by the schedule.
        total: Length of the schedule in calls of `step`. If `None`, the length of the run, which lkd's modules set.

    Raises:
        ValueError: If `total` is less than 1.
        RuntimeError: In the first call of `step`, if `total` is `None` and no lkd module has set the length.
    """

    def __init__(self, optimizer: Optimizer, total: int | None = None) -> None:
        if total is not None and total < 1:
            raise ValueError(f"total must be at least 1, got {total}")
        self.total = total
        self.follows_run = total is None
        super().__init__(optimizer)

    @abstractmethod
    def rate(self, initial: float | Tensor, step: int, total: int) -> float | Tensor:
        """Compute a learning rate.

        Args:
            initial: Learning rate of the parameter group before the schedule.
            step: Number of completed epochs or optimizer steps.
            total: Total number of epochs or optimizer steps of the run.
        """

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rates of the parameter groups; they are constant until the length is known.

        Raises:
            RuntimeError: After the first step, if the length is not known.
        """
        total = self.total
        if total is not None:
            return [self.rate(initial, self.last_epoch, total) for initial in self.base_lrs]
        if self.last_epoch > 0:
            raise RuntimeError(
                f"{type(self).__name__} requires the length of the run, which lkd's modules set in on_train_start "
                "(call super().on_train_start() if you override it); with other modules, pass total"
            )
        return list(self.base_lrs)

    def set_length(self, total: int, interval: Interval) -> None:
        """Set the length of the run, and update the learning rates.

        Args:
            total: Number of epochs or optimizer steps.
            interval: Unit of `total`.
        """
        groups, previous = self.optimizer.param_groups, self.total
        if previous == total:
            return  # in a resumed run, the learning rates are restored
        before, self.total = float(groups[0]["lr"]), total
        for group, rate in zip(groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [rate.clone() if isinstance(rate, Tensor) else rate for rate in self.get_lr()]
        if previous is not None:
            rank_zero_warn(
                f"the length of the run was changed from {count(previous, interval)} to {total:,}; after "
                f"{count(self.last_epoch, interval)}, {type(self).__name__} follows the schedule of the new length, "
                f"with a learning rate of {float(groups[0]['lr']):.3g} instead of {before:.3g}"
            )


class CosineDecay(RunSchedule):
    r"""Linear warm-up, followed by cosine decay to the end of the run.

    For N epochs or steps, of which W = round(warmup * N) are the warm-up, the learning rate after i of them is

    $$ \eta_i = \eta \, \frac{i + 1}{W + 1} \;\; (i < W), \qquad
       \eta_i = \eta \left( f + (1 - f) \, \frac{1 + \cos(\pi (i - W) / (N - W))}{2} \right) \;\; (i \ge W) $$

    Without warm-up, it equals PyTorch's `CosineAnnealingLR` with `T_max` = N and `eta_min` equal to f times the initial
    learning rate.

    Args:
        optimizer: The optimizer.
        warmup: Fraction of the run used for the warm-up, in [0, 1).
        final: Learning rate at the end of the run, as a fraction f of the initial one, in [0, 1].
        total: Length of the schedule in calls of `step`. If `None`, the length of the run.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Loshchilov, Hutter: SGDR, ICLR 2017 (arXiv 1608.03983), without restarts.

    Example:
        >>> import torch
        >>> schedule = CosineDecay(torch.optim.SGD([torch.zeros(1)], lr=0.1), warmup=0.25, total=4)
        >>> [round(float(schedule.rate(0.1, step, 4)), 3) for step in range(5)]
        [0.05, 0.1, 0.075, 0.025, 0.0]
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.0, final: float = 0.0, total: int | None = None) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a fraction of the run and must be in [0, 1), got {warmup}")
        if not 0 <= final <= 1:
            raise ValueError(f"final is a fraction of the initial learning rate and must be in [0, 1], got {final}")
        self.warmup, self.final = warmup, final
        super().__init__(optimizer, total)

    def rate(self, initial: float | Tensor, step: int, total: int) -> float | Tensor:
        """Compute a learning rate."""
        warmup = min(round(self.warmup * total), total - 1)
        if step < warmup:
            return initial * ((step + 1) / (warmup + 1))
        progress = min((step - warmup) / (total - warmup), 1.0)
        return initial * (self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2)


class StepDecay(RunSchedule):
    """Multiply the learning rate by `gamma` at each milestone, which is a fraction of the run.

    For milestones m and N epochs or steps, it equals PyTorch's `MultiStepLR` with the milestones m * N, rounded up.

    Args:
        optimizer: The optimizer.
        milestones: Fractions of the run in ascending order, each between 0 and 1, exclusive.
        gamma: Factor, greater than 0.
        total: Length of the schedule in calls of `step`. If `None`, the length of the run.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> schedule = StepDecay(torch.optim.SGD([torch.zeros(1)], lr=1.0), milestones=[0.5, 0.75], total=4)
        >>> [round(float(schedule.rate(1.0, step, 4)), 3) for step in range(4)]
        [1.0, 1.0, 0.1, 0.01]
    """

    def __init__(
        self, optimizer: Optimizer, milestones: list[float], gamma: float = 0.1, total: int | None = None
    ) -> None:
        if not all(0 < milestone < 1 for milestone in milestones) or sorted(milestones) != list(milestones):
            raise ValueError(f"milestones must be ascending fractions of the run between 0 and 1, got {milestones}")
        if not gamma > 0:
            raise ValueError(f"gamma must be greater than 0, got {gamma}")
        self.milestones, self.gamma = list(milestones), gamma
        super().__init__(optimizer, total)

    def rate(self, initial: float | Tensor, step: int, total: int) -> float | Tensor:
        """Compute a learning rate."""
        for milestone in self.milestones:
            if step >= (milestone - 1e-9) * total:  # 0.07 * 100 is slightly greater than 7
                initial = initial * self.gamma
        return initial


def count(number: float, unit: str) -> str:
    """Format a number with its unit in singular or plural.

    Args:
        number: The number.
        unit: Unit in singular.
    """
    return f"{number:,.0f} {unit}{'' if number == 1 else 's'}"
