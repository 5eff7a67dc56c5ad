"""Learning-rate schedules of a run: interval, length, and a check of schedules with a fixed length."""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate
from typing import Any, NamedTuple, cast

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lkd._compat import last_milestone, parts_of
from lkd.schedules.relative import Interval, RunSchedule, count

_FAILS = "PyTorch then stops the run with an error"
_ZERO = "the learning rate then remains 0"
_RISES = "the learning rate then increases again"
_REMEDY = "lkd.schedules.CosineDecay or StepDecay, which follow the length of the run"
_VANISHED = 1e-9
"""Fraction of the initial learning rate below which the network does not learn."""


def with_schedule(
    optimizer: Optimizer, schedule: LRScheduler | ReduceLROnPlateau, interval: Interval
) -> OptimizerLRScheduler:
    """Return the result of `configure_optimizers` for an optimizer and its schedule.

    Args:
        optimizer: The optimizer.
        schedule: Its schedule.
        interval: When the schedule is stepped.

    Raises:
        ValueError: If the interval is invalid, or if the schedule requires a validation metric but is stepped after
            each optimizer step.
    """
    if interval not in ("epoch", "step"):
        raise ValueError(f"lr_scheduler_interval must be 'epoch' or 'step', got {interval!r}")
    if isinstance(schedule, ReduceLROnPlateau):
        monitor = getattr(schedule, "monitor", "val/loss")
        if interval == "step":
            raise ValueError(f"ReduceLROnPlateau reads {monitor} after each epoch; set lr_scheduler_interval to epoch")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": monitor}}
    if interval == "step":
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
    return {"optimizer": optimizer, "lr_scheduler": schedule}


class RunLength(NamedTuple):
    """Length of a run, infinite where unknown.

    Attributes:
        epoch: Number of epochs.
        step: Number of optimizer steps.
    """

    epoch: float
    step: float


def run_length(trainer: L.Trainer) -> RunLength:
    """Compute the length of a run from `max_epochs`, `max_steps` and the number of batches.

    Args:
        trainer: Trainer with its training data, in `on_train_start` or later. `estimated_stepping_batches` is not used
            because it would create the data loader of a resumed run before the position in the epoch is known.
    """
    max_epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    max_steps = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    batches = trainer.num_training_batches
    if batches == math.inf:
        return RunLength(max_epochs, max_steps)
    per_epoch = _steps_per_epoch(trainer, batches)
    first = sum(per_epoch[: int(min(max_epochs, len(per_epoch)))])
    steps = first + max(max_epochs - len(per_epoch), 0) * per_epoch[-1]
    return RunLength(min(max_epochs, _epochs_of(max_steps, per_epoch)), min(max_steps, steps))


