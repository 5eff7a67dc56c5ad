"""In-memory datasets give the images of the ordinary loader, reuse their cache, and rebuild corrupt cache files."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import signal
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks import warm
from lkd import devices
from lkd.datamodules import (
    CenterCrop,
    ClassPartner,
    ImageDataModule,
    ImageFolderDataModule,
    Key,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RotatedViews,
    StrongView,
    base,
)
from lkd.datamodules import decoding as module
from lkd.datamodules.sources import Resident
from lkd.io import tensor_cache
from lkd.io.tensor_cache import cache_folder, save_tensors

SHIFTED = [RandomCrop(2), RandomHorizontalFlip()]
CPU = SimpleNamespace(root_device=torch.device("cpu"))
TREE = {"train": {"cat": 26, "dog": 22}, "test": {"cat": 4, "dog": 5}}


@pytest.fixture
def root(write_tree) -> str:
    return write_tree(TREE)


def folder(root, **kwargs) -> ImageFolderDataModule:
    return ImageFolderDataModule(root, 16, **{"num_workers": 0, "augment": SHIFTED, **kwargs})


def opened(root, stage="test", **kwargs) -> ImageFolderDataModule:
    datamodule = folder(root, **kwargs)
    datamodule.setup(stage)
    return datamodule


def pixels(datamodule, split="test") -> torch.Tensor:
    dataset = datamodule.datasets[split]
    index = torch.arange(len(dataset.target))
    return dataset.images(torch.zeros_like(index), index)


def cache_files() -> list[Path]:
    return sorted(cache_folder("images").iterdir()) if cache_folder("images").exists() else []


def batches(datamodule, epoch, processes=1, loader="train_dataloader"):
    """Return the batches of an epoch in all processes, one process after the other."""
    seen = []
    for rank in range(processes):
        datamodule.trainer = SimpleNamespace(world_size=processes, global_rank=rank, strategy=CPU)
        data = getattr(datamodule, loader)()
        data.sampler.set_epoch(epoch)
        seen += list(data)
    return seen


@pytest.mark.parametrize(
    ("settings", "processes"),
    [
        ({"batch_size": 1}, 1),
        ({"batch_size": 7, "num_workers": 2}, 1),
        ({"batch_size": 7, "views": StrongView()}, 1),
        ({"batch_size": 9, "views": StrongView([RandomResizedCrop(), RandomHorizontalFlip()])}, 1),
        ({"batch_size": 5, "views": RotatedViews()}, 1),
        ({"batch_size": 6, "label_size": 10, "drop_unlabelled": True, "in_channels": 1}, 1),
        ({"batch_size": 6, "label_size": 10}, 2),
        ({"batch_size": 4}, 3),
    ],
)
def test_batches_equal_those_of_the_ordinary_loader(root, settings, processes) -> None:
    ordinary = opened(root, "fit", resident_limit=0, **settings)
    decoded = opened(root, "fit", **settings)
    assert isinstance(decoded.datasets["train"].source, Resident)
    assert not isinstance(ordinary.datasets["train"].source, TensorDataset)
    assert decoded.datasets["train"].source is decoded.datasets["val"].source
    for loader, epoch in (("train_dataloader", 0), ("train_dataloader", 3), ("val_dataloader", 0)):
        pairs = zip(
            batches(decoded, epoch, processes, loader), batches(ordinary, epoch, processes, loader), strict=True
        )
        for ours, theirs in pairs:
            assert ours.views == theirs.views
            for name in ("input", "target", "index", "version"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_workers_decode_without_global_random_numbers(root, monkeypatch) -> None:
    expected = pixels(opened(root, resident_limit=0))
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    monkeypatch.setattr(module, "_PIECE", 4 * 16 * 16 * 3)
    torch.manual_seed(0)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(pixels(opened(root, num_workers=2)), expected)
    assert torch.equal(torch.rand(3), drawn)


def test_cached_images_are_reused(root, capfd) -> None:
    first = opened(root)
    assert f"Decoded 9 images in 0.0 s; cached in {cache_folder('images')}" in capfd.readouterr().err
    (file,) = cache_files()
    before = file.stat().st_mtime_ns, pixels(first)
    for path in Path(root, "test").rglob(
        "*.jpg"
    ):  # zeros with the same size and time, so that reading them would change the images
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = opened(root)
    assert torch.equal(pixels(again), before[1])
    assert (cache_files(), file.stat().st_mtime_ns) == ([file], before[0])
    assert capfd.readouterr().err == ""


def test_changed_files_are_decoded_again(root) -> None:
    path = Path(root, "test", "dog", "0003.jpg")
    names = []
    for change in (
        lambda: None,
        lambda: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
        lambda: Image.new("RGB", (40, 40), (255, 0, 0)).save(path),
        lambda: path.rename(path.with_name("0009.jpg")),
    ):
        change()
        assert torch.equal(pixels(opened(root)), pixels(opened(root, resident_limit=0)))
        names.append(cache_files())
    assert [len(files) for files in names] == [1, 2, 3, 4]


@pytest.mark.parametrize("settings", [{"crop_ratio": 0.8}, {"in_channels": 1}])
def test_other_settings_have_another_cache_file(root, settings) -> None:
    assert not torch.equal(pixels(opened(root)).float().mean(1), pixels(opened(root, **settings)).float().mean(1))
    assert len(cache_files()) == 2


def _cut(share):
    return lambda file: os.truncate(file, int(file.stat().st_size * share))


def _noise(place):
    def write(file) -> None:
        content = bytearray(file.read_bytes())
        content[place : place + 3 if place + 3 else None] = bytes(255 - byte for byte in content[place:][:3])
        file.write_bytes(content)

    return write


def _another_s(file) -> None:
    save_tensors(file, {"image": torch.zeros(9, 3, 16, 16, dtype=torch.uint8)}, {"files": "others"})


@pytest.mark.parametrize(
    "damage",
    [
        *(_cut(0.0), _cut(0.01), _cut(0.5), _cut(0.9999)),
        *(_noise(0), _noise(9), _noise(60), _noise(128), _noise(3000), _noise(-3)),
        lambda file: file.write_bytes(file.read_bytes() + b"\0"),
        lambda file: file.write_bytes(bytes(4)),
        lambda file: (file.unlink(), file.mkdir()),
        _another_s,
    ],
)
def test_corrupt_cache_files_are_rebuilt(root, damage) -> None:
    expected = pixels(opened(root)).clone()
    (file,) = cache_files()
    whole = file.read_bytes()
    damage(file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(pixels(opened(root)), expected)
    messages = [str(warning.message) for warning in caught if str(file.parent) in str(warning.message)]
    assert len(messages) == 1
    if file.is_dir():  # a folder cannot be replaced
        assert "cannot be cached" in messages[0]
        file.rmdir()
    else:
        assert messages[0].startswith(f"{file} is ignored and will be recreated: ")
        assert file.read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pixels(opened(root)), expected)


def test_images_are_decoded_if_the_cache_cannot_be_written(root, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LKD_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"set LKD_CACHE to a folder with 0 MB of free space, or resident_limit to 0"):
        datamodule = opened(root)
    assert datamodule.datasets["test"].source.file is None
    assert torch.equal(pixels(datamodule), pixels(opened(root, resident_limit=0)))


def test_full_disk(root, monkeypatch) -> None:
    cache_folder("images").mkdir(parents=True)
    save = tensor_cache.save_file

    def full(tensors, path, metadata) -> None:
        limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
        try:
            save(tensors, path, metadata)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
            signal.signal(signal.SIGXFSZ, before)

    monkeypatch.setattr(tensor_cache, "save_file", full)
    with pytest.warns(UserWarning, match="cannot be cached"):
        datamodule = opened(root)
    assert cache_files() == []
    assert torch.equal(pixels(datamodule), pixels(opened(root, resident_limit=0)))


def test_limit_of_the_decoded_size(root) -> None:
    size = 48 * 3 * 16 * 16
    for limit, decoded in ((size, True), (size - 1, False), (0, False)):
        datamodule = opened(root, "fit", resident_limit=limit)
        assert isinstance(datamodule.datasets["train"].source, Resident) == decoded
        assert isinstance(datamodule.datasets["val"].source, Resident) == decoded


def test_random_crops_read_the_files(root) -> None:
    datamodule = opened(root, "fit", augment=None)
    datamodule.setup("test")
    assert [datamodule.datasets[s].stored is None for s in ("train", "val", "test")] == [True, True, False]


def test_corrupt_image(root, monkeypatch) -> None:
    path = Path(root, "train", "dog", "0007.jpg")
    path.write_bytes(path.read_bytes()[:300])
    for workers, patience in ((0, 1.0), (1, 0.0)):
        monkeypatch.setattr(module, "_PATIENCE", patience)
        with pytest.raises(ValueError, match="cannot be read") as caught:
            opened(root, "fit", num_workers=workers)
        assert str(caught.value).startswith(f"image {path} cannot be read (")
        assert str(caught.value).endswith("; replace or remove it")
    path.unlink()
    path.symlink_to("nowhere.jpg")
    with pytest.raises(ValueError, match=rf"image {path} cannot be read \(FileNotFoundError"):
        opened(root, "fit")
    assert cache_files() == []


def test_settings_are_checked_before_images_are_decoded(root) -> None:
    with pytest.raises(ValueError, match="val_size"):
        opened(root, "fit", val_size=1000)
    assert cache_files() == []


class Own(ImageDataModule):
    """A user's dataset that counts how often it is read."""

    num_classes = 3
    input_shape = (1, 6, 6)
    mean, std = (0.5,), (0.5,)

    def __init__(self, **kwargs) -> None:
        super().__init__(num_workers=0, **kwargs)
        self.reads = 0

    def make_dataset(self, split):
        return None if split == "val" else self

    def __len__(self) -> int:
        return 30

    targets = tuple(i % 3 for i in range(30))

    def __getitem__(self, i):
        self.reads += 1
        return np.full((6 + i % 2, 8), 8 * i, dtype=np.uint8), i % 3


