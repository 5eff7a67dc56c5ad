"""Writing predictions to a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lkd.datamodules import NewImages
from lkd.tasks.classification import check_is_classification


class PredictionWriter(BasePredictionWriter):
    """Write predictions to a CSV file with one row per image: index, class, class name if known, and probability.

    For `NewImages`, the first column is the file name, and the other columns are empty if the file could not be read.

    Args:
        path: Path of the CSV file. With several processes, each writes its own file, `<name>.<rank>.csv`.
    """

    def __init__(self, path: str = "predictions.csv") -> None:
        super().__init__(write_interval="batch")
        self.path = Path(path)
        self._rows: list[tuple[int | None, int, str, float]] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Check the task before the first prediction."""
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            check_is_classification(pl_module, "lkd predict")

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
        """Collect the rows of a batch."""
        index = pl_module.unpack(batch).index
        indices = [None] * len(prediction) if index is None else index.tolist()
        names = getattr(pl_module, "class_names", ())
        probabilities, classes = prediction.float().softmax(1).max(1)
        for position, chosen, probability in zip(indices, classes.tolist(), probabilities.tolist(), strict=True):
            name = names[chosen] if chosen < len(names) else ""  # a network may have more classes than the data
            self._rows.append((position, chosen, name, round(probability, 6)))

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the file and print its path."""
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
        pl_module.print(f"{len(self._rows)} predictions written to {path}")
        self._rows.clear()

    def _by_file(self, data: NewImages, with_left_out: bool) -> list[tuple[str, ...]]:
        """Return the rows, with file names instead of indices."""
        found = {position: tuple(map(str, rest)) for position, *rest in self._rows if position is not None}
        found |= dict.fromkeys(data.left_out() if with_left_out else (), ("", "", ""))
        names = data.file_names()
        return [(names[position], *found[position]) for position in sorted(found)]
