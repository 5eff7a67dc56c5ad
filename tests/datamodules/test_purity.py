"""The image of (seed, epoch, index) is the same tensor in any batch, worker and process."""

import pickle
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn

from lkd.datamodules import (
    DigitsDataModule,
    Key,
    permutation,
)
from tests.datamodules.sources import in_memory

CPU = SimpleNamespace(root_device=torch.device("cpu"))


def read(datamodule, epoch, processes=1):
    """Return all images of one epoch in all processes, by index."""
    datamodule.setup("fit")
    seen = {}
    for rank in range(processes):
        datamodule.trainer = SimpleNamespace(world_size=processes, global_rank=rank, strategy=CPU)
        loader = datamodule.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            for image, index in zip(batch.input, batch.index.tolist(), strict=True):
                assert torch.equal(image, seen.setdefault(index, image))
    return seen


def reference(datamodule, epoch):
    """Return the same images, read one at a time."""
    datamodule.setup("fit")
    dataset = datamodule.datasets["train"]
    batches = [dataset[Key(epoch, i)] for i in range(len(dataset))]
    return {int(batch.index): batch.input[0] for batch in batches}


def assert_same(seen, expected):
    assert len(seen) >= 60
    for index, image in seen.items():
        assert torch.equal(image, expected[index])


@pytest.mark.parametrize("make", ["memory", "files"], indirect=True)
def test_images_do_not_depend_on_batch_size_workers_and_processes(make):
    expected = reference(make(), epoch=3)
    for batch_size, workers, processes in [
        (1, 0, 1),
        (7, 2, 1),
        (64, 0, 1),
        (7, 0, 2),
        (7, 0, 3),
        (20, 2, 3),
    ]:
        assert_same(read(make(batch_size=batch_size, num_workers=workers), 3, processes), expected)


@pytest.mark.parametrize("make", ["memory", "files"], indirect=True)
def test_images_depend_on_epoch_and_seed(make):
    first = reference(make(seed=0), epoch=0)
    for other in (reference(make(seed=0), epoch=1), reference(make(seed=1), epoch=0)):
        assert other.keys() == first.keys()  # the split is the same
        different = sum(not torch.equal(first[i], other[i]) for i in first)
        assert different > 0.9 * len(first)


@pytest.mark.parametrize("make", ["memory", "files"], indirect=True)
def test_persistent_workers_get_the_epoch(make):
    datamodule = make(batch_size=20, num_workers=2)
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    assert loader.persistent_workers
    orders = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        expected = reference(datamodule, epoch)
        batches = list(loader)
        orders.append(tuple(torch.cat([batch.index for batch in batches]).tolist()))
        for batch in batches:
            assert torch.equal(batch.input, torch.stack([expected[i] for i in batch.index.tolist()]))
    assert len(set(orders)) == 3


def test_device_batches_equal_those_of_the_loader():
    datamodule = in_memory(batch_size=32)
    datamodule.setup("fit")
    dataset = datamodule.datasets["train"]
    loader = datamodule.train_dataloader()
    loader.sampler.set_epoch(5)
    batch = next(iter(loader))
    epoch = torch.full_like(batch.index, 5)
    assert torch.equal(dataset.view(dataset.stored[batch.index], epoch, batch.index), batch.input)


def test_default_seed_is_that_of_the_run(monkeypatch):
    def same(a, b):
        return all(torch.equal(a[i], b[i]) for i in a)

    given = {seed: reference(in_memory(seed=seed), 0) for seed in (0, 7, 8)}
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    datamodule = in_memory()
    assert same(reference(datamodule, 0), given[7])
    assert not same(reference(datamodule, 0), given[8])
    assert same(reference(in_memory(seed=8), 0), given[8])
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")  # the next run with the same data module
    assert same(reference(datamodule, 0), given[8])
    assert datamodule.train_dataloader().sampler.seed == 8
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert same(reference(in_memory(), 0), given[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_not_used(workers):
    datamodule = in_memory(batch_size=16, num_workers=workers)
    torch.manual_seed(0)
    read(datamodule, 0)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


def test_dataset_can_be_pickled_for_workers():
    datamodule = in_memory()
    datamodule.setup("fit")
    dataset = datamodule.datasets["train"]
    keys = [Key(1, 3), Key(1, 5)]
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).__getitems__(keys).input, dataset.__getitems__(keys).input)


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch.index.tolist(), batch.input))
        return self.layer(batch.input.flatten(1)).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return batch.index

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("error:.*(sampler|shuffl|drop_last).*")
@pytest.mark.parametrize("workers", [0, 1])
def test_under_a_trainer(workers):
    datamodule, module = DigitsDataModule(batch_size=100, num_workers=workers, seed=2), Recorder()
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule)
    dataset = datamodule.datasets["train"]
    for epoch in range(2):
        order = permutation(2, epoch, len(dataset))
        batches = [(index, image) for e, index, image in module.seen if e == epoch]
        assert len(batches) == len(dataset) // 100
        for i, (index, image) in enumerate(batches):
            keys = [Key(epoch, position) for position in order[100 * i : 100 * (i + 1)].tolist()]
            assert index == dataset.__getitems__(keys).index.tolist()
            assert torch.equal(image, dataset.__getitems__(keys).input)
    trainer.validate(module, datamodule, verbose=False)
    trainer.test(module, datamodule, verbose=False)
    predicted = torch.cat(trainer.predict(module, datamodule))
    assert torch.equal(predicted, torch.arange(359))


def test_overfit_batches():
    module = Recorder()
    trainer = L.Trainer(
        max_epochs=1,
        overfit_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    datamodule = DigitsDataModule(batch_size=8)
    trainer.fit(module, datamodule)
    assert module.seen[0][1] == datamodule.datasets["train"].index[:8].tolist()


def test_loader_can_be_modified():
    datamodule = in_memory(batch_size=16)
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    loader.collate_fn = lambda batch: "mine"
    assert set(loader) == {"mine"}
