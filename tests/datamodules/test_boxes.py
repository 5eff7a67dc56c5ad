"""Data modules with boxes: flips, order, COCO files and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lkd import CocoDetectionDataModule, SyntheticDetectionDataModule
from lkd.datamodules import BoxDataset, BoxSource, ImageError, Key, uniform
from lkd.datamodules.coco import CocoFile
from lkd.types import Batch


def _batches(data: SyntheticDetectionDataModule, epoch: int = 0, workers: int = 0) -> list[Batch]:
    data.num_workers = workers
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def _samples(batches: list[Batch]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Return image and boxes for each index in the source."""
    return {
        index: (image, target["boxes"])
        for batch in batches
        for index, image, target in zip(batch.index.tolist(), batch.input, batch.target, strict=True)
    }


def test_order_and_flips_depend_on_seed_epoch_and_index() -> None:
    data = SyntheticDetectionDataModule(train_size=40, val_size=8, batch_size=8, seed=3)
    data.setup("fit")
    first, again, second = (_batches(data, epoch) for epoch in (0, 0, 1))
    with_workers = _batches(data, workers=1)
    data.batch_size = 4
    by_batch = [_samples(batches) for batches in (first, again, with_workers, _batches(data))]
    assert all(by_batch[0].keys() == other.keys() for other in by_batch[1:])
    for other in by_batch[1:]:
        assert all(torch.equal(a, b) for key in other for a, b in zip(by_batch[0][key], other[key], strict=True))
    assert [batch.index.tolist() for batch in first] == [batch.index.tolist() for batch in again]
    assert [batch.index.tolist() for batch in first] != [batch.index.tolist() for batch in second]
    source, flips = data.datasets["train"].source, 0
    for index, (image, boxes) in by_batch[0].items():
        original, target = source.images[index].float() / 255, source.target(index)["boxes"]
        flipped = bool(uniform(3, 0, torch.tensor([index]), 0)[0, 0] < 0.5)
        flips += flipped
        assert torch.equal(image, original.flip(2) if flipped else original)
        if flipped:
            mirrored = [[image.shape[2] - x2, y1, image.shape[2] - x1, y2] for x1, y1, x2, y2 in target.tolist()]
            assert boxes.tolist() == mirrored
        else:
            assert torch.equal(boxes, target)
    assert 0 < flips < len(by_batch[0])
    held_out = set(data.datasets["val"].index.tolist())
    assert len(held_out) == 8
    assert held_out.isdisjoint(data.datasets["train"].index.tolist())


def test_images_differ_in_size_and_boxes_enclose_the_shapes() -> None:
    data = SyntheticDetectionDataModule((40, 60), train_size=30, val_size=0)
    data.setup("fit")
    source = data.datasets["train"].source
    assert len({tuple(image.shape) for image in source.images}) > 20
    assert data.val_dataloader() == []
    for index, image in enumerate(source.images):
        _, height, width = image.shape
        for (x1, y1, x2, y2), label in zip(*source.target(index).values(), strict=True):
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            assert 1 <= label <= 4


def test_processes_evaluate_each_image_once() -> None:
    data = SyntheticDetectionDataModule(train_size=20, val_size=7, batch_size=4)
    data.setup("fit")
    seen = []
    for rank in range(2):
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        seen += [index for batch in data.val_dataloader() for index in batch.index.tolist()]
    assert sorted(seen) == data.datasets["val"].index.tolist()
    data.trainer = SimpleNamespace(world_size=8, global_rank=0)
    with pytest.raises(ValueError, match="the val split has 7 images for 8 processes"):
        data.val_dataloader()


