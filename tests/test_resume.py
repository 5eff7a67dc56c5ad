"""Resumed runs continue exactly like uninterrupted ones."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from warnings import catch_warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers.logger import Logger
from torch.optim.lr_scheduler import StepLR

from lkd import DistillModule
from lkd.callbacks import LastCheckpoint, StepSeed
from lkd.losses import CRD
from lkd.schedules import CosineDecay


class Record(L.Callback):
    """Records the images of each epoch, in order."""

    def __init__(self) -> None:
        self.seen: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.setdefault(trainer.current_epoch, []).extend(batch.index.tolist())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("end", [False, True], ids=["saved after validation", "saved after the epoch"])
def test_resumed_run_equals_the_uninterrupted_one(distill, data, trainer, tmp_path, workers: int, end: bool) -> None:
    data.num_workers = workers

    def fit(epochs: int, ckpt_path: str | None = None) -> tuple[DistillModule, Record]:
        record, path = Record(), str(tmp_path / f"to_{epochs}")
        keep = L.pytorch.callbacks.ModelCheckpoint(
            path, "run", enable_version_counter=False, save_on_train_epoch_end=end
        )
        module = distill(lr_scheduler=lambda optimizer: StepLR(optimizer, 1, 0.5))
        engine = trainer(max_epochs=epochs, callbacks=[record, keep], enable_checkpointing=True)
        engine.fit(module, data, ckpt_path=ckpt_path)
        return module, record

    whole, seen = fit(3)
    _, first = fit(2)
    resumed, rest = fit(3, str(tmp_path / "to_2" / "run.ckpt"))
    assert {**first.seen, **rest.seen} == seen.seen
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


class Curves(Logger):
    """Records all logged values."""

    name, version = "curves", 0

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[tuple[str, int], float] = {}

    def log_metrics(self, metrics, step=None) -> None:
        assert not {(name, step) for name in metrics} & set(self.points), "a point is logged twice"
        self.points |= {(name, step): value for name, value in metrics.items() if "images_per_s" not in name}

    def log_hyperparams(self, *args, **settings) -> None:
        pass


class Stop(L.Callback):
    """Raises an error after a number of batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_end(self, *args) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("crash")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"val_check_interval": 2},
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
        {"check_val_every_n_epoch": 2, "log_every_n_steps": 2},
        {"limit_train_batches": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("stopped_by", ["crash", "max_steps"])
def test_resume_from_every_step(distill, data, trainer, tmp_path, settings, stopped_by) -> None:
    data.batch_size = 8  # six batches per epoch
    by_step = stopped_by == "crash" and not settings.get("check_val_every_n_epoch")  # max_steps changes the length

    def fit(path, *extra, ckpt_path=None, **limits):
        plateau = partial(ReduceLROnPlateau, monitor="val/loss", patience=0)
        rate = partial(StepLR, step_size=1) if settings.get("check_val_every_n_epoch") else plateau
        module = distill(lr_scheduler=rate, criterion=CRD())
        if by_step:
            module = distill(lr_scheduler=CosineDecay, lr_scheduler_interval="step", criterion=CRD())
        curves = Curves()
        callbacks = [
            StepSeed(),
            LearningRateMonitor("epoch" if "accumulate_grad_batches" in settings else "step"),
            LastCheckpoint(every_n_train_steps=1),
            *extra,
        ]
        engine = trainer(
            **{"callbacks": callbacks, "logger": curves, "enable_checkpointing": True, "num_sanity_val_steps": 0},
            **{"default_root_dir": path, "log_every_n_steps": 1, **settings, "max_epochs": 2, **limits},
        )
        torch.manual_seed(0)  # `fit` creates the adapters
        with suppress(RuntimeError):
            engine.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return module, curves.points, engine

    whole, wanted, engine = fit(tmp_path / "whole")
    batches, steps = engine.fit_loop.epoch_loop.batch_progress.total.ready, engine.global_step
    last = "curves/version_0/checkpoints/last.ckpt"
    for number in range(2, batches if stopped_by == "crash" else steps, 4):
        path = tmp_path / str(number)
        _, first, engine = (
            fit(path, Stop(number)) if stopped_by == "crash" else fit(path, max_steps=number, max_epochs=-1)
        )
        step = torch.load(path / last, weights_only=True)["global_step"]
        resumed, rest, _ = fit(path, ckpt_path=path / last)
        first = {name: value for name, value in first.items() if name[1] < step}
        found = {**first, **rest}
        if stopped_by == "max_steps":  # the end of the shortened run adds a validation
            found = {name: value for name, value in found.items() if name in wanted}
        assert found == wanted, number
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), (number, name)


@pytest.mark.parametrize(("every", "warns"), [(2, True), (None, False)])
def test_other_batch_size_within_an_epoch(distill, data, trainer, tmp_path, every, warns: bool) -> None:
    def fit(*extra, **settings) -> LastCheckpoint:
        last = LastCheckpoint(every_n_train_steps=every)
        trainer(max_epochs=2, callbacks=[last, *extra], enable_checkpointing=True).fit(distill(), data, **settings)
        return last

    with pytest.raises(RuntimeError, match="crash"):
        fit(Stop(5))  # in the second epoch of three batches each
    data.batch_size = 8
    path = tmp_path / "checkpoints/last.ckpt"
    with catch_warnings(record=True) as warned:
        fit(ckpt_path=path, weights_only=True)
    expected = "with batch size 16 and 1 process(es), and resumes with batch size 8 and 1"
    assert any(expected in str(warning.message) for warning in warned) == warns
