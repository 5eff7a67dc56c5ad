from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lkd import FineTuneModule
from lkd.callbacks import KNN, ImagesPerSecond, LinearProbe, NetworkSummary, Speed
from lkd.callbacks.monitor import network_size
from lkd.losses import AT, KD, DistillLoss
from lkd.models import factories


class Modes(Callback):
    """Notes the mode of two layers in each training step."""

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
def test_a_frozen_batchnorm_stays_frozen(distill, data, trainer, criterion: DistillLoss, hard_weight: float) -> None:
    """Through the summary, the loss's trial, validation, the evaluation of features, and the next epoch."""
    module, modes = distill(criterion=criterion, hard_weight=hard_weight), Modes()
    frozen, other = module.student.bn1.eval(), module.student.layer1[0].bn1
    before = frozen.running_mean.clone(), other.running_mean.clone()
    callbacks = [NetworkSummary(), ImagesPerSecond(), Speed(), KNN(), LinearProbe(max_iter=2), modes]
    trainer(num_sanity_val_steps=-1, callbacks=callbacks).fit(module, data)
    assert modes.seen == {(False, True)}
    assert torch.equal(frozen.running_mean, before[0])
    assert not torch.equal(other.running_mean, before[1])


def test_trying_a_network_on_small_images_keeps_the_mode_of_each_layer() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    network[1].eval()
    factories._check_runs(network, "mine", network[0])
    assert [layer.training for layer in network] == [True, False, True]


def test_freezing_some_layers_keeps_the_mode_of_the_others(tiny) -> None:
    network = tiny()
    network.bn1.eval()
    module = FineTuneModule(network, frozen=["layer1"])
    assert not any(layer.training for layer in (network.bn1, *network.layer1.modules()))
    assert module.training
    assert network.layer2.training
