import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lkd.datamodules import (
    CIFAR10DataModule,
    ImageFolderDataModule,
    ImageNetDataModule,
    TinyImageNetDataModule,
)
from lkd.datamodules.archives import MNISTDataModule
from lkd.datamodules.files import ImageFiles, read_tree
from lkd.datamodules.sources import Resident

PETS = {"train": {"dog": 12, "cat": 9}, "test": {"cat": 4, "dog": 5}}


def folder(root, **kwargs):
    return ImageFolderDataModule(root, 16, **{"num_workers": 0, **kwargs})


def test_folder_equals_torchvision(write_tree):
    root = write_tree(PETS)
    datamodule = folder(root, batch_size=100, crop_ratio=0.875)
    datamodule.setup("fit")
    datamodule.setup("test")
    assert (datamodule.num_classes, datamodule.class_names) == (2, ("cat", "dog"))
    assert datamodule.input_shape == (3, 16, 16)
    assert sum(len(datamodule.datasets[s]) for s in ("train", "val")) == 21
    transform = v2.Compose(
        [
            v2.Resize(18),
            v2.CenterCrop(16),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(datamodule.mean, datamodule.std),
        ]
    )
    expected = ImageFolder(Path(root, "test"), transform)
    batch = next(iter(datamodule.test_dataloader()))
    assert batch.target.tolist() == expected.targets
    assert torch.allclose(batch.input, torch.stack([image for image, _ in expected]), atol=1e-5)
    assert isinstance(datamodule.datasets["test"].source, Resident)
    theirs = [Path(name) for name, _ in ImageFolder(Path(root, "train")).samples]
    ours = datamodule.datasets["train"].source
    assert [ours.path(i) for i in range(len(ours))] == theirs


def test_training_images_are_random_crops(write_tree):
    datamodule = folder(write_tree(PETS), augment=None, val_size=0)
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    first, again = next(iter(loader)), next(iter(loader))
    assert first.input.shape == (21, 3, 16, 16)
    assert torch.equal(first.input, again.input)
    loader.sampler.set_epoch(1)
    other = next(iter(loader))
    order = torch.argsort(first.index), torch.argsort(other.index)
    assert not torch.isclose(first.input[order[0]], other.input[order[1]]).flatten(1).all(1).any()


def test_existing_splits_are_used(write_tree):
    root = write_tree({"train": {"a": 6, "b": 6}, "val": {"a": 2, "b": 2}, "test": {"a": 3, "b": 3}})
    datamodule = folder(root)
    datamodule.setup("fit")
    datamodule.setup("test")
    assert {s: len(d) for s, d in datamodule.datasets.items()} == {"train": 12, "val": 4, "test": 6}


def test_val_is_the_test_set_if_test_is_missing(write_tree):
    datamodule = folder(write_tree({"train": {"a": 6, "b": 6}, "val": {"a": 2, "b": 3}}), val_size=4)
    datamodule.setup("fit")
    datamodule.setup("test")
    assert {s: len(d) for s, d in datamodule.datasets.items()} == {"train": 8, "val": 4, "test": 5}
    assert datamodule.datasets["test"].source.original.folder.name == "val"


def test_class_folders_without_splits_are_split_by_class(tmp_path, write_tree, monkeypatch, capfd):
    write_tree({"": {"dog": 40, "cat": 20, ".hidden": 1}}, root=tmp_path / "pets")

    def names(**settings):
        datamodule = folder(str(tmp_path / "pets"), unreadable="skip", **settings)
        datamodule.setup("fit")
        datamodule.setup("test")
        assert datamodule.class_names == ("cat", "dog")
        data = datamodule.datasets.items()
        sources = {part: (images, getattr(images.source, "original", images.source)) for part, images in data}
        return {part: [str(source.path(i)) for i in images.index] for part, (images, source) in sources.items()}

    split = names()
    assert {part: len(files) for part, files in split.items()} == {"train": 43, "val": 5, "test": 12}
    assert capfd.readouterr().err.count("60 images in 2 classes, stratified split with split_seed 0: ") == 1
    together = [file for files in split.values() for file in files]
    assert len(set(together)) == len(together) == 60
    assert sum("dog" in name for name in split["test"]) == 8
    assert sum("dog" in name for name in split["val"]) in (3, 4)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **rest: ((a, b[::-1], c[::-1]) for a, b, c in walk(*args, **rest)))
    assert names() == split  # the order in which the file system lists files has no effect
    assert names(seed=1) == split
    assert names(split_seed=1)["test"] != split["test"]
    capfd.readouterr()
    assert [len(files) for files in names(test_size=6, val_size=0).values()] == [54, 6]
    assert "54 training, 0 validation, 6 test" in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"pets has no test images because test_size is 0"):
        folder(str(tmp_path / "pets"), test_size=0).setup("test")
    with pytest.raises(ValueError, match="test_size 1 leaves no test image of class"):
        folder(str(tmp_path / "pets"), test_size=1).setup("fit")


