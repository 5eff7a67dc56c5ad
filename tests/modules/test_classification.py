"""Properties of all modules, including users' own ones."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import DataLoader

import lkd
from lkd import DistillModule
from lkd.types import IGNORE_INDEX


@pytest.mark.parametrize("before", ["validate", "test"])
def test_fit_after_an_evaluation(distill, data, trainer, before: str) -> None:
    module = distill()
    for loop in (before, "fit", before, "fit"):
        engine = trainer(max_epochs=1)
        getattr(engine, loop)(module, data)
    assert "val/acc" in engine.callback_metrics


class LearningRate(L.Callback):
    """Sets the learning rate."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def on_train_start(self, trainer, pl_module) -> None:
        trainer.optimizers[0].param_groups[0]["lr"] = self.rate


def test_fit_after_a_diverged_run(distill, data, trainer) -> None:
    module = distill(optimizer=lambda parameters: SGD(parameters, lr=1e30))
    start = deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="the loss is not finite"):
        trainer().fit(module, data)
    module.load_state_dict(start)
    trainer(max_epochs=1, callbacks=[LearningRate(0.01)], log_every_n_steps=1).fit(module, data)


class OwnStep(DistillModule):
    def training_step(self, batch, batch_idx: int) -> Tensor:
        batch = self.unpack(batch)
        loss = self.hard_loss(self(batch.input), batch.target)
        self.log("train/own", loss)
        return loss


def test_own_training_step(distill, data, trainer) -> None:
    engine = trainer(max_epochs=1)
    engine.fit(distill(OwnStep), data)
    assert {"train/own", "val/acc"} <= set(engine.callback_metrics)


class OwnSettings(DistillModule):
    def __init__(self, student: nn.Module, teacher: nn.Module, extra: nn.Module, stretch: float = 2.0, **rest) -> None:
        super().__init__(student, teacher, **rest)
        self.save_hyperparameters()
        self.save_hyperparameters({"networks": [extra], "sizes": [1, 2], "number": np.float64(1)})
        self.stretch = stretch


def test_networks_are_not_hyperparameters(distill, data, trainer, tmp_path) -> None:
    module, engine = distill(OwnSettings, extra=nn.Linear(2, 2), stretch=3.0, hard_weight=0.5), trainer(max_epochs=1)
    engine.fit(module, data)
    engine.save_checkpoint(tmp_path / "own.ckpt")
    kept = torch.load(tmp_path / "own.ckpt", weights_only=True)["hyper_parameters"]
    assert {"stretch", "hard_weight", "sizes"} <= set(kept)
    assert not {"student", "teacher", "extra", "optimizer", "networks", "number"} & set(kept)


def test_own_hard_loss_without_mixing(tiny, data, trainer) -> None:
    class Own(lkd.ClassificationModule):
        def hard_loss(self, logits, target):
            return super().hard_loss(logits, target)

    trainer(max_epochs=1).fit(Own(tiny()), data)


def test_evaluation_loss_is_the_mean_over_images(tiny, trainer) -> None:
    """The mean is taken over labelled images, not over batches: batches may be smaller or contain unlabelled images."""
    data = lkd.SyntheticDataModule(4, (3, 8, 8), train_size=64, val_size=16, test_size=37, batch_size=16)
    data.prepare_data()
    data.setup("test")
    batches = list(data.test_dataloader())
    batches[0] = batches[0]._replace(target=batches[0].target.masked_fill(batches[0].target != 1, IGNORE_INDEX))
    module = lkd.ClassificationModule(tiny(), label_smoothing=0.3).eval()  # label smoothing applies only in training
    values = [module(batch.input)[batch.target != IGNORE_INDEX] for batch in batches]
    targets = [batch.target[batch.target != IGNORE_INDEX] for batch in batches]
    expected = cross_entropy(torch.cat(values), torch.cat(targets)).item()
    (found,) = trainer().test(module, DataLoader(batches, batch_size=None), verbose=False)
    assert found["test/loss"] == pytest.approx(expected, rel=1e-5)
    unlabelled = [batch._replace(target=torch.full_like(batch.target, IGNORE_INDEX)) for batch in batches]
    (found,) = trainer().test(module, DataLoader(unlabelled, batch_size=None), verbose=False)
    assert found["test/loss"] == 0


class WithMargin(DistillModule):
    """A module that forwards unknown arguments to its base class."""

    def __init__(self, student: nn.Module, teacher: nn.Module, *, margin: float = 0.5, **settings: Any) -> None:
        super().__init__(student, teacher, **settings)
        self.margin = margin


def test_subclass_that_forwards_arguments_is_loaded(tiny, data, trainer, tmp_path) -> None:
    module = WithMargin(tiny(1), tiny(2), margin=0.7, hard_weight=0.3)
    engine = trainer(max_steps=1)
    engine.fit(module, data)
    engine.save_checkpoint(tmp_path / "own.ckpt")
    loaded = WithMargin.load_from_checkpoint(tmp_path / "own.ckpt", student=tiny(3), teacher=tiny(2))
    assert (loaded.margin, loaded.hard_weight) == (0.7, 0.3)
    assert loaded.student.conv1.weight.equal(module.student.conv1.weight)


def test_own_forward(tiny, data, trainer) -> None:
    class Doubled(lkd.ClassificationModule):
        def forward(self, input):
            return 2 * super().forward(input)

    module = Doubled(tiny())
    data.setup("fit")
    batch = module.read(next(iter(data.train_dataloader())))
    logits, _ = module.losses(batch)
    torch.testing.assert_close(logits, 2 * module.model(batch.input))
