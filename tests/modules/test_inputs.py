"""Inputs other than images: tuples of tensors, and user-defined batches."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lkd import Batch, DistillLoss, DistillModule, Outputs, Probe
from lkd.callbacks import ImagesPerSecond, NetworkSummary, Speed


class Pair(nn.Module):
    """A network with two inputs, one of them integers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.numbers = nn.Embedding(7, width), nn.Linear(3, width)
        self.head = nn.Linear(width, 4)

    def forward(self, input: tuple[Tensor, Tensor]) -> Tensor:
        words, numbers = input
        return self.head(self.words(words).mean(1) + self.numbers(numbers))


class Widened(DistillLoss):
    """A criterion with an adapter whose size is determined by a blank input."""

    def __init__(self) -> None:
        super().__init__(["@pooled"], ["@pooled"])

    def build(self, student: Probe, teacher: Probe) -> None:
        ours, theirs = (next(iter(probe.outputs.features.values())) for probe in (student, teacher))
        self.adapter = nn.Linear(ours.shape[1], theirs.shape[1])

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        (ours,), (theirs,) = student.features.values(), teacher.features.values()
        return mse_loss(self.adapter(ours), theirs)


class Named(DistillModule):
    def unpack(self, batch: dict) -> Batch:
        return Batch((batch["words"], batch["extra"]["numbers"]), batch["label"])


class PairData(L.LightningDataModule):
    batch_size = 8
    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.example_input = (torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 3))

    def _loader(self) -> DataLoader:
        draw = torch.Generator().manual_seed(0)
        samples = [
            {
                "words": torch.randint(7, (5,), generator=draw),
                "extra": {"numbers": torch.randn(3, generator=draw)},
                "label": i % 4,
            }
            for i in range(32)
        ]
        return DataLoader(samples, batch_size=8)

    train_dataloader = val_dataloader = _loader


def test_tuples_and_user_defined_batches(trainer, tmp_path, capsys) -> None:
    module = Named(Pair(4), Pair(8), Widened())
    engine = trainer(callbacks=[Speed(), NetworkSummary(), ImagesPerSecond()])
    engine.fit(module, PairData())
    assert module.criterion.adapter.weight.shape == (8, 4)
    assert engine.callback_metrics["val/acc"] >= 0
    assert engine.callback_metrics["train/images_per_s"] > 0
    assert "?" not in capsys.readouterr().out.split("Step")[0]  # operations were counted
    engine.save_checkpoint(tmp_path / "run.ckpt")
    again = Named.load_from_checkpoint(tmp_path / "run.ckpt", student=Pair(4), teacher=Pair(8), criterion=Widened())
    assert again.criterion.adapter.weight.equal(module.criterion.adapter.weight)  # built without the data


def test_example_inputs_of_user_classes_are_not_saved(trainer, tmp_path) -> None:
    class Own(tuple):
        __slots__ = ()

    data = PairData()
    data.example_input = Own(data.example_input)
    engine = trainer(max_epochs=1)
    engine.fit(Named(Pair(4), Pair(8)), data)
    engine.save_checkpoint(tmp_path / "run.ckpt")
    assert torch.load(tmp_path / "run.ckpt", weights_only=True)["lkd"]["example_input"] is None
