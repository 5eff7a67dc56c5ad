"""A run that is taken up again goes on as if it had never stopped."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from lkd import DistillModule


class Record(L.Callback):
    """Which images each epoch has, in their order."""

    def __init__(self) -> None:
        self.seen: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.setdefault(trainer.current_epoch, []).extend(batch.index.tolist())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("end", [False, True], ids=["saved after validation", "saved after the epoch"])
def test_resumed_run_is_the_uninterrupted_one(distill, data, trainer, tmp_path, workers: int, end: bool) -> None:
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