def _steps_per_epoch(trainer: L.Trainer, batches: int | float) -> list[int]:
    """Return the number of optimizer steps of each epoch; the last number applies to all later epochs."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            numbers = map(callback.get_accumulate_grad_batches, range(max(callback.epochs) + 1))
            return [math.ceil(batches / number) for number in numbers]
    return [math.ceil(batches / trainer.accumulate_grad_batches)]


def _epochs_of(steps: float, per_epoch: list[int]) -> float:
    """Return the number of epochs in which a number of optimizer steps is reached; see `_steps_per_epoch`."""
    done = list(accumulate(per_epoch))
    if steps <= done[-1]:
        return bisect_left(done, steps) + 1
    return len(done) + (math.ceil((steps - done[-1]) / per_epoch[-1]) if steps < math.inf else math.inf)


def fit_schedules(trainer: L.Trainer) -> None:
    """Set the length of schedules that follow the run, and check all others.

    Args:
        trainer: Trainer, in `on_train_start`.

    Raises:
        ValueError: If the length of the run is unknown, if a schedule fits only the other `lr_scheduler_interval`, or
            if PyTorch would stop the run with an error.
    """
    run = run_length(trainer)
    for config in trainer.lr_scheduler_configs:
        schedule, interval = config.scheduler, cast("Interval", config.interval)
        length, other = (run.step, run.epoch) if interval == "step" else (run.epoch, run.step)
        for part in parts_of(schedule):  # of SequentialLR and ChainedScheduler
            if isinstance(part, RunSchedule) and part.total is None:
                name = type(part).__name__
                raise ValueError(f"{name} cannot follow the length of the run inside another schedule; pass total")
        if isinstance(schedule, RunSchedule) and schedule.follows_run:
            if length == math.inf:
                raise ValueError(
                    f"{type(schedule).__name__} follows the length of the run, but its number of {interval}s is "
                    f"unknown (max_epochs {trainer.max_epochs}, max_steps {trainer.max_steps}, "
                    f"{trainer.num_training_batches} batches per epoch); set --trainer."
                    f"{'max_epochs' if interval == 'epoch' else 'max_steps'}"
                )
            schedule.set_length(max(int(length) // config.frequency, 1), interval)
        elif length < math.inf and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _check(schedule, interval, length // config.frequency, other / config.frequency)


class _Span(NamedTuple):
    """Number of epochs or steps after which a schedule ends.

    Attributes:
        setting: Name of the number in the schedule.
        length: The number.
        afterwards: Problem in a longer run; empty if there is none.
    """

    setting: str
    length: float
    afterwards: str = ""


def _span(schedule: Any) -> _Span | None:
    """Return the fixed length of a schedule; `None` if it has none."""
    match schedule:
        case lr_scheduler.SequentialLR():
            begin, last = last_milestone(schedule), _span(parts_of(schedule)[-1])
            return last and last._replace(
                setting=f"a total length (up to {last.setting} of its last part) of", length=begin + last.length
            )
        case RunSchedule():
            return _Span("total", schedule.total or 1)
        case lr_scheduler.OneCycleLR():
            return _Span("total_steps", schedule.total_steps, _FAILS)
        case lr_scheduler.CosineAnnealingLR():
            return _Span("T_max", schedule.T_max, _RISES)
        case lr_scheduler.CosineAnnealingWarmRestarts():
            return _Span("T_0", schedule.T_0)
        case lr_scheduler.PolynomialLR():
            return _Span("total_iters", schedule.total_iters, _ZERO)
        case lr_scheduler.LinearLR():
            return _Span("total_iters", schedule.total_iters, "" if schedule.end_factor else _ZERO)
        case lr_scheduler.ConstantLR():
            return _Span("total_iters", schedule.total_iters)
        case lr_scheduler.CyclicLR():
            return _Span("a cycle of", schedule.total_size)
        case lr_scheduler.MultiStepLR() if schedule.milestones:
            return _Span("its last milestone at", max(schedule.milestones))
        case lr_scheduler.StepLR():
            return _Span("step_size", schedule.step_size)
    return None


def _problem(schedule: Any, span: _Span | None, length: float) -> str:
    """Return the problem of a schedule in a run of a given length; empty if there is none."""
    if isinstance(schedule, (lr_scheduler.StepLR, lr_scheduler.ExponentialLR)):
        factor = schedule.gamma ** (length // getattr(schedule, "step_size", 1))
        if factor < _VANISHED:
            return f"the learning rate falls to {factor:.0e} of its initial value"
    if isinstance(schedule, (lr_scheduler.MultiStepLR, lr_scheduler.StepLR)):
        late = span is not None and span.length >= length
        return "the run ends before it is reached" if late else ""
    if span is None or 0.9 * length - 1 <= span.length <= 1.1 * length:
        return _FAILS if span is not None and span.afterwards == _FAILS and span.length < length else ""
    if span.length > length:
        return f"only the first {length / span.length:.1%} of the schedule is used"
    return span.afterwards


def _check(schedule: Any, interval: Interval, length: float, other: float) -> None:
    """Reject a schedule that fits only the other interval or fails, and warn if it does not fit the run.

    Args:
        schedule: The schedule.
        interval: When it is stepped.
        length: Number of times it is stepped in this run.
        other: Number of times it would be stepped with the other interval.
    """
    span, name = _span(schedule), type(schedule).__name__
    problem = _problem(schedule, span, length)
    is_total = not isinstance(schedule, (lr_scheduler.StepLR, lr_scheduler.MultiStepLR))
    # In long runs, a total may be one less, so that the last step uses the final learning rate.
    fits_other = bool(span and problem and is_total and abs(span.length - other) <= (other >= 100))
    if isinstance(schedule, lr_scheduler.MultiStepLR) and span and schedule.gamma < 1:
        fits_other = interval == "step" and span.length < other <= length / 10
    if not (problem or fits_other):
        return
    has = f"{span.setting} {span.length:,.0f}" if span else f"a gamma of {schedule.gamma}"
    facts = f"{name} has {has}, but this run steps it {count(length, 'time')}, once per {interval}"
    others: Interval = "epoch" if interval == "step" else "step"
    switch = f"set lr_scheduler_interval to {others}, which steps it {count(other, 'time')}"
    if fits_other:
        raise ValueError(f"{facts}; {switch}")
    if problem == _FAILS:
        raise ValueError(f"{facts}: {problem}; use {_REMEDY}")
    least = (0.9 if span and span.afterwards else 0.02) * other  # a warm-up or milestone may be early
    counts_other = span and length != other and least <= span.length <= other
    rank_zero_warn(f"{facts}: {problem}; {f'{switch}, or use' if counts_other else 'use'} {_REMEDY}")
