"""Predictions as a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor


class PredictionWriter(BasePredictionWriter):
    """Write one line for each image: its index, the class, the class's name where known, the probability.

    Args:
        path: The CSV file; with several processes each writes its own, `<name>.<rank>.csv`.
    """

    def __init__(self, path: str = "predictions.csv") -> None:
        super().__init__(write_interval="batch")
        self.path = Path(path)
        self._rows: list[tuple[int | None, int, str, float]] = []

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep one batch's lines."""
        index = pl_module.unpack(batch).index
        indices = [None] * len(prediction) if index is None else index.tolist()
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None) or ()
        probabilities, classes = prediction.float().softmax(1).max(1)
        for position, chosen, probability in zip(indices, classes.tolist(), probabilities.tolist(), strict=True):
            self._rows.append((position, chosen, names[chosen] if chosen < len(names) else "", round(probability, 6)))

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the file and say where it is."""
        several = trainer.world_size > 1
        path = self.path.with_suffix(f".{trainer.global_rank}{self.path.suffix}") if several else self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("index", "class", "class_name", "probability"))
            writer.writerows(self._rows)
        pl_module.print(f"{len(self._rows)} predictions: {path}")
        self._rows.clear()
