from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from lkd.datamodules import (
    CenterCrop,
    DigitsDataModule,
    ImageDataModule,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    SyntheticDataModule,
)
from lkd.types import IGNORE_INDEX, Batch

CPU = SimpleNamespace(root_device=torch.device("cpu"))


class Given(ImageDataModule):
    """A data module for the images and labels of a test."""

    num_classes = 3
    input_shape = (1, 4, 4)
    mean, std = (0.5,), (0.5,)

    def __init__(self, train, val=None, **kwargs):
        super().__init__(**kwargs)
        self.sources = {"train": train, "val": val, "test": train}

    def make_dataset(self, split):
        return self.sources[split]


def tensors(size=30, shape=(1, 4, 4), num_classes=3):
    image = torch.randint(256, (size, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(image, torch.arange(size) % num_classes)


def items(kind, size=30, shape=(4, 4)):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(256, size=shape, dtype=np.uint8) for _ in range(size)]
    convert = {"pil": Image.fromarray, "array": lambda a: a, "tensor": lambda a: torch.as_tensor(a)[None]}[kind]
    return [(convert(array), i % 3) for i, array in enumerate(arrays)], arrays


def all_samples(loader):
    batches = list(loader)
    return Batch(*(torch.cat(parts) for parts in list(zip(*batches, strict=True))[:3]))


def test_batches_are_normalized_and_typed():
    source = tensors()
    datamodule = Given(source, batch_size=7, val_size=0)
    datamodule.setup("test")
    batch = all_samples(datamodule.test_dataloader())
    assert batch.input.dtype == torch.float32
    assert batch.target.dtype == batch.index.dtype == torch.int64
    assert torch.equal(batch.input, (source.tensors[0].float() / torch.tensor(255.0) - 0.5) / 0.5)
    assert torch.allclose(batch.input.double(), (source.tensors[0].double() / 255 - 0.5) / 0.5, atol=1e-6)
    assert torch.equal(batch.target, source.tensors[1])
    assert torch.equal(batch.index, torch.arange(30))


@pytest.mark.parametrize("kind", ["pil", "array", "tensor"])
def test_image_types_give_equal_batches(kind):
    source, arrays = items(kind)
    datamodule = Given(source, num_workers=0)
    datamodule.setup("test")
    batch = all_samples(datamodule.test_dataloader())
    expected = (torch.as_tensor(np.stack(arrays))[:, None].float() / torch.tensor(255.0) - 0.5) / 0.5
    assert torch.equal(batch.input, expected)
    assert batch.target.tolist() == [i % 3 for i in range(30)]


def test_images_are_converted_to_gray_and_eight_bits():
    deep = Image.fromarray(np.full((4, 4), 200 * 256 + 7, dtype=np.uint16))
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    datamodule = Given([(deep, 0), (red, 1), (Image.new("RGBA", (4, 4), (9, 9, 9, 0)), 2)], num_workers=0)
    datamodule.setup("test")
    image = datamodule.datasets["test"].images(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert image[:, 0, 0, 0].tolist() == [200, 76, 9]


def test_training_and_validation_images_are_disjoint():
    datamodule = Given(tensors(), val_size=0.2)
    datamodule.setup("fit")
    train, val = datamodule.datasets["train"].index, datamodule.datasets["val"].index
    assert (len(train), len(val)) == (24, 6)
    assert torch.equal(torch.cat((train, val)).sort().values, torch.arange(30))
    batch = all_samples(datamodule.val_dataloader())
    assert torch.equal(batch.index, val)
    assert torch.equal(batch.target, val % 3)
    assert batch.target.bincount().tolist() == [2, 2, 2]


def test_split_depends_only_on_its_seed():
    def held_out(**kwargs):
        datamodule = Given(tensors(), val_size=6, **kwargs)
        datamodule.setup("validate")
        return datamodule.datasets["val"].index.tolist()

    assert held_out(seed=0) == held_out(seed=1) == held_out(batch_size=3)
    assert held_out(split_seed=1) != held_out()


def test_own_validation_images_are_used():
    datamodule = Given(tensors(), val=tensors(5), val_size=0.3)
    datamodule.setup("fit")
    assert [len(datamodule.datasets[s]) for s in ("train", "val")] == [30, 5]


def test_augmentation_never_reaches_validation_and_test():
    plain = Given(tensors(), val_size=0.2, augment=[])
    heavy = Given(tensors(), val_size=0.2, augment=[RandomCrop(2), RandomHorizontalFlip(1.0)])
    for datamodule in (plain, heavy):
        datamodule.setup("fit")
        datamodule.setup("test")
    for loader in ("val_dataloader", "test_dataloader", "predict_dataloader"):
        for epoch in (0, 1):
            a, b = getattr(plain, loader)(), getattr(heavy, loader)()
            b.sampler.set_epoch(epoch)
            assert torch.equal(all_samples(a).input, all_samples(b).input)
    a, b = all_samples(plain.train_dataloader()), all_samples(heavy.train_dataloader())
    assert torch.equal(a.index, b.index)
    assert not torch.equal(a.input, b.input)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_evaluate_each_test_image_once(processes):
    datamodule = Given(tensors(29), batch_size=4)
    datamodule.setup("test")
    counted, batches = [], set()
    for rank in range(processes):
        datamodule.trainer = SimpleNamespace(world_size=processes, global_rank=rank, strategy=CPU)
        loader = datamodule.test_dataloader()
        batches.add(len(list(loader)))
        batch = all_samples(loader)
        assert ((batch.index >= 0) & (batch.index < 29)).all()
        counted += batch.index[batch.target != IGNORE_INDEX].tolist()
    assert len(batches) == 1  # no process waits for another
    assert sorted(counted) == list(range(29))


@pytest.mark.parametrize(("batch_size", "batches"), [(7, [7, 7, 7]), (24, [24]), (25, [24])])
def test_incomplete_training_batch_is_dropped_unless_it_is_the_only_one(batch_size, batches):
    datamodule = Given(tensors(), batch_size=batch_size, val_size=6)
    datamodule.setup("fit")
    assert [len(b.target) for b in datamodule.train_dataloader()] == batches
    assert sum(len(b.target) for b in datamodule.val_dataloader()) == 6


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (3, 0), (3, 1)])
@pytest.mark.parametrize("split", ["val", "test"])
def test_limited_evaluation_includes_all_classes(split, processes, workers):
    source = tensors(62)
    source.tensors[1].copy_(torch.arange(62).div(21, rounding_mode="floor"))  # sorted by class
    every = list(range(62))

    def seen(limit, batches=None, epoch=0, loader=split, **settings):
        datamodule = Given(source, source, **{"batch_size": 5, "num_workers": workers, **settings})
        datamodule.setup("fit")
        datamodule.setup("test")
        shares = []
        for rank in range(processes):
            limits = {f"limit_{split}_batches": limit}
            datamodule.trainer = SimpleNamespace(world_size=processes, global_rank=rank, strategy=CPU, **limits)
            loaded = getattr(datamodule, f"{loader}_dataloader")()
            loaded.sampler.set_epoch(epoch)
            parts = [batch.index[batch.target != IGNORE_INDEX] for batch in loaded]
            shares.append(torch.cat(parts[:batches]).tolist())
        return shares

    shares = seen(2, 2)
    together = list(chain(*shares))
    assert len(together) == len(set(together)) == 10 * processes
    assert torch.bincount(source.tensors[1][together], minlength=3).min() >= 2
    assert shares == seen(2, 2, epoch=1) == seen(0.2, 2, seed=7)  # the same images in every epoch and every run
    assert sorted(chain(*seen(2))) == every
    assert shares != seen(2, 2, split_seed=1)
    assert seen(1.0) == [every[rank::processes] for rank in range(processes)]
    assert seen(2, loader="predict") == seen(1.0)


