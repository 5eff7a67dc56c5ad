"""Check that monitored metrics exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint

_KNOWN = ("lkd", "lightning")
"""Packages whose code logs the same metrics in the sanity check as in any validation."""
_LOGS = (
    *("validation_step", "on_validation_start", "on_validation_epoch_start", "on_validation_batch_end"),
    *("on_validation_epoch_end", "on_train_epoch_end", "on_train_batch_end", "training_step"),
)


class MonitorCheck(L.Callback):
    """Report a nonexistent monitored metric before the first training step.

    The check runs after the sanity check, which logs the same metrics as any validation. It covers the monitors of
    `ModelCheckpoint`, `EarlyStopping` and `ReduceLROnPlateau`, except training metrics (`train/...`), which are not
    logged yet. Without a sanity check, or if a custom callback or module may log metrics later, the check runs
    after the first validation. A callback that does not log its metrics in every validation lists their names in an
    attribute `curves`.

    Raises:
        ValueError: If a monitored metric does not exist.
    """

    def __init__(self) -> None:
        self._is_checked = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the check for a new run."""
        self._is_checked = False

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check before the first step."""
        if not _may_log_later(trainer, pl_module):
            self._check(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check after the first validation if the sanity check could not."""
        if not self._is_checked and not trainer.sanity_checking:
            self._check(trainer, pl_module)

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        known = {*trainer.callback_metrics}
        if not any(name.startswith("val/") for name in known):  # there are no validation images
            return
        self._is_checked = True
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            known.update(getattr(callback, "curves", ()))
        for who, name in _monitors(trainer):
            if not name.startswith("train/") and name not in known:
                raise ValueError(no_curve(name, known, who, pl_module))


def no_curve(name: str, known: set[str], who: str = "", module: Any = None) -> str:
    """Return the error message for a monitored metric that does not exist.

    Args:
        name: Name of the monitored metric.
        known: Names of all logged metrics.
        who: Name of the class that monitors it.
        module: The module to be trained.
    """
    hidden = () if getattr(module, "trains_logits", True) else getattr(module, "logit_metrics", ())
    subject = f"{who} cannot" if who else "cannot"
    if name.partition("/")[2] in hidden:
        reason = "it is not logged, because the loss does not train the logits"
    elif nearest := difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6):
        reason = f"no such metric (did you mean {' or '.join(map(repr, nearest))}?)"
    else:
        reason = "no such metric"
    return f"{subject} monitor {name!r}: {reason}; available: {', '.join(sorted(known))}"


def _monitors(trainer: L.Trainer) -> Iterator[tuple[str, str]]:
    """Yield the class name and the metric of each monitor."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        is_strict = isinstance(callback, ModelCheckpoint) or (isinstance(callback, EarlyStopping) and callback.strict)
        if is_strict and callback.monitor is not None:
            yield type(callback).__name__, callback.monitor
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.strict and config.monitor is not None:
            yield type(config.scheduler).__name__, config.monitor


def _may_log_later(trainer: L.Trainer, module: L.LightningModule) -> bool:
    """Return whether custom code may log metrics in training that it does not log in the sanity check."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    homes = [type(callback).__module__ for callback in callbacks]
    homes += [getattr(type(module), name).__module__ for name in _LOGS]
    has_lambdas = any(isinstance(callback, LambdaCallback) for callback in callbacks)
    return has_lambdas or not {home.partition(".")[0] for home in homes} <= set(_KNOWN)
