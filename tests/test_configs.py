"""All files in configs/ train on small data of the same form: complete configs as they are, overlays combined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image

from lkd import models
from lkd.__main__ import main
from lkd.cli.config_files import configs_folder

FOLDER = configs_folder()
COMPLETE = sorted(
    str(path.relative_to(FOLDER))
    for folder in ("camvid", "cifar10", "detection", "digits", "shapes")
    for path in FOLDER.glob(f"{folder}/*.yaml")
)
ON_DEVICE = [name for name in COMPLETE if not name.startswith(("camvid", "detection")) or "cirkd" in name]
"""Complete configs that train on the simulated device; the steps of detectors cannot be captured as graphs."""
OVERLAYS = {
    kind: sorted(path.stem for path in (FOLDER / kind).glob("*.yaml"))
    for kind in ("data", "finetune", "pairs", "methods", "teachers", "trainer")
}
VIEWS = [name for name in OVERLAYS["methods"] if "views:" in (FOLDER / "methods" / f"{name}.yaml").read_text()]
BEFORE = {  # runs whose results a config requires
    "digits/takd.yaml": ["digits/assistant"],
    "digits/multi_teacher.yaml": ["digits/assistant"],
    "digits/born_again_ensemble.yaml": ["digits/born_again", "digits/born_again"],
}
TEACHERS = {
    "camvid": lambda: models.UNet((20, 40, 64, 96, 128), 11),
    "cifar10": lambda: models.resnet56(num_classes=10, shortcut="A"),
    "detection": lambda: models.fcos(5, (16, 32, 64), 64, num_convs=2, reg_max=8),
}
CLASSES = {"imagenet": 1000, "tiny_imagenet": 200, "cifar100": 100}
PAIR_OF = {"digits": "digits", "mnist": "resnet20_resnet8_gray10", "fashion_mnist": "resnet20_resnet8_gray10"}
PAIR_OF |= {"cifar100": "resnet56_resnet20_100", "imagenet": "resnet34_resnet18_imagenet"}
PAIR_OF |= {"webdataset": "resnet34_resnet18_imagenet"}
PAIR_OF_METHOD = {"deit": "resnet56_deit_tiny_100", "vitkd": "deit_small_deit_tiny_100"}
SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


def _image_folder(classes: int, size: int = 32, splits: tuple[str, ...] = ("train", "test")) -> str:
    """Create a folder of images for training and validation."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
    for split in splits:
        for number in range(classes):
            folder = Path("tree", split, f"{number:04}")
            folder.mkdir(parents=True)
            for copy in range(2 if split == "train" else 1):
                image.save(folder / f"{copy}.png")
    return "tree"


def _one_shard() -> dict[str, object]:
    """Create one small shard for training and validation, and return the settings of the data module."""
    from webdataset import ShardWriter

    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    with ShardWriter("%d.tar", verbose=0) as writer:
        for number in range(8):
            writer.write({"__key__": str(number), "png": Image.fromarray(pixels[number]), "cls": number})
    return {"train": "0.tar", "val": "0.tar", "train_size": 8, "batch_size": 4, "num_workers": 0, "image_size": 32}


@pytest.fixture(autouse=True)
def _no_downloads(monkeypatch) -> None:
    """Replace torchvision's pretrained weights, which would be downloaded, with random ones."""
    get_model = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights=None, **rest: get_model(name, **rest))
    monkeypatch.setattr("lkd.models.factories.unreachable", lambda url: "")


