"""`PredictionWriter`: masks and proportions of segmentation, boxes of detection, and a new folder each time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lkd import (
    ClassificationModule,
    CocoDetectionDataModule,
    SegmentationFolderDataModule,
    SyntheticSegmentationDataModule,
)
from lkd.callbacks import PredictionWriter
from lkd.datamodules import ImageError, PredictedImages, new_images
from lkd.tasks import Detection, SemanticSegmentation
from lkd.tasks.visualization import class_color
from lkd.types import Batch, Predictions

LEVELS = (40, 120, 200)
"""Brightness of the pixels of each class."""
NAMES = ("dark", "gray", "bright")
PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


class Brightness(nn.Module):
    """A network that classifies each pixel by the nearest of `LEVELS`; its logits are `-(x - level)^2` without x^2."""

    def forward(self, image: Tensor) -> Tensor:
        levels = torch.tensor(LEVELS, device=image.device).view(-1, 1, 1) / 255
        return 100 * (2 * levels * image[:, :1] - levels.square())


def _module(network: nn.Module | None = None, **settings: Any) -> ClassificationModule:
    return ClassificationModule(network or Brightness(), task=SemanticSegmentation(len(LEVELS), **settings))


def _photo(path: Path, height: int, width: int, seed: int) -> np.ndarray:
    """Write an image of blocks of 4x4 pixels, and return the class of each pixel."""
    blocks = np.random.default_rng(seed).integers(0, 3, (height // 4 + 1, width // 4 + 1), dtype=np.uint8)
    mask = blocks.repeat(4, 0).repeat(4, 1)[:height, :width]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([np.array(LEVELS, np.uint8)[mask]] * 3, 2)).save(path, quality=98)
    return mask


def _photos(root: Path) -> dict[str, np.ndarray]:
    """Write images of different sizes, and return their masks by file name."""
    sizes = {"a.png": (20, 31), "b/a.png": (26, 18), "b/c.png": (9, 12), "d.bmp": (32, 32)}
    return {name: _photo(root / name, *size, seed) for seed, (name, size) in enumerate(sizes.items())}


def _data(root: Path, **settings: Any) -> SegmentationFolderDataModule:
    settings = {"num_classes": 3, "class_names": NAMES, "batch_size": 3, "num_workers": 0, **PLAIN, **settings}
    return SegmentationFolderDataModule(str(root), **settings)


def _rows(folder: str | Path) -> list[dict[str, str]]:
    return list(csv.DictReader((Path(folder) / "predictions.csv").read_text(encoding="utf-8").splitlines()))


def _predict(trainer: Any, module: Any, data: Any) -> Path:
    writer = PredictionWriter()
    trainer(callbacks=[writer]).predict(module, data, return_predictions=False)
    return writer.folder


def test_masks_have_the_size_of_the_files_and_the_colors_of_the_classes(tmp_path, trainer) -> None:
    masks = _photos(tmp_path / "new")
    folder = _predict(trainer, _module(), new_images("new", _data(tmp_path)))
    rows = _rows(folder)
    shares = [f"proportion/{name}" for name in NAMES]
    assert list(rows[0]) == ["file", "mask", "probability", *shares]
    assert [row["file"] for row in rows] == ["a.png", "d.bmp", "b/a.png", "b/c.png"]
    assert [row["mask"] for row in rows] == ["masks/a.png", "masks/d.png", "masks/b/a.png", "masks/b/c.png"]
    colors = np.array([class_color(number) for number in range(3)])
    for row in rows:
        image, mask = Image.open(folder / row["mask"]), masks[row["file"]]
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), mask)
        assert np.array_equal(np.asarray(image.convert("RGB")), colors[mask])
        counts = np.bincount(mask.flatten(), minlength=3) / mask.size
        assert [float(row[share]) for share in shares] == pytest.approx(counts.tolist(), abs=1e-6)
        logits = torch.tensor([[100 / 255**2 * -((x - y) ** 2) for y in LEVELS] for x in LEVELS]).softmax(1).amax(1)
        assert float(row["probability"]) == pytest.approx(float(logits[mask.astype(int)].mean()), abs=1e-5)


def test_own_test_images_and_scaled_images(tmp_path, trainer) -> None:
    """Images larger than `eval_size` are scaled down for the network; their masks have the size of the files."""
    masks = {"big.png": _photo(tmp_path / "test/images/big.png", 80, 64, 0)}
    masks["small.png"] = _photo(tmp_path / "test/images/small.png", 16, 24, 1)
    for name, mask in masks.items():
        _photo(tmp_path / "train/images" / name, 16, 24, 1)
        for split, own in (("train", masks["small.png"]), ("test", mask)):
            (tmp_path / split / "masks").mkdir(exist_ok=True)
            Image.fromarray(own).save(tmp_path / split / "masks" / name)
    folder = _predict(trainer, _module(), _data(tmp_path, eval_size=(40, 40)))
    big, small = (np.asarray(Image.open(folder / f"masks/images/{name}")) for name in masks)
    assert [row["file"] for row in _rows(folder)] == ["images/big.png", "images/small.png"]
    assert np.array_equal(small, masks["small.png"])
    assert big.shape == (80, 64)
    inner = np.zeros((4, 4), bool)
    inner[1:3, 1:3] = True  # interpolation mixes the classes at the edges of the blocks only
    inner = np.tile(inner, (20, 16))
    assert np.array_equal(big[inner], masks["big.png"][inner])


def test_ignored_class_is_not_predicted(tmp_path, trainer) -> None:
    masks = _photos(tmp_path / "new")
    folder = _predict(trainer, _module(ignore_index=1), new_images("new", _data(tmp_path)))
    for row in _rows(folder):
        found, mask = np.asarray(Image.open(folder / row["mask"])), masks[row["file"]]
        assert float(row["proportion/gray"]) == 0
        assert np.array_equal(found[mask != 1], mask[mask != 1])
        assert set(np.unique(found)) <= {0, 2}


@pytest.mark.parametrize("ignored", [255, 20])
def test_masks_of_many_classes(ignored: int, trainer) -> None:
    """The logits are enlarged for a part of the classes at a time, to limit the memory."""
    torch.manual_seed(0)
    network, images = nn.Conv2d(3, 40, 1), 5 * torch.rand(1, 3, 6, 7)
    loader = DataLoader(TensorDataset(images, torch.zeros(1, 6, 7, dtype=torch.uint8)))
    module = ClassificationModule(network, task=SemanticSegmentation(40, ignore_index=ignored))
    folder = _predict(trainer, module, loader)
    logits = network(images)[0]
    if ignored < 40:
        logits[ignored] = float("-inf")
    probabilities, classes = logits.softmax(0).max(0)
    assert len(classes.unique()) > 3
    assert np.array_equal(np.asarray(Image.open(folder / "masks/000000.png")), classes)
    assert float(_rows(folder)[0]["probability"]) == pytest.approx(float(probabilities.mean()), abs=1e-6)


def test_classes_with_one_name_have_different_columns(trainer) -> None:
    images = torch.full((1, 3, 4, 4), LEVELS[1] / 255)
    module = _module()
    module._kept_facts["class_names"] = ["road", "road", "sky"]
    loader = DataLoader(TensorDataset(images, torch.zeros(1, 4, 4, dtype=torch.uint8)))
    (row,) = _rows(_predict(trainer, module, loader))
    columns = {name: value for name, value in row.items() if name.startswith("proportion/")}
    assert columns == {"proportion/road (0)": "0.0", "proportion/road (1)": "1.0", "proportion/sky": "0.0"}


@pytest.mark.parametrize(
    ("files", "outputs"),
    [
        (["a.jpg", "b/a.jpg", "b/c.d.png"], ["a", "b/a", "b/c.d"]),
        (["a.jpg", "a.png", "b.jpg"], ["a.jpg", "a.png", "b.jpg"]),
        (["a.jpg", "A.png"], ["a.jpg", "A.png"]),
        (["../a.jpg", "b.jpg"], ["a", "b"]),
        (["../a.jpg", "a.jpg"], ["000000", "000001"]),
    ],
)
def test_outputs_for_different_images_have_different_names(files: list[str], outputs: list[str], tmp_path) -> None:
    (tmp_path / "root").mkdir()
    for name in files:
        _photo(tmp_path / "root" / name, 4, 4, 0)
    Path("root/train.txt").write_text("".join(f"{name} {name}\n" for name in files))
    Path("root/test.txt").write_text(Path("root/train.txt").read_text())
    data = _data(tmp_path / "root", resident_limit=0)
    data.setup("predict")
    assert PredictedImages(data).output_names() == outputs


class _Stream(IterableDataset[Batch]):
    """Batches without an index."""

    def __iter__(self):
        return iter([Batch(torch.zeros(2, 3, 4, 6), torch.zeros(2, 4, 6))] * 2)


def test_images_without_files_are_numbered(trainer) -> None:
    images, masks = torch.full((5, 3, 6, 4), LEVELS[2] / 255), torch.zeros(5, 6, 4, dtype=torch.uint8)
    loader = DataLoader(TensorDataset(images, masks), batch_size=2)
    for data, number, shape, share in ((loader, 5, (6, 4), 1.0), (DataLoader(_Stream(), None), 4, (4, 6), 0.0)):
        folder = _predict(trainer, _module(), data)
        rows = _rows(folder)
        assert [row["index"] for row in rows] == [str(index) for index in range(number)]
        assert {np.asarray(Image.open(folder / f"masks/{i:06d}.png")).shape for i in range(number)} == {shape}
        assert {float(row["proportion/2"]) for row in rows} == {share}


def test_each_prediction_has_its_own_folder(tmp_path, trainer, capsys) -> None:
    _photos(tmp_path / "new")
    writer = PredictionWriter("out")
    engine, module = trainer(callbacks=[writer]), _module()
    for number in range(2):
        engine.predict(module, new_images("new", _data(tmp_path)))
        assert writer.folder == Path(f"out/version_{number}")
        assert len(_rows(writer.folder)) == 4
    assert f"Predictions for 4 images written to {Path('out/version_1/predictions.csv')}" in capsys.readouterr().out
    for part in ("images", "masks"):
        (tmp_path / "data/test" / part).mkdir(parents=True)
        (tmp_path / "data/test" / part / "broken.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken.png cannot be read"):
        engine.predict(module, _data(tmp_path / "data", resident_limit=0))
    assert sorted(path.name for path in Path("out").iterdir()) == ["version_0", "version_1"]  # no empty folder


def test_output_that_is_a_file(tmp_path, trainer) -> None:
    (tmp_path / "file").write_text("mine")
    writer = PredictionWriter(str(tmp_path / "file"))
    data = DataLoader(TensorDataset(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64)))
    with pytest.raises(OSError, match=r"cannot create a folder in .*file \(File exists\); use another --output"):
        trainer(callbacks=[writer]).predict(_module(), data)
    assert (tmp_path / "file").read_text() == "mine"


def test_new_images_that_differ_from_the_training_images(tmp_path, trainer, recwarn) -> None:
    """Images in memory have one size; other images are predicted at their own size. Unreadable images are reported."""
    masks = _photos(tmp_path / "new")
    Path("new/broken.png").write_bytes(b"no image")
    module = ClassificationModule(nn.Conv2d(3, 5, 3, padding=1), task=SemanticSegmentation(5))
    folder = _predict(trainer, module, new_images("new", SyntheticSegmentationDataModule(num_workers=0)))
    assert {row["file"]: row["mask"] for row in _rows(folder)}["broken.png"] == ""
    sizes = {name: np.asarray(Image.open(folder / "masks" / Path(name).with_suffix(".png"))).shape for name in masks}
    assert sizes == {name: mask.shape for name, mask in masks.items()}
    messages = [str(warning.message) for warning in recwarn if "trained on images of" in str(warning.message)]
    assert messages == [
        "the network was trained on images of 32x32 pixels; images of another size in new: 3 of 5, for example a.png "
        "(31x20); they are predicted at their own size, which may reduce the accuracy"
    ]


def test_too_many_classes_for_masks(trainer) -> None:
    module = ClassificationModule(nn.Conv2d(3, 300, 1), task=SemanticSegmentation(300))
    with pytest.raises(ValueError, match=r"8 bits per pixel, but the task has 300 classes; call trainer.predict"):
        _predict(trainer, module, DataLoader(_Stream(), None))
    assert not Path("runs").exists()


class Squares(nn.Module):
    """A detector of one bright square on black, whose color channel is its class."""

    def forward(self, images: list[Tensor]) -> Predictions:
        return Predictions(self, 3, tuple(image.shape[1:] for image in images), None, {"images": images})

    def detections(self, predictions: Predictions) -> list[dict[str, Tensor]]:
        return [self._found(image) for image in predictions.values["images"]]

    def _found(self, image: Tensor) -> dict[str, Tensor]:
        channel, rows, columns = (image > 0.5).nonzero().unbind(1)
        if not len(rows):
            return {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
        box = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)).float()
        return {"boxes": box[None], "scores": torch.tensor([0.75]), "labels": channel[:1] + 1}


@pytest.fixture
def squares(tmp_path) -> CocoDetectionDataModule:
    """Return images of squares of two categories, 7 and 3; the detector predicts their annotations exactly."""
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 7, "name": "green"}, {"id": 3, "name": "red"}]
    (tmp_path / "coco").mkdir()
    for number in range(5):
        height, width, channel = 40 + number, 50 - number, number % 2
        x, y, side = 3 * number, 2 * number, 8 + number
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[y : y + side, x : x + side, channel] = 255
        Image.fromarray(pixels).save(f"coco/{number}.png")
        entry = {"id": 90 - number, "file_name": f"{number}.png", "width": width, "height": height}
        box = {"id": number + 1, "image_id": 90 - number, "category_id": (3, 7)[channel], "bbox": [x, y, side, side]}
        content["images"].append(entry)
        content["annotations"].append(box | {"area": side**2, "iscrowd": 0})
    Path("boxes.json").write_text(json.dumps(content))
    pairs = {f"{split}images": "coco" for split in ("", "test_")} | dict.fromkeys(("annotations", "test_annotations"))
    pairs |= {f"{split}annotations": "boxes.json" for split in ("", "test_")}
    return CocoDetectionDataModule(**pairs, batch_size=2, num_workers=0)


def test_detections_are_results_of_coco(squares, trainer) -> None:
    path = _predict(trainer, ClassificationModule(Squares(), task=Detection()), squares) / "detections.json"
    records = json.loads(path.read_text())
    assert records[1] == {
        **{"image_id": 89, "category_id": 7, "bbox": [3.0, 2.0, 9.0, 9.0], "score": 0.75},
        **{"file_name": "1.png", "category_name": "green"},
    }
    truth = COCO("boxes.json")
    evaluation = COCOeval_faster(truth, truth.loadRes(str(path)), "bbox")
    evaluation.run()
    assert evaluation.stats[0] == 1  # average precision


def test_detections_for_new_images(squares, trainer) -> None:
    Path("coco/broken.png").write_bytes(b"no image")
    Image.new("RGB", (30, 20)).save("coco/empty.png")
    data = new_images("coco", squares)
    path = _predict(trainer, ClassificationModule(Squares(), task=Detection()), data) / "detections.json"
    records = json.loads(path.read_text())
    assert [record["file_name"] for record in records] == [f"{number}.png" for number in range(5)]
    assert [record["category_id"] for record in records] == [1, 2, 1, 2, 1]
    assert data.left_out() == [5]