def test_own_dataset_is_read_once_and_not_cached() -> None:
    datamodule = Own(augment=SHIFTED, batch_size=6)
    datamodule.setup("fit")
    for epoch in range(2):
        assert len(batches(datamodule, epoch)) == 4
    assert datamodule.reads == 30
    assert torch.equal(pixels(datamodule, "train")[:, 0, 2, 2], 8 * torch.arange(30, dtype=torch.uint8))
    assert cache_files() == []


class Corner(CenterCrop):
    """A resize transform of a user, whose settings are unknown."""

    def reduced(self, image, full, size, draws):
        return image.crop((0, 0, size[1], size[0]))


def test_images_of_an_own_resize_are_not_cached(root) -> None:
    datamodule = folder(root)
    datamodule.resize = Corner()
    datamodule.setup("test")
    first = Image.open(next(iter(sorted(Path(root, "test", "cat").iterdir()))))
    assert np.array_equal(pixels(datamodule)[0].permute(1, 2, 0), np.asarray(first)[:16, :16])
    assert cache_files() == []


def test_pickled_dataset_contains_the_file_name_instead_of_pixels(root) -> None:
    dataset = opened(root, "fit", batch_size=20).datasets["train"]
    for _ in range(3):
        expected = dataset.__getitems__(range(20))
    pickled = pickle.dumps(dataset)
    assert len(pickled) < dataset.stored.nbytes / 4
    again = pickle.loads(pickled)
    assert again.source.file == dataset.source.file
    assert torch.equal(again.__getitems__(range(20)).input, expected.input)