def _mask_folder() -> str:
    """Create a folder of images with masks for training and validation; the label 11 is ignored."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for number in range(16 if split == "train" else 2):
            for kind, shape, high in (("images", (36, 50, 3), 256), ("masks", (36, 50), 12)):
                Path("masks", split, kind).mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, high, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(f"masks/{split}/{kind}/{number}.png")
    return "masks"


def needs(config: str) -> list[str]:
    """Create the images and the teacher that a complete config requires, and return the settings."""
    settings = ["--data.init_args.batch_size=8"]
    if config.startswith("detection"):
        settings += ["--data.init_args.train_size=40"]
    if "data_free" in config:
        settings += [f"--data.init_args.extra.init_args.{name}" for name in ("number=20", "steps=2")]
    if config.startswith("cifar10"):
        settings += [f"--data.init_args.root={_image_folder(10)}", "--data.init_args.val_size=10"]
    if config.startswith("camvid"):
        settings += [f"--data.init_args.root={_mask_folder()}", "--data.init_args.image_size=[32,48]"]
    if not config.startswith(("digits", "shapes")) and "teacher_ckpt: runs" in (FOLDER / config).read_text():
        teacher = TEACHERS[config.partition("/")[0]]()
        torch.save(teacher.state_dict(), "teacher.pth")
        settings += ["--model.init_args.teacher_ckpt=teacher.pth"]
        if "data_free" in config:
            settings += ["--data.init_args.extra.init_args.network.init_args.path=teacher.pth"]
    return settings


@pytest.mark.parametrize("config", [config for config in COMPLETE if config not in ON_DEVICE])
def test_complete_configs(config: str) -> None:
    """tests/pretended/test_commands.py trains the other configs."""
    assert main(["fit", "--config", config, *needs(config), *SHORT]) == 0
    assert list(Path("runs", config.removesuffix(".yaml")).rglob("best.ckpt"))


def _data_settings(data: str) -> list[str]:
    if data in ("digits", "synthetic"):
        return ["--data.init_args.batch_size=8"]
    if data == "webdataset":
        return [f"--data.init_args.{name}={value}" for name, value in _one_shard().items()]
    classes = CLASSES.get(data, 10)
    root = _image_folder(classes, splits=("train", "val") if data == "imagenet" else ("train", "test"))
    small = [
        "--data.init_args.batch_size=4",
        f"--data.init_args.val_size={classes}",
        "--data.init_args.num_workers=0",
    ]
    if data in ("folder", "imagenet"):
        small.append("--data.init_args.image_size=32")  # 224x224 pixels would take 10 s
    return [f"--data.init_args.root={root}", *small]


@pytest.mark.parametrize("data", OVERLAYS["data"])
def test_data_overlays(data: str) -> None:
    pair = PAIR_OF.get(data, "resnet56_resnet20_10")
    settings = _data_settings(data)
    if data == "tiny_imagenet":
        settings += [f"--model.init_args.{network}.init_args.num_classes=200" for network in ("student", "teacher")]
    configs = ["--config", f"data/{data}", "--config", f"pairs/{pair}", "--config", "methods/kd"]
    assert main(["fit", *configs, *settings, *SHORT]) == 0


@pytest.mark.parametrize("pair", [pair for pair in OVERLAYS["pairs"] if pair not in PAIR_OF.values()])
def test_pair_overlays(pair: str) -> None:
    configs = ["--config", "data/synthetic", "--config", f"pairs/{pair}", "--config", "methods/kd"]
    assert main(["fit", *configs, *_synthetic_settings(pair), *SHORT]) == 0


@pytest.mark.parametrize("name", OVERLAYS["teachers"])
def test_teacher_overlays(name: str) -> None:
    configs = ["--config", "data/synthetic", "--config", f"teachers/{name}"]
    assert main(["fit", *configs, *_synthetic_settings(name), *SHORT]) == 0


def _synthetic_settings(pair: str) -> list[str]:
    classes = int(pair.rpartition("_")[2])
    return [f"--data.init_args.num_classes={classes}", "--data.init_args.batch_size=4"]


@pytest.mark.parametrize("name", OVERLAYS["finetune"])
def test_finetune_overlays(name: str) -> None:
    settings = [f"--data.init_args.{setting}" for setting in ("num_classes=3", "batch_size=4", "train_size=40")]
    settings += ["--model.init_args.model.init_args.num_classes=3"]
    if name == "deit_small":
        settings += ["--data.init_args.input_shape=[3,32,32]"]  # 224x224 pixels would take 30 s
        settings += [f"--model.init_args.model.init_args.{setting}" for setting in ("pretrained=false", "img_size=32")]
    assert main(["fit", "--config", "data/synthetic", "--config", f"finetune/{name}", *settings, *SHORT]) == 0


def test_trainer_overlays_keep_their_settings() -> None:
    """tests/pretended/test_methods.py checks overlays of methods, on the CPU and on the simulated device."""
    for name in OVERLAYS["trainer"]:
        configs = ["--config", "data/digits", "--config", "pairs/digits", "--config", f"trainer/{name}"]
        assert main(["fit", *configs, *SHORT]) == 0
        (saved,) = Path("runs", f"digits+{name}").rglob("config.yaml")
        resolved, given = (
            yaml.safe_load(saved.read_text()),
            yaml.safe_load((FOLDER / "trainer" / f"{name}.yaml").read_text()),
        )
        for key, value in given.get("model", {}).get("init_args", {}).items():
            assert _contains(resolved["model"]["init_args"][key], value), key


@pytest.mark.parametrize(
    ("data", "name"), [(data, VIEWS[number % len(VIEWS)]) for number, data in enumerate(OVERLAYS["data"])]
)
def test_views_of_methods_combine_with_all_data(data: str, name: str, capsys) -> None:
    assert set(VIEWS) >= {"cskd", "mlkd", "noisy_student", "sskd"}
    assert len(VIEWS) <= len(OVERLAYS["data"])
    pair, images = PAIR_OF.get(data, "resnet56_resnet20_10"), f"data/{data}"
    configs = ["--config", images, "--config", f"pairs/{pair}", "--config", f"methods/{name}"]
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *configs, "--print_config"])
    resolved = yaml.safe_load(capsys.readouterr().out)["data"]
    for part in (images, f"methods/{name}"):
        assert _contains(resolved, yaml.safe_load((FOLDER / f"{part}.yaml").read_text())["data"])


def test_method_without_a_teacher() -> None:
    configs = ["--config", "data/digits", "--config", "pairs/digits", "--config", "methods/cskd"]
    without = ["--model.init_args.teacher=null", "--model.init_args.teacher_ckpt=null"]
    assert main(["fit", *configs, *without, *SHORT]) == 0
    assert list(Path("runs").rglob("best.ckpt"))


def _contains(resolved: object, given: object) -> bool:
    if isinstance(given, dict):
        return isinstance(resolved, dict) and all(_contains(resolved[key], value) for key, value in given.items())
    return resolved == given


def test_all_overlays_are_tested() -> None:
    assert set(OVERLAYS["pairs"]) >= set(PAIR_OF.values())
    folders = {path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml")}
    elsewhere = {"cluster", "loggers", "sweep"}  # tests/test_cluster.py, tests/test_loggers.py, tests/sweep
    assert folders == {"camvid", "cifar10", "detection", "digits", "shapes", *OVERLAYS, *elsewhere}
