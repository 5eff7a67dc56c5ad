"""Detectors train on the simulated device as on the CPU; they train without a graph, and the reason is reported."""

from __future__ import annotations

import torch
from torch.optim import SGD

from lkd import DistillModule, SyntheticDetectionDataModule
from lkd.callbacks import Speed
from lkd.losses import FGD, LD, PerAnchor, WeightedSum
from lkd.losses.kd import KD
from lkd.models import fcos
from lkd.tasks import Detection
from tests.pretended.device import NAME


def _module() -> DistillModule:
    torch.manual_seed(0)
    student, teacher = (fcos(5, filters, 32, num_convs=1, reg_max=4) for filters in ((4, 8), (8, 8)))
    heads = LD(["@box_maps"], ["@box_maps"], ["@class_maps"])
    criterion = WeightedSum({"kd": PerAnchor(KD()), "ld": heads, "fgd": FGD(["@pyramid"], ["@pyramid"])})
    return DistillModule(
        student, teacher, criterion, hard_weight=1.0, task=Detection(), optimizer=lambda p: SGD(p, lr=0.01)
    )


def test_training_equals_that_on_the_cpu(pretended, trainer, capsys) -> None:
    found = {}
    for device in ("cpu", NAME):
        module = _module()
        data = SyntheticDetectionDataModule((32, 48), train_size=12, val_size=4, batch_size=4, seed=0)
        fit = trainer(accelerator=device, max_epochs=1, callbacks=[Speed(channels_last=False, fuse_optimizer=False)])
        fit.fit(module, data)
        found[device] = {**module.state_dict(), **fit.callback_metrics}
    assert (
        "no CUDA graph (the number of boxes that detectors assign and select depends on the data)"
        in capsys.readouterr().out
    )
    assert found["cpu"].keys() == found[NAME].keys()
    for name, value in found["cpu"].items():
        torch.testing.assert_close(found[NAME][name].cpu(), value, rtol=0, atol=0, msg=name)
