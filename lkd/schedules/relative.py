"""Learning-rate schedules whose length is the run's, and a check of those that have a length of their own."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, TypeAlias

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Interval: TypeAlias = Literal["epoch", "step"]
"""How often a schedule changes the learning rate: after each epoch, or after each step of the optimizer."""


class RunSchedule(LRScheduler):
    """Base class of schedules that are relative to the length of the run.

    Subclasses define `rate`. lkd's modules set the length when training starts: the number of epochs, or of optimizer
    steps if `lr_scheduler_interval` is `step`. If a run is resumed with another length, the learning rate follows the
    schedule of the new length from there on, and a warning states both numbers.

    Args:
        optimizer: The optimizer, whose learning rates are those that the schedule multiplies.
        total: Length of the schedule, in calls of `step`. None: the length of the run, which lkd's modules set.

    Raises:
        ValueError: If `total` is less than 1.
        RuntimeError: In the first `step`, if `total` is None and no module of lkd has set the length.
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
            step: Epochs or optimizer steps done, from 0.
            total: Epochs or optimizer steps of the whole run.
        """

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the parameter groups after `last_epoch` steps; constant until the length is known."""
        total = self.total
        if total is not None:
            return [self.rate(initial, self.last_epoch, total) for initial in self.base_lrs]
        if self.last_epoch > 0:
            raise RuntimeError(
                f"{type(self).__name__} does not know the length of the run: lkd's modules set it in on_train_start "
                "(call super().on_train_start() if you override it); elsewhere, pass total"
            )
        return list(self.base_lrs)

    def set_length(self, total: int, interval: Interval) -> None:
        """Set the length of the run, and update the learning rates.

        Args:
            total: Epochs or optimizer steps.
            interval: Which of both.
        """
        groups, previous = self.optimizer.param_groups, self.total
        if previous == total:
            return  # a resumed run has its learning rates
        before, self.total = float(groups[0]["lr"]), total
        for group, rate in zip(groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [rate.clone() if isinstance(rate, Tensor) else rate for rate in self.get_lr()]
        if previous is not None:
            rank_zero_warn(
                f"the run was begun with {count(previous, interval)} and now has {total:,}: after "
                f"{count(self.last_epoch, interval)}, {type(self).__name__} follows the schedule of {total:,}, with a "
                f"learning rate of {float(groups[0]['lr']):.3g} instead of {before:.3g}"
            )


class CosineDecay(RunSchedule):
    r"""Linear warm-up, then cosine decay to the end of the run.

    With N epochs or steps, of which W = round(warmup * N) are the warm-up, the learning rate after i of them is

    $$ \eta_i = \eta \, \frac{i + 1}{W + 1} \;\; (i < W), \qquad
       \eta_i = \eta \left( f + (1 - f) \, \frac{1 + \cos(\pi (i - W) / (N - W))}{2} \right) \;\; (i \ge W) $$

    Without a warm-up, it is PyTorch's `CosineAnnealingLR` with T_max N and eta_min f times the learning rate.

    Args:
        optimizer: The optimizer.
        warmup: Share of the run for the warm-up, at least 0 and less than 1.
        final: Learning rate at the end of the run, as a share f of the initial one, in [0, 1].
        total: Length of the schedule, in calls of `step`. None: the length of the run.

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
            raise ValueError(f"warmup is a share of the run, at least 0 and less than 1, got {warmup}")
        if not 0 <= final <= 1:
            raise ValueError(f"final is a share of the initial learning rate, in [0, 1], got {final}")
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
    """Multiply the learning rate by `gamma` at each milestone, a share of the run.

    With milestones m and N epochs or steps, it is PyTorch's `MultiStepLR` with milestones m * N, rounded up.

    Args:
        optimizer: The optimizer.
        milestones: Shares of the run, ascending, each greater than 0 and less than 1.
        gamma: Factor, greater than 0.
        total: Length of the schedule, in calls of `step`. None: the length of the run.

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
            raise ValueError(f"milestones are ascending shares of the run, between 0 and 1, got {milestones}")
        if not gamma > 0:
            raise ValueError(f"gamma must be greater than 0, got {gamma}")
        self.milestones, self.gamma = list(milestones), gamma
        super().__init__(optimizer, total)

    def rate(self, initial: float | Tensor, step: int, total: int) -> float | Tensor:
        """Compute a learning rate."""
        for milestone in self.milestones:
            if step >= (milestone - 1e-9) * total:  # 0.07 * 100 is a little more than 7
                initial = initial * self.gamma
        return initial


def count(number: float, unit: str) -> str:
    """Return a number with its unit in singular or plural.

    Args:
        number: The number.
        unit: The unit in singular.
    """
    return f"{number:,.0f} {unit}{'' if number == 1 else 's'}"