@pytest.mark.parametrize("name", ["Training", "test", "valid"])
def test_split_folders_are_not_classes(name, tmp_path, write_tree):
    write_tree({name: {"dog": 4, "cat": 4}, "others": {"dog": 4, "cat": 4}})
    with pytest.raises(FileNotFoundError, match=r"folder .*train not found; expected"):
        folder(str(tmp_path)).setup("fit")


def test_gray_images(write_tree):
    datamodule = folder(write_tree(PETS), in_channels=1)
    datamodule.setup("fit")
    assert next(iter(datamodule.val_dataloader())).input.shape == (2, 1, 16, 16)
    assert len(datamodule.mean) == len(datamodule.std) == 1


def test_nested_folders_unusual_names_and_other_files(tmp_path, write_tree):
    root = Path(write_tree({"train": {"ä class": 2, "b": 1}}))
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "b" / "notes.txt").write_text("no image")
    (root / "train" / "b" / "deeper").mkdir()
    Image.new("RGB", (8, 8)).save(root / "train" / "b" / "deeper" / "ünï 1.PNG")
    files = read_tree(root / "train", ("b", "ä class"))
    assert files.targets.tolist() == [0, 0, 1, 1]
    assert [files[i][0].size for i in range(4)][1] == (8, 8)
    assert files.path(1).name == "ünï 1.PNG"


