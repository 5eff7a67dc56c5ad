"""The host never waits for the device in a training step; the remaining waits occur per flush and per epoch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
import pytest

from lkd.__main__ import main
from tests.pretended.device import NAME, waits

KD = ["--config", "digits/kd"]
SEGMENTATION = ["--config", "shapes/kd", "--model.init_args.teacher_ckpt=null"]
SEGMENTATION += ["--model.init_args.task.init_args.class_weights=[0.5,1,1,2,2]"]
SEGMENTATION += ["--model.init_args.lr_scheduler_interval=epoch"]
"""The interval is `epoch`: with `step`, Lightning's `LearningRateMonitor` waits when it logs the learning rate."""
SEEN: dict[str, Counter[str]] = {}


class CountWaits(L.Callback):
    """Counts waits in steps without a flush, in steps with one, in validation and between epochs."""

    def __init__(self) -> None:
        SEEN.clear()
        self._phase = "start"

    def _begin(self, phase: str) -> None:
        SEEN.setdefault(self._phase, Counter()).update(waits)
        SEEN[self._phase]["times"] += 1
        waits.clear()
        self._phase = phase

    def on_train_start(self, *args: Any) -> None:
        self._begin("epoch")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        captures = batch_idx < 3  # also when cached logits are first read instead of written
        logs = (batch_idx + 1) % trainer.log_every_n_steps == 0 or trainer.is_last_batch
        self._begin("capture" if captures else "flush" if logs else "step")

    def on_validation_start(self, *args: Any) -> None:
        self._begin("epoch")

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._begin("validation" if trainer.current_epoch else "capture")

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if args[3] + 1 == trainer.num_val_batches[0]:
            self._begin("epoch")

    def on_train_epoch_start(self, *args: Any) -> None:
        self._begin("epoch")


@pytest.mark.parametrize("graph", ["auto", "off"])
@pytest.mark.parametrize(
    "settings",
    [
        KD,
        [*KD, "--config", "methods/dkd_crd_at"],
        [*KD, "--teacher_cache.versions=1"],
        [*KD, "--data.init_args.mix=lkd.datamodules.Mixup"],
        SEGMENTATION,
    ],
    ids=str,
)
def test_steps_do_not_wait(settings: list[str], graph: str, pretended) -> None:
    """TensorBoard, progress bar, metrics, schedule and checkpoints are enabled, as in `lkd fit`."""
    watched = ["--trainer.callbacks+=tests.pretended.test_waiting.CountWaits", "--trainer.log_every_n_steps=8"]
    short = ["--trainer.max_epochs=3", "--trainer.limit_train_batches=20", "--trainer.limit_val_batches=4"]
    there = ["--data.init_args.batch_size=16", f"--trainer.accelerator={NAME}", "--trainer.precision=32-true"]
    assert main(["fit", *settings, *there, *watched, *short, f"--speed.graph={graph}"]) == 0
    steps, validation = SEEN["step"], SEEN["validation"]
    assert steps.pop("times") > 40
    assert validation.pop("times") >= 6
    assert not +steps
    assert not +validation
    flushes = SEEN["flush"].pop("times")  # reads of non-finite steps, means and Lightning's bar
    assert sum(SEEN["flush"].values()) <= 4 * flushes
    epochs = SEEN["epoch"].pop("times")
    print(f"waits per flush: {dict(SEEN['flush'])} in {flushes}; between steps: {dict(SEEN['epoch'])} in {epochs}")
