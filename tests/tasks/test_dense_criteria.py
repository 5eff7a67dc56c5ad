"""Resuming of dense criteria with state; tests/pretended trains the overlays of all dense criteria."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
import torch

from lkd import DistillModule
from lkd.losses import CIRKD, CWD, CIRKDChannel, DistillLoss, MasKD
from tests.tasks.test_segmentation import TASK, Net, _loader

CRITERIA: dict[str, Callable[[], DistillLoss]] = {
    "CIRKD": lambda: CIRKD("body", "body", memory_size=(40, 10), num_keys=(20, 10)),
    "CIRKDChannel": lambda: CIRKDChannel("body", "body", memory_size=60, num_keys=20, channels_per_step=8),
    "CWD-features": lambda: CWD(["body"], ["body"]),
    "MasKD-features": lambda: MasKD(["body"], ["body"]),
}


def _module(name: str) -> DistillModule:
    module = DistillModule(Net(4), Net(8, 1), CRITERIA[name](), task=TASK)
    module.example_input_array = torch.zeros(1, 3, 16, 16)
    return module


@pytest.mark.parametrize("name", CRITERIA)
def test_training(name: str, tmp_path) -> None:
    L.seed_everything(0, verbose=False)
    module = _module(name)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **settings)
    before = {key: value.clone() for key, value in module.student.state_dict().items()}
    trainer.fit(module, _loader(), _loader())
    assert any(not torch.equal(value, before[key]) for key, value in module.student.state_dict().items())
    terms = [value for key, value in trainer.callback_metrics.items() if key.startswith("train/")]
    assert all(value.isfinite() for value in terms)
    assert any(key.startswith(f"train/{module.criterion.name}") for key in trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = _module(name)
    L.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **settings).fit(
        again, _loader(), _loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=False
    )
    for key, value in module.criterion.state_dict().items():
        assert torch.equal(again.criterion.state_dict()[key], value)
