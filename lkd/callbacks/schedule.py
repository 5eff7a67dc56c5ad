"""Schedules of loss weights and other numbers of a module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L

from lkd.losses import CompositeLoss


class Schedule(L.Callback):
    """Scale a number of the module over the first epochs, for example to warm up a loss weight or a curriculum.

    In each epoch, the attribute is set to its configured value times a factor. The factor changes from `start` to `end`
    in `epochs` equal steps, the first of which is taken in the first epoch: a warm-up over 20 epochs starts at 1/20.
    From the last of these epochs on, the factor is `end`. After training, the configured value is restored.

    Args:
        attribute: Path of the number, relative to the module: `distill_weight`, `criterion.reversal`, or, for a
            WeightedSum, `criterion.weights.NAME` and `criterion.criteria.NAME.reversal`. If a composite criterion
            (WeightedSum, MultiTeacher, or that of a MutualModule) does not have the attribute itself, it is changed in
            all of its parts that have it.
        epochs: Number of epochs of the schedule, at least 1.
        start: Factor before the first epoch.
        end: Final factor.
        shape: Shape of the schedule: `linear`; `cosine`, which is slow at both ends; or `step`, which keeps `start` for
            all of these epochs and then switches to `end`, for methods with an initial stage.

    Raises:
        ValueError: If `epochs` is less than 1, or, before training, if the module has no such number.

    Example:
        >>> warmup = Schedule("distill_weight", epochs=20)
        >>> [warmup.factor(epoch) for epoch in (0, 9, 19, 100)]
        [0.05, 0.5, 1.0, 1.0]
    """

    def __init__(
        self,
        attribute: str,
        epochs: int,
        start: float = 0.0,
        end: float = 1.0,
        shape: Literal["linear", "cosine", "step"] = "linear",
    ) -> None:
        if epochs < 1:
            raise ValueError(f"Schedule requires at least 1 epoch, got {epochs}")
        self.attribute = attribute
        self.epochs = epochs
        self.start = start
        self.end = end
        self.shape = shape
        self._own: list[float] = []

    def factor(self, epoch: int) -> float:
        """Compute the factor by which the configured value is multiplied.

        Args:
            epoch: Epoch, starting at 0.
        """
        if self.shape == "step":
            return self.start if epoch < self.epochs else self.end
        progress = min((epoch + 1) / self.epochs, 1.0)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look up the attribute and its configured value.

        Raises:
            ValueError: If it is not a number of the module that can be set.
        """
        if stage == "fit":
            own = _read(pl_module, self.attribute)
            try:
                _write(pl_module, self.attribute, own)
            except AttributeError as error:
                raise ValueError(
                    f"Schedule cannot set {self.attribute!r}, which is read-only in {type(pl_module).__name__}; select "
                    "a number of the module such as 'distill_weight' or 'criterion.reversal'"
                ) from error
            self._own = own

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the attribute; a run resumed within an epoch does not call `on_train_epoch_start`."""
        self._set(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the attribute for this epoch."""
        self._set(trainer, pl_module)

    def _set(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._own:
            factor = self.factor(trainer.current_epoch)
            _write(pl_module, self.attribute, [own * factor for own in self._own])

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the configured value."""
        self._restore(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the configured value if the run fails."""
        self._restore(pl_module)

    def _restore(self, pl_module: L.LightningModule) -> None:
        if self._own:
            _write(pl_module, self.attribute, self._own)
            self._own = []


def _get(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)


def _holders(owner: Any, name: str) -> list[Any]:
    """Return the objects that have an attribute: the owner, or else the criteria of which it is composed."""
    if _get(owner, name) is not None:
        return [owner]
    return [found for part in owner.parts for found in _holders(part, name)] if isinstance(owner, CompositeLoss) else []


def _owners(module: L.LightningModule, attribute: str) -> tuple[list[Any], str]:
    owners: list[Any] = [module]
    *path, name = attribute.split(".")
    for part in path:
        owners = [_get(holder, part) for owner in owners for holder in _holders(owner, part)]
    return [holder for owner in owners for holder in _holders(owner, name)], name


def _read(module: L.LightningModule, attribute: str) -> list[float]:
    owners, name = _owners(module, attribute)
    values = [_get(owner, name) for owner in owners]
    wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, (int, float))]
    if wrong or not values:
        raise ValueError(
            f"Schedule requires a number, but {attribute!r} of {type(module).__name__} "
            f"{f'has type {type(wrong[0]).__name__}' if wrong else 'does not exist'}; select a number of the module "
            "such as 'distill_weight' or 'criterion.reversal'"
        )
    return [float(value) for value in values]


def _write(module: L.LightningModule, attribute: str, values: Sequence[float]) -> None:
    owners, name = _owners(module, attribute)
    for owner, value in zip(owners, values, strict=True):
        if isinstance(owner, dict):
            owner[name] = value
        else:
            setattr(owner, name, value)