def test_modified_pixels_do_not_change_the_file(root) -> None:
    datamodule = opened(root)
    (file,) = cache_files()
    before = file.read_bytes()
    datamodule.datasets["test"].stored.zero_()
    assert file.read_bytes() == before


def _setup(root, cache, start, results) -> None:
    os.environ["LKD_CACHE"] = cache
    start.wait()
    results.put(pixels(opened(root)).sum().item())


def test_concurrent_processes(root) -> None:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    start, results = context.Event(), context.Queue()
    racing = [context.Process(target=_setup, args=(root, os.environ["LKD_CACHE"], start, results)) for _ in range(4)]
    for process in racing:
        process.start()
    start.set()
    sums = {results.get(timeout=60) for _ in racing}
    for process in racing:
        process.join()
    assert sums == {pixels(opened(root, resident_limit=0)).sum().item()}
    assert len(cache_files()) == 1


COUNT = """
    import lightning as L
    import lkd

    class Image(lkd.ImageFolderDataModule):
        def setup(self, stage):
            super().setup(stage)
            with open("setups", "a") as file:
                print(self.trainer.global_rank, file=file)
"""


def test_one_process_decodes_for_all_ranks(root) -> None:
    Path("count.py").write_text(textwrap.dedent(COUNT))
    command = ["fit", "--config", "digits/kd", "--data", "count.Image"]
    data = [f"--data.root={root}", "--data.image_size=8", "--data.in_channels=1", "--data.augment=[]"]
    data += ["--data.batch_size=8", "--model.init_args.student.init_args.num_classes=2"]
    data += ["--model.init_args.teacher=lkd.models.resnet8", "--model.init_args.teacher_ckpt=null"]
    data += ["--model.init_args.teacher.init_args.num_classes=2", "--model.init_args.teacher.init_args.in_channels=1"]
    settings = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1"]
    both = warm.ranks(2, warm.module, "lkd", *command, *data, *settings)
    assert [done.code for done in both] == [0, 0], both
    assert "".join(done.stdout + done.stderr for done in both).count("Decoded 48 images in") == 1
    assert sorted(Path("setups").read_text().split()) == ["0", "0", "1"]
    assert len(cache_files()) == 1


