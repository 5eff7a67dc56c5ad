"""Curves of training: when they are logged, what they contain, and where they go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import lightning as L
import torch

from lkd.modules.meter import CORRECT, LABELLED, LOSS, ValueName

_IN_PROGRESS_BAR = ("train/loss", "train/acc")


def is_due(trainer: L.Trainer, batch_idx: int) -> bool:
    """Return whether curves are logged after a batch: every `log_every_n_steps` steps, and at least once per epoch.

    Args:
        trainer: The trainer.
        batch_idx: Index of the batch in its epoch, from 0.
    """
    every = cast("int", trainer.log_every_n_steps)  # type: ignore[attr-defined]
    steps, rest = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
    return bool(every) and ((trainer.is_last_batch and steps < every) or (not rest and steps % every == 0))


def curves_of(means: Mapping[ValueName, float], has_accuracy: bool) -> dict[str, float]:
    """Return the logged curves: loss, terms and accuracy.

    Args:
        means: Mean of each value over the steps since the curves were last logged.
        has_accuracy: Whether to include the accuracy.
    """
    curves = {"train/loss": means[LOSS]}
    curves |= {f"train/{value.name}": mean for value, mean in means.items() if value.kind == "term"}
    if has_accuracy and LABELLED in means:
        curves["train/acc"] = means[CORRECT] / max(means[LABELLED], 1e-9)
    return curves


def log_curves(module: L.LightningModule, curves: Mapping[str, float]) -> None:
    """Pass values to loggers, progress bar and callbacks.

    `self.log` is not used, because Lightning would copy the progress bar's values from the device in every later step.

    Args:
        module: The trained module.
        curves: Values by name.
    """
    trainer = module.trainer
    trainer.progress_bar_metrics.update({name: value for name, value in curves.items() if name in _IN_PROGRESS_BAR})
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in curves.items()})
    for logger in module.loggers:
        logger.log_metrics(dict(curves), step=module.global_step - 1)  # as Lightning numbers the steps
