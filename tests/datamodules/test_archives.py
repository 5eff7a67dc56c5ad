"""Archives in the formats that torchvision reads, created here with a few images."""

import pickle
import re
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision

from lkd.datamodules import (
    ADE20KDataModule,
    CIFAR10DataModule,
    CIFAR100DataModule,
    FashionMNISTDataModule,
    MNISTDataModule,
    STL10DataModule,
    SVHNDataModule,
    TinyImageNetDataModule,
    VOCSegmentationDataModule,
)

SIZES = {"train": 300, "test": 40}


def pixels(shape, size, seed):
    return np.random.default_rng(seed).integers(256, size=(size, *shape), dtype=np.uint8)


def write_cifar(root, split, images, labels, folder, key, names):
    path = Path(root, folder)
    path.mkdir(exist_ok=True)
    parts = np.array_split(np.arange(len(images)), len(names[split]))
    for name, part in zip(names[split], parts, strict=True):
        content = {"data": images[part].reshape(len(part), -1), key: [labels[i] for i in part]}
        Path(path, name).write_bytes(pickle.dumps(content))


def write_cifar10(root, split, images, labels):
    names = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    write_cifar(root, split, images, labels, "cifar-10-batches-py", "labels", names)
    meta = {"label_names": list(CIFAR10DataModule.class_names)}
    Path(root, "cifar-10-batches-py", "batches.meta").write_bytes(pickle.dumps(meta))


def write_cifar100(root, split, images, labels):
    names = {"train": ["train"], "test": ["test"]}
    write_cifar(root, split, images, labels, "cifar-100-python", "fine_labels", names)
    meta = {"fine_label_names": list(CIFAR100DataModule.class_names)}
    Path(root, "cifar-100-python", "meta").write_bytes(pickle.dumps(meta))


def write_mnist(root, split, images, labels, name="MNIST"):
    folder = Path(root, name, "raw")
    folder.mkdir(parents=True, exist_ok=True)
    prefix = {"train": "train", "test": "t10k"}[split]
    header = np.array([2051, len(images), 28, 28], dtype=">i4").tobytes()
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    header = np.array([2049, len(images)], dtype=">i4").tobytes()
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + bytes(labels))


def write_fashion(root, split, images, labels):
    write_mnist(root, split, images, labels, "FashionMNIST")


def write_svhn(root, split, images, labels):
    content = {"X": images.transpose(2, 3, 1, 0), "y": np.array([label or 10 for label in labels])[:, None]}
    scipy.io.savemat(Path(root, f"{split}_32x32.mat"), content)


def write_stl10(root, split, images, labels):
    folder = Path(root, "stl10_binary")
    folder.mkdir(exist_ok=True)
    (folder / f"{split}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())  # column by column
    (folder / f"{split}_y.bin").write_bytes(bytes(label + 1 for label in labels))
    (folder / "unlabeled_X.bin").touch()
    (folder / "class_names.txt").write_text("\n".join(STL10DataModule.class_names))


CASES = [
    (CIFAR10DataModule, write_cifar10),
    (CIFAR100DataModule, write_cifar100),
    (MNISTDataModule, write_mnist),
    (FashionMNISTDataModule, write_fashion),
    (SVHNDataModule, write_svhn),
    (STL10DataModule, write_stl10),
]


@pytest.mark.parametrize(("cls", "write"), CASES)
def test_archives_are_loaded(cls, write, tmp_path, monkeypatch):
    for module in ("cifar", "svhn", "stl10"):  # the checksums are those of the original files
        monkeypatch.setattr(
            getattr(torchvision.datasets, module), "check_integrity", lambda path, *_: Path(path).is_file()
        )
    written = {}
    for seed, (split, size) in enumerate(SIZES.items()):
        images, labels = pixels(cls.input_shape, size, seed), [i % cls.num_classes for i in range(size)]
        write(tmp_path, split, images, labels)
        written[split] = images, labels
    datamodule = cls(str(tmp_path), download=False, augment=[], val_size=cls.num_classes, batch_size=1000)
    datamodule.prepare_data()
    datamodule.setup("fit")
    datamodule.setup("test")
    assert len(datamodule.datasets["train"]) == 300 - cls.num_classes
    for split, (images, labels) in written.items():
        dataset = datamodule.datasets[split]
        assert torch.equal(dataset.stored, torch.as_tensor(images))
        assert dataset.target.tolist() == labels
    batch = next(iter(datamodule.test_dataloader()))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (cls.mean, cls.std))
    assert torch.allclose(batch.input, (torch.as_tensor(written["test"][0]) / 255 - mean) / std, atol=1e-5)
    assert len(datamodule.class_names) == cls.num_classes


@pytest.mark.parametrize(("cls", "write"), CASES)
def test_default_augmentation(cls, write):
    crop, *flip = cls().default_augment()
    padding = {"CIFAR-10": 4, "CIFAR-100": 4, "MNIST": 2, "Fashion-MNIST": 2, "SVHN": 4, "STL-10": 12}
    assert crop.padding == padding[cls.title]
    assert bool(flip) == (cls.title not in ("MNIST", "SVHN"))  # digits are not symmetric


ARCHIVES = {
    CIFAR10DataModule: ("CIFAR-10", "put cifar-10-python.tar.gz (https://", "into {}/,"),
    CIFAR100DataModule: ("CIFAR-100", "put cifar-100-python.tar.gz (https://", "into {}/,"),
    MNISTDataModule: ("MNIST", "{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte.gz", "into {}/MNIST/raw/,"),
    FashionMNISTDataModule: ("Fashion-MNIST", "-ubyte.gz (https://", "into {}/FashionMNIST/raw/,"),
    SVHNDataModule: ("SVHN", "train_32x32.mat and test_32x32.mat", "into {}/,"),
    STL10DataModule: ("STL-10", "put stl10_binary.tar.gz (https://", "into {}/,"),
    TinyImageNetDataModule: (
        "Tiny-ImageNet",
        "tiny-imagenet-200.zip (http://",
        "into {}/ and unpack it there,",
    ),
    VOCSegmentationDataModule: (
        "Pascal VOC 2012",
        "put VOCtrainval_11-May-2012.tar (https://",
        "into {}/ and unpack it there,",
    ),
    ADE20KDataModule: ("ADE20K", "put ADEChallengeData2016.zip (http://", "into {}/ and unpack it there,"),
}


@pytest.mark.parametrize("cls", ARCHIVES)
def test_offline_error_names_files_and_folders(cls, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    root = str(tmp_path / "data")
    with pytest.raises(FileNotFoundError) as caught:
        cls(root).prepare_data()
    message = str(caught.value)
    title, archive, folder = ARCHIVES[cls]
    assert message.startswith(f"{title} was not found in {root} (")
    assert "name resolution" in message
    assert archive.replace("{{", "{").replace("}}", "}") in message
    assert folder.format(root) in message
    assert re.search(r"configs/(digits|shapes)/kd.yaml needs no download$", message)
    assert "\n" not in message


@pytest.mark.parametrize("cls", ARCHIVES)
def test_error_without_download_is_the_same(cls, tmp_path):
    datamodule = cls(str(tmp_path), download=False)
    datamodule.prepare_data()
    for stage in ("fit", "test"):
        with pytest.raises(
            FileNotFoundError, match=rf"{cls.title} was not found in \S+ \(download is disabled\); put .* into "
        ):
            datamodule.setup(stage)