def test_no_validation():
    datamodule = Given(tensors(), val_size=0)
    datamodule.setup("fit")
    assert len(datamodule.datasets["train"]) == 30
    assert datamodule.val_dataloader() == []


def test_unlabelled_images_are_used_for_training():
    source = tensors()
    source.tensors[1][:9] = IGNORE_INDEX
    datamodule = Given(source, val_size=6)
    datamodule.setup("fit")
    assert (all_samples(datamodule.val_dataloader()).target >= 0).all()
    assert (all_samples(datamodule.train_dataloader()).target == IGNORE_INDEX).sum() == 9


def test_resized_crop_works_on_images_in_memory():
    datamodule = Given(tensors(shape=(1, 4, 4)), augment=[RandomResizedCrop(), RandomHorizontalFlip()], num_workers=0)
    datamodule.setup("fit")
    assert datamodule.train_dataloader().dataset.stored is None
    assert next(iter(datamodule.train_dataloader())).input.shape == (27, 1, 4, 4)
    assert datamodule.datasets["val"].stored is not None


def test_workers_and_memory_pinning():
    datamodule = Given(tensors())
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    assert (loader.num_workers, loader.persistent_workers) == (0, False)
    assert loader.pin_memory == torch.cuda.is_available()
    files = Given(items("pil")[0], resident_limit=0)
    files.setup("fit")
    assert 1 <= files.train_dataloader().num_workers <= 4


@pytest.mark.parametrize("label", [3, -1, 1000])
def test_label_out_of_range(label):
    source = tensors()
    source.tensors[1][:4] = label
    message = (
        f"the train split of Given has 4 of 30 labels outside the 3 classes 0 to 2, such as {label}; "
        "correct the labels or num_classes"
    )
    with pytest.raises(ValueError, match=message):
        Given(source).setup("fit")


