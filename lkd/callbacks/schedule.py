"""Weights that change from epoch to epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L

from lkd.losses import CompositeLoss


class Schedule(L.Callback):
    """Let a number of the module grow or fall over the first epochs: a weight's warm-up, a curriculum's strength.

    In each epoch the attribute is its own value, as the config has it, times a factor. The factor goes from `start` to
    `end` in as many equal steps as there are epochs, and takes the first step in the first epoch: a warm-up over 20
    epochs begins with a twentieth. From the last of these epochs on it is `end`. After the training the attribute has
    its own value again.

    Args:
        attribute: Which number, by its path from the module: `distill_weight`, `criterion.reversal`, or, in a
            WeightedSum, `criterion.weights.NAME` and `criterion.criteria.NAME.reversal`. What a criterion made of
            others (a WeightedSum, a MultiTeacher, a MutualModule's) does not have itself is changed in each of them
            that has it.
        epochs: Over how many epochs, at least 1.
        start: The factor before the first epoch.
        end: The factor at last.
        shape: `linear`; `cosine`: slow at both ends; `step`: `start` in all of these epochs, then `end`, as in a method
            that begins with a stage of its own.

    Raises:
        ValueError: If `epochs` is less than 1, or, before training, the module has no such number.

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
            raise ValueError(f"a Schedule needs at least 1 epoch, got {epochs}")
        self.attribute = attribute
        self.epochs = epochs
        self.start = start
        self.end = end
        self.shape = shape
        self._own: list[float] = []

    def factor(self, epoch: int) -> float:
        """What the attribute's own value is multiplied by.

        Args:
            epoch: Counted from 0.
        """
        if self.shape == "step":
            return self.start if epoch < self.epochs else self.end
        progress = min((epoch + 1) / self.epochs, 1.0)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the attribute and its own value."""
        if stage == "fit":
            own = _read(pl_module, self.attribute)
            try:
                _write(pl_module, self.attribute, own)
            except AttributeError as error:
                raise ValueError(
                    f"Schedule changes a number of the module, and {type(pl_module).__name__}'s {self.attribute!r} "
                    "can only be read; name one such as 'distill_weight' or 'criterion.reversal'"
                ) from error
            self._own = own

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the attribute: in the middle of an epoch that is resumed, there is no other hook."""
        self._set(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the attribute for this epoch."""
        self._set(trainer, pl_module)

    def _set(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._own:
            factor = self.factor(trainer.current_epoch)
            _write(pl_module, self.attribute, [own * factor for own in self._own])

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the attribute its own value back."""
        self._restore(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the attribute its own value back."""
        self._restore(pl_module)

    def _restore(self, pl_module: L.LightningModule) -> None:
        if self._own:
            _write(pl_module, self.attribute, self._own)
            self._own = []


def _get(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)


def _holders(owner: Any, name: str) -> list[Any]:
    """What has something of that name: the owner, or else the criteria that it is made of."""
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
            f"Schedule changes a number of the module, but {type(module).__name__}'s {attribute!r} is "
            f"{type(wrong[0]).__name__ if wrong else 'not there'}; name one such as 'distill_weight' or "
            "'criterion.reversal'"
        )
    return [float(value) for value in values]


def _write(module: L.LightningModule, attribute: str, values: Sequence[float]) -> None:
    owners, name = _owners(module, attribute)
    for owner, value in zip(owners, values, strict=True):
        if isinstance(owner, dict):
            owner[name] = value
        else:
            setattr(owner, name, value)
