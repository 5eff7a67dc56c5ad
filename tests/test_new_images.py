"""`lkd predict --images`: new images are preprocessed like those of the run, and unreadable images are reported."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lkd
from lkd.__main__ import main

CPU = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
BEST = "runs/run/version_0/checkpoints/best.ckpt"


def _rows(number: int) -> dict[str, dict[str, str]]:
    text = Path(f"runs/predict/version_{number}/predictions.csv").read_text(encoding="utf-8")
    return {row["file"]: row for row in csv.DictReader(text.splitlines())}


@pytest.fixture
def trained() -> Path:
    """Train briefly on a folder of two classes, and return the path of the best checkpoint."""
    rng = np.random.default_rng(0)
    for name, level in (("hat", 60), ("shoe", 190)):
        Path("shop", name).mkdir(parents=True)
        for number in range(12):
            size = tuple(rng.integers(20, 40, 2))
            pixels = np.clip(rng.normal(level, 40, (*size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(Path("shop", name, f"{number}.png"))
    model = ["--model=lkd.ClassificationModule", "--model.init_args.model=lkd.models.resnet8"]
    data = ["--data=lkd.ImageFolderDataModule", "--data.init_args.root=shop", "--data.init_args.image_size=16"]
    settings = ["--model.init_args.model.init_args.num_classes=2", "--data.init_args.batch_size=6"]
    assert main(["fit", *model, *data, *settings, "--trainer.max_epochs=1", *CPU]) == 0
    return Path(BEST)


def test_predictions_for_a_folder(trained, capsys, recwarn) -> None:
    assert main(["predict", "--ckpt_path", str(trained), *CPU]) == 0
    expected = _rows(0)
    own = lkd.ImageFolderDataModule("shop", 16)
    own.setup("test")
    source = own.datasets["test"].source.original
    assert list(expected) == [source.path(index).relative_to("shop").as_posix() for index in range(len(source))]
    shutil.move("shop", "new")  # the data of the run does not exist any more; the class names are in the checkpoint
    gray = np.asarray(Image.open("new/hat/0.png").convert("L"))
    Image.fromarray(gray).save("new/grau ü.tiff")
    Image.open("new/hat/1.png").convert("RGBA").save("new/transparent.webp")
    Path("new/broken.jpg").write_bytes(b"no image")
    Path("new/notes.txt").write_text("no image")
    capsys.readouterr()
    assert main(["predict", "--images", "new", f"--ckpt_path={trained}", *CPU]) == 0
    assert f"26 images written to {Path('runs/predict/version_1/predictions.csv')}" in capsys.readouterr().out
    rows = _rows(1)
    assert set(next(iter(rows.values()))) == {"file", "class", "class_name", "probability"}
    assert list(rows) == sorted(rows, key=lambda name: ("/" in name, name))
    assert len(rows) == 27
    assert rows["broken.jpg"] == {"file": "broken.jpg", "class": "", "class_name": "", "probability": ""}
    warned = [str(warning.message) for warning in recwarn]
    assert any("1 of 27 images in new cannot be read" in message for message in warned)
    assert not any("of another size" in message for message in warned)  # the training images were resized as well
    for name, row in expected.items():
        assert rows[name]["class"] == row["class"]
        assert rows[name]["class_name"] == row["class_name"] == ("hat", "shoe")[int(row["class"])]
        assert float(rows[name]["probability"]) == pytest.approx(float(row["probability"]), abs=2e-6)
    network = torch.load(trained, weights_only=True)
    assert network["lkd"]["class_names"] == ["hat", "shoe"]


@pytest.mark.parametrize(
    ("folder", "message"),
    [("nowhere", "folder nowhere not found; expected a folder that contains images"), ("empty", "no images in empty")],
)
def test_folders_without_images(folder, message, capsys) -> None:
    Path("empty").mkdir()
    weights = ["--config=digits/teacher", "--model.init_args.model_ckpt=lkd:digits_resnet8"]
    assert main(["predict", "--images", folder, *weights, *CPU]) == 2
    assert message in capsys.readouterr().err


def test_images_require_a_checkpoint_and_a_supported_data_module(capsys) -> None:
    Path("new").mkdir()
    Image.new("RGB", (8, 8)).save("new/a.png")
    assert main(["predict", "--images", "new", "--config=digits/teacher", *CPU]) == 2
    assert "lkd predict requires a checkpoint" in capsys.readouterr().err
    with pytest.raises(TypeError, match="the preprocessing of LightningDataModule is unknown"):
        lkd.datamodules.NewImages("new", lkd.datamodules.base.L.LightningDataModule())


def test_images_of_another_size(capsys, recwarn) -> None:
    Path("new").mkdir()
    for name, size in (("a.png", (8, 8)), ("b.png", (30, 20)), ("c.png", (8, 9))):
        Image.new("L", size).save(Path("new", name))
    weights = ["--config=digits/teacher", "--model.init_args.model_ckpt=lkd:digits_resnet8"]
    assert main(["predict", "--images=new", "--output=out", *weights, *CPU]) == 0
    assert [str(warning.message) for warning in recwarn if "of another size" in str(warning.message)] == [
        "the network was trained on images of 8x8 pixels; images of another size in new: 2 of 3, for example b.png "
        "(30x20); they are scaled to this size and cropped, which may reduce the accuracy"
    ]
    assert len(Path("out/version_0/predictions.csv").read_text().splitlines()) == 1 + 3
