"""Many fits in one process release their resources, and metrics are readable at any time."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import lightning as L
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import warm
from benchmarks.endurance import look
from lkd.__main__ import main

FIT = ["fit", "--config=digits/kd", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


class Fails(L.Callback):
    """Raises an error in training."""

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        raise ValueError("as wanted")


@pytest.mark.parametrize("fails", [False, True])
def test_repeated_fits_release_resources(fails: bool) -> None:
    settings = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=2"]
    settings += ["--data.init_args.num_workers=1"]
    settings += ["--trainer.callbacks+=tests.test_endurance.Fails"] if fails else ["--teacher_cache.versions=1"]
    before, seen = look(0), []
    for number in range(3):
        assert main([*FIT, *settings]) == (2 if fails else 0)
        seen.append(look(number))
    assert {(one.modules, one.workers) for one in seen} == {(before.modules, before.workers)}
    assert len({(one.files, one.threads, one.tensors) for one in seen[1:]}) == 1  # the first fit allocates what remains


def _losses(folder: Path) -> list[float]:
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    return [point.value for point in events.Scalars("train/loss")] if "train/loss" in events.Tags()["scalars"] else []


def _after(seconds: float, wanted: int, runs: Path) -> list[float]:
    """Return the losses as soon as there are enough of them or the time is over."""
    found: list[float] = []
    end = time.monotonic() + seconds
    while len(found) < wanted and time.monotonic() < end:
        time.sleep(0.1)
        found = [loss for folder in runs.glob("digits/kd/version_0") for loss in _losses(folder)]
    return found


def test_metrics_are_readable_during_a_run_and_after_a_kill(tmp_path: Path) -> None:
    process = warm.Forked(warm.module, "lkd", *FIT, "--trainer.max_epochs=100000")
    try:
        first = _after(120, 5, tmp_path / "runs")
        later = _after(60, len(first) + 5, tmp_path / "runs")
    finally:
        process.send(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    assert len(later) >= len(first) + 5 >= 10
    run = tmp_path / "runs/digits/kd/version_0"
    left = _losses(run)
    assert left[: len(later)] == later
    (file,) = run.glob("events.*")
    whole = file.read_bytes()
    for cut in (1, 3, 50, 500):  # the last record, or several, are incomplete
        file.write_bytes(whole[:-cut])
        rest = _losses(run)
        assert len(left) - 10 <= len(rest) <= len(left)
        assert left[: len(rest)] == rest
