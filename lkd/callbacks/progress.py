"""Progress of a run: a progress bar in a terminal, one line per epoch otherwise."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.callbacks import RichProgressBar

_EVERY = 0.1
"""Seconds between two updates of the bar; an update in every step would cost 0.1 ms each."""


class ProgressBar(RichProgressBar):
    """Rich progress bar with loss, accuracy and the estimated time until the end of `fit`."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=round(1 / _EVERY))
        self._start = (0.0, 0)
        self._shown = 0.0
        self._in_step = False
        self._metrics: dict[str, Any] = {}
        self._flushes: int | None = None  # the module's count when the metrics were read

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the timer."""
        super().on_train_start(trainer, pl_module)
        self._start = (time.monotonic(), trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the bar, at most ten times per second."""
        now = time.monotonic()
        if now - self._shown >= _EVERY or trainer.is_last_batch:
            self._shown, self._in_step = now, True
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._in_step = False

    def get_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        """Return the metrics and the remaining time shown next to the bar."""
        flushes = getattr(pl_module, "flushes", None)
        if not self._in_step or flushes is None or flushes != self._flushes:  # reading synchronizes with the GPU
            self._metrics, self._flushes = dict(super().get_metrics(trainer, pl_module)), flushes
        metrics = dict(self._metrics)
        metrics.pop("v_num", None)
        if left := _time_left(trainer, *self._start):
            metrics["left"] = left
        return metrics


class EpochLines(LightningProgressBar):
    """Print one line per epoch, for output that is redirected to a file."""

    def __init__(self) -> None:
        super().__init__()
        self._start = (0.0, 0)
        self._epoch_start = 0.0
        self.is_enabled = True

    def enable(self) -> None:
        """Enable the output."""
        self.is_enabled = True

    def disable(self) -> None:
        """Disable the output, as in all processes except rank zero."""
        self.is_enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the timer."""
        super().on_train_start(trainer, pl_module)
        self._start = (time.monotonic(), trainer.global_step)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the timer of the epoch."""
        super().on_train_epoch_start(trainer, pl_module)
        self._epoch_start = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print the line of the epoch."""
        if not self.is_enabled:
            return
        metrics: dict[str, Any] = {**self.get_metrics(trainer, pl_module)}
        parts = [f"{name} {float(value):.4g}" for name, value in metrics.items() if name != "v_num"]
        parts.append(str(timedelta(seconds=round(time.monotonic() - self._epoch_start))))
        is_last = trainer.current_epoch + 1 == trainer.max_epochs
        if not is_last and (left := _time_left(trainer, *self._start)):
            parts.append(f"{left} left")
        last = trainer.max_epochs
        epoch = f"epoch {trainer.current_epoch + 1}" + (f" of {last}" if last is not None and last > 0 else "")
        print(f"{epoch}: {', '.join(parts)}", flush=True)


def _time_left(trainer: L.Trainer, since: float, first_step: int) -> str | None:
    """Return the estimated time until the end of `fit`; `None` if it is not known."""
    done, steps = trainer.global_step - first_step, trainer.estimated_stepping_batches - trainer.global_step
    if not done or not 0 < steps < float("inf"):
        return None
    return str(timedelta(seconds=round((time.monotonic() - since) / done * steps)))
