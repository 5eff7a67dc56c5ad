"""Callback that logs validation images with predictions to TensorBoard."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lkd import devices
from lkd.callbacks.sheet import Row, sheet
from lkd.tasks import Task
from lkd.tasks.visualization import visualize_inputs
from lkd.types import Batch


class PredictionImages(L.Callback):
    """Log validation images with their labels and the predictions of teacher and student to TensorBoard.

    Masks are shown in colors, classes as text with their probabilities. The images are evenly spaced in the validation
    split (with several processes, in the share of the first one), so they are the same in each epoch. The networks run
    once more on these images only; random states are restored.

    Args:
        num_images: Number of images, at least 1.
        every_n_epochs: Interval in epochs, at least 1. The last epoch is always shown.

    Raises:
        ValueError: If an argument is less than 1 or, at the start of `fit`, if the task cannot show predictions.
    """

    def __init__(self, num_images: int = 8, every_n_epochs: int = 5) -> None:
        for name, number in (("num_images", num_images), ("every_n_epochs", every_n_epochs)):
            if number < 1:
                raise ValueError(f"PredictionImages: {name} must be at least 1, got {number}")
        self.num_images, self.every_n_epochs = num_images, every_n_epochs
        self._rows: list[Row] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Check the task and the logger.

        Raises:
            ValueError: If the task does not define `visualize`.
        """
        if type(pl_module.task).visualize is Task.visualize:
            raise ValueError(
                f"PredictionImages cannot show predictions of {type(pl_module.task).__name__}; override its method "
                "`visualize`, or remove the callback"
            )
        if stage == TrainerFn.FITTING and trainer.loggers and not _writers(trainer) and not _is_trial(trainer):
            rank_zero_warn("PredictionImages logs nothing without a TensorBoardLogger; add one, or remove the callback")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Discard the images of the previous epoch."""
        self._rows = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Run all networks on the selected images of a batch."""
        count = self._counts(trainer)[batch_idx] if self._is_due(trainer) and not dataloader_idx else 0
        if not count:
            return
        batch = _part(pl_module.read(batch), count)
        with devices.isolated_random_numbers(pl_module.device), trainer.precision_plugin.forward_context():
            logits = pl_module.network_logits(batch)
        if trainer.is_global_zero:  # all processes run the networks, as sharded weights require
            self._rows += _rows_of(pl_module, batch, logits, getattr(trainer, "datamodule", None))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the images."""
        if self._rows:
            drawn = sheet(self._rows)
            for logger in _writers(trainer):
                logger.experiment.add_image("predictions", drawn, trainer.global_step)
        self._rows = []

    def _is_due(self, trainer: L.Trainer) -> bool:
        epoch, is_fit = trainer.current_epoch + 1, trainer.state.fn == TrainerFn.FITTING
        is_due = epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs
        return is_fit and is_due and not trainer.sanity_checking and bool(_writers(trainer))

    def _counts(self, trainer: L.Trainer) -> Counter[int]:
        """Return the number of images to select from each batch, by batch index."""
        batches = trainer.num_val_batches[0]
        last = batches if isinstance(batches, int) else self.num_images  # the length of a stream is unknown
        return Counter(number * last // self.num_images for number in range(self.num_images))


def _writers(trainer: L.Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _is_trial(trainer: L.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _part(batch: Batch, count: int) -> Batch:
    """Return evenly spaced samples of a batch."""
    count = min(count, batch.size)
    return batch.rows([number * batch.size // count for number in range(count)])


def _rows_of(module: Any, batch: Batch, logits: dict[str, Tensor], data: Any) -> list[Row]:
    """Return one row per sample: image, label, and the prediction of each network."""
    names, task = module.class_names, module.task
    columns = {"label": task.visualize(batch.target, names)}
    columns |= {name: task.visualize(batch.target, names, own) for name, own in logits.items()}
    inputs = visualize_inputs(batch, getattr(data, "mean", None), getattr(data, "std", None))
    return [{"image": one, **{name: cells[row] for name, cells in columns.items()}} for row, one in enumerate(inputs)]
