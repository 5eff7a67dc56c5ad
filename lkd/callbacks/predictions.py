"""Predictions as a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lkd.datamodules import NewImages


class PredictionWriter(BasePredictionWriter):
    """Write one line for each image: its index, the class, the class's name where known, the probability.

    Of `NewImages`, a line begins with the name of the file; it ends there if the file cannot be read.

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
        names = getattr(pl_module, "class_names", ())
        probabilities, classes = prediction.float().softmax(1).max(1)
        for position, chosen, probability in zip(indices, classes.tolist(), probabilities.tolist(), strict=True):
            name = names[chosen] if chosen < len(names) else ""  # a network may have more classes than the data
            self._rows.append((position, chosen, name, round(probability, 6)))

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the file and say where it is."""
        several = trainer.world_size > 1
        path = self.path.with_suffix(f".{trainer.global_rank}{self.path.suffix}") if several else self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            data = getattr(trainer, "datamodule", None)
            columns = ("class", "class_name", "probability")
            if isinstance(data, NewImages):
                writer.writerows([("file", *columns), *self._by_file(data, trainer.is_global_zero)])
            else:
                writer.writerows([("index", *columns), *self._rows])
        pl_module.print(f"{len(self._rows)} predictions: {path}")
        self._rows.clear()

    def _by_file(self, data: NewImages, with_left_out: bool) -> list[tuple[str, ...]]:
        """The lines, with the names of the files."""
        found = {position: tuple(map(str, rest)) for position, *rest in self._rows if position is not None}
        found |= dict.fromkeys(data.left_out() if with_left_out else (), ("", "", ""))
        names = data.file_names()
        return [(names[position], *found[position]) for position in sorted(found)]