def test_unreadable_image():
    source, _ = items("pil")
    source[17] = (np.zeros((4, 4)), 2)
    datamodule = Given(source, num_workers=0, resident_limit=0)
    datamodule.setup("test")
    with pytest.raises(ValueError, match="image number 17 cannot be read") as caught:
        list(datamodule.test_dataloader())
    assert str(caught.value) == (
        "image number 17 cannot be read (TypeError: expected a PIL image, or a uint8 array or tensor, got "
        "float64); replace or remove it"
    )


def test_invalid_settings():
    def fails(message, error=ValueError, setup="fit", **kwargs):
        with pytest.raises(error, match=message):
            Given(**{"train": tensors(), **kwargs}).setup(setup)

    fails("batch_size must be at least 1, got 0", batch_size=0)
    fails("mean has 3 values, but images have 1 channels", mean=(0.5, 0.5, 0.5))
    fails("mean and std must have the same length, got 1 and 2", std=(0.5, 0.5))
    fails("std must be positive", std=(0.0,))
    fails("the train split of Given has no images", train=[])
    fails("the test split of Given has no images", setup="test", train=[])
    fails("val_size must be a fraction between 0 and 1, or a number of images below 30 ", val_size=40)
    fails("val_size 2 leaves no validation image of class 2", val_size=2)
    fails("RandomResizedCrop must be the first transform in augment", augment=[RandomCrop(1), RandomResizedCrop()])
    fails("CenterCrop must be the first transform in augment", augment=[RandomResizedCrop(), CenterCrop()])
    fails(r"must return a dataset, got None", train=None)
    floats = TensorDataset(torch.rand(5, 1, 4, 4), torch.zeros(5))
    fails(r"must have uint8 images \(N, C, H, W\), got torch.float32 \(5, 1, 4, 4\)", TypeError, train=floats)
    with pytest.raises(ValueError, match=r"Given has no train images yet; call prepare_data\(\) and setup\(\)"):
        Given(tensors()).train_dataloader()


def test_missing_attributes():
    class Nameless(ImageDataModule):
        def make_dataset(self, split):
            return tensors()

    with pytest.raises(TypeError, match="Nameless must set the attribute num_classes"):
        Nameless().setup("fit")


def test_unsupported_number_of_channels():
    class Spectral(Given):
        input_shape = (5, 4, 4)
        mean, std = (0.5,) * 5, (0.5,) * 5

    Spectral(tensors(shape=(5, 4, 4))).setup("fit")
    with pytest.raises(ValueError, match=r"must have 1 or 3 channels, got shape \(5, 4, 4\)"):
        Spectral(tensors(shape=(5, 6, 6))).setup("fit")


def test_class_names_are_numbers_unless_given():
    datamodule = Given(tensors())
    datamodule.setup("fit")
    assert datamodule.class_names == ("0", "1", "2")


def test_setup_opens_the_dataset_once():
    datamodule = Given(tensors())
    datamodule.setup("fit")
    before = dict(datamodule.datasets)
    datamodule.setup("fit")
    datamodule.setup("validate")
    assert datamodule.datasets == before


def test_digits_equal_scikit_learn():
    datamodule = DigitsDataModule(augment=[], val_size=0)
    datamodule.setup("fit")
    datamodule.setup("test")
    train, test = (datamodule.datasets[s] for s in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359)
    digits = load_digits()
    ours = torch.cat([d.stored for d in (train, test)]).squeeze(1).double() * 16 / 255
    assert (ours - ours.round()).abs().max() < 0.04
    kept = {
        (tuple(i.flatten().tolist()), t)
        for i, t in zip(ours.round(), torch.cat((train.target, test.target)).tolist(), strict=True)
    }
    assert kept == {
        (tuple(i.flatten().tolist()), t) for i, t in zip(digits.images, digits.target.tolist(), strict=True)
    }
    expected = np.bincount(digits.target) * 0.2
    assert np.abs(test.target.bincount().numpy() - expected).max() < 1
    pixels = train.stored.double() / 255
    assert datamodule.mean == pytest.approx((pixels.mean().item(),), abs=5e-5)
    assert datamodule.std == pytest.approx((pixels.std(correction=0).item(),), abs=5e-5)


def test_synthetic_images_are_deterministic_and_separable():
    def make(**kwargs):
        datamodule = SyntheticDataModule(num_classes=5, input_shape=(2, 8, 8), batch_size=1000, **kwargs)
        datamodule.setup("fit")
        datamodule.setup("test")
        return datamodule

    datamodule, again = make(seed=0), make(seed=1)
    train, test = (all_samples(getattr(datamodule, f"{s}_dataloader")()) for s in ("train", "test"))
    assert torch.equal(test.input, all_samples(again.test_dataloader()).input)
    assert train.target.bincount().tolist() == [180] * 5
    centres = torch.stack([train.input[train.target == c].mean(0) for c in range(5)])
    nearest = torch.cdist(test.input.flatten(1), centres.flatten(1)).argmin(1)
    assert (nearest == test.target).float().mean() > 0.99
    assert test.input.flatten(1).unique(dim=0).shape[0] == 200