@pytest.mark.parametrize("views", [None, StrongView([RandomResizedCrop()]), ClassPartner()])
def test_device_batches_equal_those_of_the_loader(root, views) -> None:
    datamodule = opened(root, "fit", batch_size=9, views=views)
    dataset = datamodule.datasets["train"]
    before = dataset.stored.clone(), dataset.target.clone(), dataset.index.clone()
    moved = dataset.to(torch.device("cpu"))
    val = datamodule.datasets["val"].to(torch.device("cpu"), moved.source)
    assert val.source is moved.source
    for epoch in (0, 0, 1, 1):
        keys = [Key(epoch, i) for i in range(9)]
        ours, theirs = moved.__getitems__(keys), dataset.__getitems__(keys)
        for name in ("input", "target", "index", "version"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    if isinstance(views, ClassPartner):  # its index of classes is on the device as well
        assert moved.to(torch.device("cpu"))._classes is not moved._classes
    now = dataset.stored, dataset.target, dataset.index
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    with pytest.raises(ValueError, match="cannot move images to cpu, as they are read one by one"):
        opened(root, "fit", resident_limit=0).datasets["train"].to(torch.device("cpu"))


def test_repeated_variants_are_equal(root) -> None:
    dataset, plain = (opened(root, "fit").datasets["train"] for _ in range(2))
    dataset.replay = 2
    for epoch in (4, 4, 4, 5, 5, 5, 0, 0, 0):
        batch = dataset.__getitems__([Key(epoch, i) for i in range(7)])
        assert torch.equal(batch.version, torch.full((7,), epoch % 2))
        assert torch.equal(batch.input, plain.__getitems__([Key(epoch % 2, i) for i in range(7)]).input)


def test_all_tensors_are_moved(root) -> None:
    """On the meta device, an operation with a tensor of another device fails."""
    dataset = opened(root, "fit").datasets["train"]
    moved = dataset.to(torch.device("meta"))
    batch = moved.__getitems__(range(5))
    assert {part.device.type for part in (batch.input, batch.target, batch.index, batch.version)} == {"meta"}
    assert batch.input.shape == (5, 3, 16, 16)
    assert dataset.__getitems__(range(5)).input.is_cpu


class Reader(L.LightningModule):
    """Records the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen, self.sources = nn.Linear(3 * 16 * 16, 2), {}, []

    def _see(self, kind, batch):
        self.seen.setdefault(kind, []).append((batch.index, batch.target, batch.input))
        return self.layer(batch.input.flatten(1)).square().mean()

    def training_step(self, batch, batch_idx):
        return self._see("train", batch)

    def validation_step(self, batch, batch_idx):
        self._see("val", batch)

    def test_step(self, batch, batch_idx):
        self._see("test", batch)

    def on_train_end(self):
        loaders = (self.trainer.train_dataloader, self.trainer.val_dataloaders)
        self.sources += [loader.dataset.source for loader in loaders]

    def on_test_end(self):
        self.sources.append(self.trainer.test_dataloaders.dataset.source)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("free", [10**9, 1])
def test_run_with_device_batches_sees_the_same_images(root, monkeypatch, trainer, free) -> None:
    """The CPU represents a GPU; only the kind of memory differs."""
    readers = []
    for gpu in (None, torch.device("cpu")):
        monkeypatch.setattr(base, "_gpu", lambda trainer, gpu=gpu: gpu)
        monkeypatch.setattr(devices, "free_memory", lambda device: free)
        datamodule, reader = folder(root, batch_size=9, seed=1), Reader()
        run = trainer()
        run.fit(reader, datamodule)
        run.test(reader, datamodule, verbose=False)
        readers.append(reader)
        assert len(datamodule._placement) == 0
    for kind in ("train", "val", "test"):
        for ours, theirs in zip(*(reader.seen[kind] for reader in readers), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for reader, moved in zip(readers, (False, free > 1), strict=True):
        assert [source.file is None for source in reader.sources] == [moved] * 3
        assert reader.sources[0] is reader.sources[1]
