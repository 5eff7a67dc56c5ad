from __future__ import annotations

import csv
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lkd.__main__ import main

CONFIG = """
model:
  class_path: lkd.DistillModule
  init_args:
    student: {class_path: lkd.models.CIFARResNet, init_args: {depth: 8, num_filters: [4, 4, 4, 4], num_classes: 4}}
    teacher: {class_path: lkd.models.CIFARResNet, init_args: {depth: 8, num_filters: [4, 4, 4, 4], num_classes: 4}}
    criterion: {class_path: lkd.losses.KD, init_args: {temperature: 4.0}}
data:
  class_path: lkd.SyntheticDataModule
  init_args: {num_classes: 4, input_shape: [3, 8, 8], train_size: 64, test_size: 16, val_size: 32, batch_size: 16}
trainer: {max_epochs: 2, accelerator: cpu, num_sanity_val_steps: 0}
speed: {fold_teacher: false}
"""
SPACE = """
model.init_args.criterion.init_args.temperature: {low: 1, high: 16, log: true}
model.init_args.distill_weight: [0.1, 0.5, 0.9]
"""
FOLDER = Path("runs/small/sweep")


@pytest.fixture(autouse=True)
def _small_config(_use_temporary_folder) -> Iterator[None]:
    """Write a small config and a search space to the working folder."""
    Path("small.yaml").write_text(CONFIG)
    Path("space.yaml").write_text(SPACE)
    gc.freeze()  # otherwise, the garbage collection after each trial scans imports for 0.2 s
    yield
    gc.unfreeze()


@pytest.fixture
def sweep(capsys) -> Callable[..., tuple[int, str]]:
    """Return a function that runs `lkd sweep` and returns its exit code and output."""

    def run(*args: str, space: bool = True) -> tuple[int, str]:
        code = main(["sweep", "--config=small.yaml", *(["--space=space.yaml"] if space else []), *args])
        out, err = capsys.readouterr()
        return code, out + err

    return run


def table(folder: Path = FOLDER) -> list[dict[str, str]]:
    """Read the rows of the table of trials."""
    with (folder / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))