def test_invalid_boxes() -> None:
    images, labels, counts = [torch.zeros(3, 8, 8)] * 2, torch.ones(2, dtype=torch.int64), torch.tensor([1, 1])
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 4.0, 3.0, 4.0]])
    with pytest.raises(ValueError, match=r"box \[1.0, 4.0, 3.0, 4.0\] of image 1 has no area"):
        BoxSource(images, boxes, labels, counts)
    with pytest.raises(ValueError, match="must agree with the images"):
        BoxSource(images, boxes[:1], labels, counts)

    class Wrong(SyntheticDetectionDataModule):
        def make_boxes(self, split):
            return None if split == "val" else BoxSource(images, boxes[[0, 0]], 9 * labels, counts)

    with pytest.raises(
        ValueError, match=r"train split of Wrong has a box of class 9, but the classes of objects are 1 to 4"
    ):
        Wrong().setup("fit")
    with pytest.raises(ValueError, match="number of images below 20, got 20"):
        SyntheticDetectionDataModule(train_size=20, val_size=20).setup("fit")


@pytest.fixture
def coco(tmp_path) -> Callable[..., CocoDetectionDataModule]:
    """Return a function that changes the annotation file of two images and creates their data module."""

    def make(change: Callable[[dict[str, Any]], object] = lambda content: None, **settings) -> CocoDetectionDataModule:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for number, size in enumerate(((20, 10), (12, 16))):
            pixels = np.full((size[1], size[0], 3), 100 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        annotations = [
            {"id": 1, "image_id": 70, "category_id": 9, "bbox": [1, 2, 5, 6]},
            {"id": 2, "image_id": 70, "category_id": 3, "bbox": [15, 5, 10, 2.5]},
            {"id": 3, "image_id": 71, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ]
        content = {
            "images": [
                {"id": 71, "file_name": "1.png", "width": 12, "height": 16},
                {"id": 70, "file_name": "0.png", "width": 20, "height": 10},
            ],
            "annotations": annotations,
            "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
        }
        change(content)
        (tmp_path / "boxes.json").write_text(json.dumps(content))
        settings = {"val_size": 0, "num_workers": 0, "batch_size": 2, **settings}
        return CocoDetectionDataModule(str(folder), str(tmp_path / "boxes.json"), **settings)

    return make


def test_coco_files(coco) -> None:
    data = coco()
    data.setup("fit")
    assert (data.num_classes, data.class_names) == (3, ("background", "cat", "dog"))
    batch = BoxDataset(data.datasets["train"].source, torch.arange(2))[Key(0, 1)]
    assert batch.input[0].shape == (3, 10, 20)
    assert batch.target[0]["boxes"].tolist() == [[1, 2, 6, 8], [15, 5, 20, 7.5]]  # clipped
    assert batch.target[0]["labels"].tolist() == [2, 1]
    (other,) = BoxDataset(data.datasets["train"].source, torch.arange(2))[Key(0, 0)].input
    assert torch.equal(other, torch.full((3, 16, 12), 100 / 255))
    assert data.datasets["train"].source.counts.tolist() == [0, 2]
    kept = coco(keep_ids=True)
    kept.setup("fit")
    assert kept.num_classes == 10
    assert kept.datasets["train"].source.labels.tolist() == [9, 3]
    with pytest.raises(ValueError, match=r"no test images; set test_images and test_annotations, or .* `lkd validate`"):
        data.setup("test")


@pytest.mark.parametrize("part", ["images", "categories"])
def test_repeated_ids_are_rejected(coco, part: str) -> None:
    def repeat(content) -> None:
        content[part].append(content[part][0])

    with pytest.raises(ValueError, match=r"is not in COCO's format \(ValueError: the id \d+ occurs more than once\)"):
        coco(repeat).setup("fit")


def test_annotations_are_parsed_once(coco, monkeypatch) -> None:
    parsed = []
    original = CocoFile.__init__
    monkeypatch.setattr(CocoFile, "__init__", lambda self, path: parsed.append(path) or original(self, path))
    data = coco()
    data.setup("fit")
    assert len(parsed) == len(set(parsed)) >= 1


def test_limited_evaluation_uses_a_random_subset() -> None:
    data = SyntheticDetectionDataModule((32, 48), train_size=8, test_size=40, batch_size=4)
    data.setup("test")
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, limit_test_batches=2)
    subset = [int(one) for batch in list(data.test_dataloader())[:2] for one in batch.index]
    assert subset != sorted(subset)
    data.trainer.limit_test_batches = 1.0
    assert [int(one) for batch in data.test_dataloader() for one in batch.index] == list(range(40))


def test_training_images_without_boxes_are_reported(coco) -> None:
    data = coco(lambda content: content["annotations"].clear())
    with pytest.warns(UserWarning, match="no training image has a box; check the annotations"):
        data.setup("fit")


def test_16_bit_images_are_not_clipped(coco, tmp_path) -> None:
    """Pillow's conversion to RGB would set all levels above 255 of 65535 to white."""
    data = coco()
    Image.fromarray(np.full((10, 20), 256 * 100 + 7, dtype=np.uint16)).save(tmp_path / "images" / "0.png")
    data.setup("fit")
    (image,) = data.datasets["train"][Key(0, 1)].input
    assert torch.equal(image, torch.full((3, 10, 20), 100 / 255))


def test_splits_must_have_the_same_categories(coco, tmp_path) -> None:
    path = tmp_path / "boxes.json"
    data = coco(val_images=str(tmp_path / "images"), val_annotations=str(tmp_path / "val.json"))
    (tmp_path / "val.json").write_text(path.read_text())
    data.setup("fit")
    data.datasets.clear()
    (tmp_path / "val.json").write_text(path.read_text().replace("dog", "bird"))
    with pytest.raises(ValueError, match=r"category 9 is 'bird' in \S+val.json, but 'dog' in the annotation file of"):
        data.setup("fit")


def _set(name: str, number: int, **values: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[name][number].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("annotations", 0, bbox=[1, 2, 0, 6]), r"annotation 1 of .* has the box \[1.0, 2.0, 0.0, 6.0\]"),
        (_set("annotations", 1, bbox=[25, 5, 3, 3]), "annotation 2 of .* has no area in the image 0.png"),
        (_set("annotations", 1, bbox=[25, 5, 3]), "bbox must be x, y, width and height"),
        (_set("annotations", 1, category_id=4), "annotation 2 of .* refers to the unknown category 4"),
        (_set("annotations", 1, image_id=4), "annotation 2 of .* refers to the unknown image 4"),
        (_set("categories", 1, id=0), r"ids of at least 1, got 2 images and the ids \[0, 9\]"),
        (_set("images", 1, file_name="gone.png"), "1 of 2 images are missing in .*, for example gone.png"),
        (_set("images", 1, file_name="../0.png"), "is outside the folder"),
        (lambda content: content.pop("categories"), "not in COCO's format .KeyError: 'categories'"),
        (lambda content: content["images"].clear(), "must contain images"),
    ],
)
def test_invalid_coco_files(coco, change, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        coco(change).setup("fit")


def test_missing_and_corrupt_coco_files(coco, tmp_path) -> None:
    data = coco(_set("annotations", 0, bbox=[1, 2, 0, 6]), invalid_boxes="skip")
    data.setup("fit")
    assert data.datasets["train"].source.counts.tolist() == [0, 1]
    (tmp_path / "images" / "0.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"0.png cannot be read \(UnidentifiedImageError: .*\); replace or remove it"):
        data.datasets["train"][Key(0, 1)]
    wrong = coco(_set("images", 1, width=30))
    wrong.setup("fit")
    with pytest.raises(ImageError, match=r"0.png has 20x10 pixels, but its annotation file states 30x10"):
        wrong.datasets["train"][Key(0, 1)]
    data.paths["train"] = (str(tmp_path / "none"), data.paths["train"][1])
    data.datasets.clear()
    with pytest.raises(FileNotFoundError, match=r"folder .*none not found"):
        data.setup("fit")
    (tmp_path / "boxes.json").write_text("{")
    with pytest.raises(ValueError, match=r"not in COCO's format .JSONDecodeError"):
        data.setup("fit")
    (tmp_path / "boxes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotation file .*boxes.json not found"):
        data.setup("fit")
    with pytest.raises(ValueError, match="val_images and val_annotations belong together"):
        coco(val_images="images")
