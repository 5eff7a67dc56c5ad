from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lkd import Batch, FineTuneModule
from lkd.callbacks import KNN, ImagesPerSecond, LinearProbe, NetworkSummary, Speed
from lkd.callbacks.monitor import network_size
from lkd.losses import AT, KD, DistillLoss
from lkd.models import factories


class RecordModes(Callback):
    """Records the modes of two layers in each training step."""

    def __init__(self) -> None:
        self.seen: set[tuple[bool, bool]] = set()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.add((pl_module.student.bn1.training, pl_module.student.layer1[0].bn1.training))


def test_counting_operations_keeps_the_mode_of_each_layer(tiny) -> None:
    network = tiny()
    network.bn1.eval()
    modes = [module.training for module in network.modules()]
    network_size("student", network, torch.zeros(1, 3, 8, 8))
    assert [module.training for module in network.modules()] == modes
    network.eval()
    with pytest.raises(RuntimeError):
        network_size("student", network, torch.zeros(1, 7, 8, 8))
    assert not network.training


@pytest.mark.parametrize(("criterion", "hard_weight"), [(KD(), 0.1), (AT(), 0.0)], ids=["kd", "at"])
def test_frozen_batchnorm_remains_frozen(distill, data, trainer, criterion: DistillLoss, hard_weight: float) -> None:
    """The summary, the trial of the loss, validation, the evaluation of features and the next epoch keep the mode."""
    module, modes = distill(criterion=criterion, hard_weight=hard_weight), RecordModes()
    frozen, other = module.student.bn1.eval(), module.student.layer1[0].bn1
    before = frozen.running_mean.clone(), other.running_mean.clone()
    callbacks = [NetworkSummary(), ImagesPerSecond(), Speed(), KNN(), LinearProbe(max_iter=2), modes]
    trainer(num_sanity_val_steps=-1, callbacks=callbacks).fit(module, data)
    assert modes.seen == {(False, True)}
    assert torch.equal(frozen.running_mean, before[0])
    assert not torch.equal(other.running_mean, before[1])


def test_trial_on_small_images_keeps_the_mode_of_each_layer() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    network[1].eval()
    factories._check_runs(network, "mine", network[0])
    assert [layer.training for layer in network] == [True, False, True]


def test_speed_counts_each_image_once_and_excludes_validation(monkeypatch) -> None:
    now, logged = [100.0], {}
    monkeypatch.setattr("lkd.callbacks.monitor.time.perf_counter", lambda: now[0])
    batch = Batch(torch.zeros(12, 1), torch.zeros(12), views=3)
    module = SimpleNamespace(unpack=lambda batch: batch, log=lambda name, value, **_: logged.update({name: value}))
    speed, engine = ImagesPerSecond(), SimpleNamespace(world_size=2)
    for _ in range(2):  # the second epoch starts from zero
        speed.on_train_epoch_start(engine, module)
        for seconds, call in ((1, "batch"), (50, "validation"), (3, "batch")):
            now[0] += seconds
            if call == "batch":
                speed.on_train_batch_end(engine, module, None, batch, 0)
            else:
                speed.on_validation_end(engine, module)
        speed.on_train_epoch_end(engine, module)
        assert logged == {"train/images_per_s": 2 * 2 * 4 / 4}


def test_freezing_some_layers_keeps_the_mode_of_the_others(tiny) -> None:
    network = tiny()
    network.bn1.eval()
    module = FineTuneModule(network, frozen=["layer1"])
    assert not any(layer.training for layer in (network.bn1, *network.layer1.modules()))
    assert module.training
    assert network.layer2.training