@pytest.mark.parametrize(
    ("damage", "workers"),  # PyTorch waits 5 s for a worker that raised an error, so only one case uses workers
    [("noise", 0), ("noise", 1), ("short", 0), ("empty", 0), ("gone", 0)],
)
def test_corrupt_image(write_tree, damage, workers):
    root = write_tree(PETS)
    path = Path(root, "test", "dog", "0002.jpg")
    content = path.read_bytes()
    path.write_bytes({"noise": b"\x00" * 50, "short": content[: len(content) // 2], "empty": b"", "gone": b""}[damage])
    datamodule = folder(root, num_workers=workers, resident_limit=0)
    datamodule.setup("test")
    if damage == "gone":
        path.unlink()
    with pytest.raises(ValueError, match="cannot be read") as caught:
        list(datamodule.test_dataloader())
    message = str(caught.value)
    assert message.startswith(f"image {path} cannot be read (")
    assert message.endswith("; replace or remove it")
    assert "\n" not in message


def test_missing_and_empty_folders(tmp_path, write_tree):
    def fails(message, error=FileNotFoundError, stage="fit", root=tmp_path):
        with pytest.raises(error, match=message):
            folder(str(root)).setup(stage)

    fails(r"folder \S+train not found; expected a folder with one folder of images per class")
    fails(r"folder \S+nowhere not found; set root to the folder of the images", root=tmp_path / "nowhere")
    (tmp_path / "train").mkdir()
    fails(r"\S+train has no class folders; expected \S+train/<class>/<image files>")
    write_tree({"train": {"a": 6, "b": 6}}, root=tmp_path / "pets")
    fails(r"folder \S+test not found; expected", stage="test", root=tmp_path / "pets")
    (tmp_path / "pets" / "train" / "c").mkdir()
    fails(
        r"no images in these class folders of \S+train: c; expected files with the extensions .jpg",
        root=tmp_path / "pets",
    )


def test_test_classes_must_equal_training_classes(write_tree):
    root = write_tree({"train": {"a": 6, "b": 6}, "test": {"a": 2, "c": 2}})
    with pytest.raises(ValueError, match=r"test must have the same class folders .* missing: b; unknown: c"):
        folder(root).setup("test")


def test_archives_also_read_image_folders(write_tree):
    names = CIFAR10DataModule.class_names
    root = write_tree({"train": dict.fromkeys(names, 3), "test": dict.fromkeys(names, 1)}, size=(32, 32))
    datamodule = CIFAR10DataModule(root, download=False, val_size=10, num_workers=0)
    datamodule.prepare_data()
    datamodule.setup("fit")
    datamodule.setup("test")
    assert datamodule.class_names == names
    batch = next(iter(datamodule.test_dataloader()))
    assert batch.target.tolist() == list(range(10))
    stored = np.array(Image.open(Path(root, "test", "frog", "0000.jpg"))).transpose(2, 0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (datamodule.mean, datamodule.std))
    assert torch.allclose(batch.input[6], (torch.as_tensor(stored) / 255 - mean) / std, atol=1e-6)
    assert len(datamodule.datasets["train"]) == 20


@pytest.mark.parametrize("prefix", ["", "class "])
def test_numeric_class_folders_are_ordered_by_number(write_tree, prefix):
    names = [f"{prefix}{i + 5}" for i in range(10)]  # 5 to 14
    root = write_tree({"train": dict.fromkeys(names, 2), "test": dict.fromkeys(names, 1)}, size=(28, 28))
    datamodule = MNISTDataModule(root, num_workers=0)
    datamodule.setup("test")
    assert datamodule.class_names == tuple(sorted(names) if prefix else names)


def test_unknown_class_folder(write_tree):
    names = ["plane" if name == "airplane" else name for name in CIFAR10DataModule.class_names]
    datamodule = CIFAR10DataModule(write_tree({"train": dict.fromkeys(names, 2)}))
    with pytest.raises(
        ValueError, match=r"class folders that are not classes of CIFAR-10: plane; rename them to airplane, or"
    ):
        datamodule.setup("fit")


def test_archives_check_the_number_of_class_folders(write_tree):
    with pytest.raises(ValueError, match=r"train has 2 class folders, but CIFAR-10 has 10 classes; use Image"):
        CIFAR10DataModule(write_tree(PETS)).setup("fit")


def test_imagenet_checks_the_number_of_class_folders(write_tree):
    datamodule = ImageNetDataModule(write_tree(PETS))
    assert (datamodule.num_classes, datamodule.input_shape) == (1000, (3, 224, 224))
    with pytest.raises(
        ValueError, match=r"train has 2 class folders, but ImageNet has 1000; use ImageFolderDataModule"
    ):
        datamodule.setup("fit")


@pytest.mark.parametrize("inside", ["", "tiny-imagenet-200"])
def test_tiny_imagenet_in_the_published_layout(tmp_path, inside):
    root = tmp_path / inside
    names = [f"n{i:08}" for i in range(200)]
    image = Image.new("RGB", (64, 64), (200, 100, 50))
    for name in names:
        images = root / "train" / name / "images"
        images.mkdir(parents=True)
        for i in range(2):
            image.save(images / f"{name}_{i}.JPEG")
        (root / "train" / name / f"{name}_boxes.txt").write_text("")
    for folder in ("val/images", "test/images"):
        (root / folder).mkdir(parents=True)
    rows = [("val_0.JPEG", names[7]), ("val_1.JPEG", names[199]), ("val_10.JPEG", names[0])]
    (root / "val" / "val_annotations.txt").write_text("".join(f"{f}\t{n}\t0\t0\t62\t62\n" for f, n in rows))
    for name, _ in rows:
        image.save(root / "val" / "images" / name)
    datamodule = TinyImageNetDataModule(str(tmp_path), val_size=200, num_workers=0)
    datamodule.prepare_data()
    datamodule.setup("fit")
    datamodule.setup("test")
    assert {s: len(d) for s, d in datamodule.datasets.items()} == {"train": 200, "val": 200, "test": 3}
    assert isinstance(datamodule.datasets["test"].source.original, ImageFiles)
    assert next(iter(datamodule.test_dataloader())).target.tolist() == [7, 199, 0]
    assert datamodule.class_names == tuple(names)


@pytest.mark.parametrize("augment", [None, []])
@pytest.mark.parametrize("channels", [1, 3])
def test_large_jpegs_are_decoded_no_larger_than_needed(tmp_path, augment, channels):
    y, x = np.mgrid[0:300, 0:400]
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(6):
            wave = np.stack([np.sin(x / 40 + i), np.cos(y / 30 + i), np.sin((x + y) / 50)], 2)
            Image.fromarray((127 + 100 * wave).astype(np.uint8)).save(tmp_path / "train" / name / f"{i}.jpg")
            Image.open(tmp_path / "train" / name / f"{i}.jpg").save(tmp_path / "train" / name / f"{i}.png")
    settings = {"augment": augment, "in_channels": channels, "val_size": 0, "resident_limit": 0}
    images = {}
    for batch_size, workers in ((24, 0), (1, 0), (5, 2)):
        datamodule = folder(str(tmp_path), batch_size=batch_size, num_workers=workers, **settings)
        datamodule.setup("fit")
        for batch in datamodule.train_dataloader():
            for image, index in zip(batch.input, batch.index.tolist(), strict=True):
                assert torch.equal(image, images.setdefault(index, image))
    dataset = datamodule.datasets["train"]
    draws = torch.full((10, 4), 0.9)
    (jpeg, full), (png, _) = (dataset._decode(i, draws) for i in (0, 1))
    assert (jpeg.size, png.size, full) == ((50, 38), (400, 300), (300, 400))
    difference = dataset.read(0, draws).float() - dataset.read(1, draws).float()
    assert 0 < difference.abs().mean() < 1.5
