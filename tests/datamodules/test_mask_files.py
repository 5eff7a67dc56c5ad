"""Masks in files: pairs, random scaling and crops, padding, labels, published datasets and invalid files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lkd import ClassificationModule
from lkd.datamodules import (
    ADE20KDataModule,
    CityscapesDataModule,
    RandomHorizontalFlip,
    RandomScaledCrop,
    SegmentationFolderDataModule,
    VOCSegmentationDataModule,
)
from lkd.tasks import SemanticSegmentation
from lkd.types import IGNORE_INDEX, Batch

_SIZES = ((20, 30), (26, 18), (32, 32), (9, 12))


def _write(folder: Path, name: str, mask: np.ndarray, suffix: str = ".png") -> None:
    """Write an image whose pixels are 50 times their class, and its mask."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    Image.fromarray(np.stack([50 * mask] * 3, 2)).save(folder / "images" / f"{name}{suffix}")
    Image.fromarray(mask).save(folder / "masks" / f"{name}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write images of different sizes with classes 1 to 4 in blocks of 3x3 pixels, and return their folder."""
    generator = np.random.default_rng(0)
    for split, number in (("train", 12), ("val", 4), ("test", 4)):
        for i in range(number):
            height, width = _SIZES[i % 4]
            blocks = generator.integers(1, 5, (height // 3 + 1, width // 3 + 1), dtype=np.uint8)
            _write(tmp_path / split, f"{i:02d}", blocks.repeat(3, 0).repeat(3, 1)[:height, :width])
    return tmp_path


def _data(root: Path, **settings) -> SegmentationFolderDataModule:
    settings = {"num_classes": 5, "batch_size": 4, "mean": (0.0,) * 3, "std": (1.0,) * 3, "num_workers": 0} | settings
    data = SegmentationFolderDataModule(str(root), **settings)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


def _classes(batch: Batch) -> torch.Tensor:
    """Read the class of each pixel from the image; -1 for values interpolated between classes, 0 for padding."""
    level = batch.input * 255 / 50
    return torch.where((level - level.round()).abs().amax(1) < 1e-3, level[:, 0].round(), -1.0).long()


def _epochs(data: SegmentationFolderDataModule, number: int) -> list[Batch]:
    loader, batches = data.train_dataloader(), []
    for epoch in range(number):
        loader.sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


@pytest.mark.parametrize("augment", [None, [RandomScaledCrop((1.0, 1.0))], [RandomScaledCrop((0.3, 3.0), side=40)]])
def test_masks_are_scaled_and_cropped_like_their_images(root, augment) -> None:
    found = 0
    for batch in _epochs(_data(root, image_size=(24, 16), augment=augment), 3):
        assert batch.input.shape == (4, 3, 24, 16)
        assert batch.target.shape == (4, 24, 16)
        classes = _classes(batch)
        # Inside a block, bilinear interpolation returns its level, and nearest neighbor its class.
        inside = torch.zeros_like(classes, dtype=torch.bool)
        same = (classes[:, 1:-1, 1:-1] == classes[:, 2:, 1:-1]) & (classes[:, 1:-1, 1:-1] == classes[:, :-2, 1:-1])
        same &= (classes[:, 1:-1, 1:-1] == classes[:, 1:-1, 2:]) & (classes[:, 1:-1, 1:-1] == classes[:, 1:-1, :-2])
        inside[:, 1:-1, 1:-1] = same & (classes[:, 1:-1, 1:-1] >= 0)
        expected = classes.masked_fill(classes == 0, IGNORE_INDEX)
        assert torch.equal(batch.target[inside], expected[inside])
        found += int(inside.sum())
    assert found > 200


def test_crops_depend_on_seed_epoch_and_index(root) -> None:
    def samples(**settings) -> dict[tuple[int, int], Batch]:
        batches = _epochs(_data(root, image_size=(16, 16), val_size=0, **settings), 2)
        rows = (
            row for batch in batches for row in zip(batch.version, batch.index, batch.input, batch.target, strict=True)
        )
        return {(int(version), int(index)): (image, mask) for version, index, image, mask in rows}

    one, other, seeded = samples(batch_size=1), samples(batch_size=12), samples(batch_size=12, seed=1)
    assert one.keys() == other.keys()
    assert all(torch.equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True))
    assert not torch.equal(one[0, 0][0], one[1, 0][0])
    assert not torch.equal(other[0, 0][0], seeded[0, 0][0])


def test_evaluation_uses_whole_images(root) -> None:
    """Smaller images are padded at the right and at the bottom; the padding is ignored."""
    data = _data(root, image_size=(8, 8))
    (batch,) = data.test_dataloader()
    assert batch.input.shape == (4, 3, 32, 32)
    for image, mask, (height, width) in zip(_classes(batch), batch.target, _SIZES, strict=True):
        assert torch.equal(image[:height, :width], mask[:height, :width])
        assert int((mask != IGNORE_INDEX).sum()) == height * width
    assert data.datasets["test"].stored is not None  # decoded once

    (small,) = _data(root, image_size=(8, 8), eval_size=(16, 16)).test_dataloader()
    assert small.input.shape == (4, 3, 16, 16)
    labelled = (small.target != IGNORE_INDEX).flatten(1).sum(1)
    assert labelled.tolist() == [11 * 16, 16 * 11, 16 * 16, 9 * 12]


class _Strided(nn.Conv2d):
    """A network that requires multiples of 16 pixels."""

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[2] % 16 or input.shape[3] % 16:
            raise RuntimeError("height and width must be divisible by 16")
        return super().forward(input)


@pytest.mark.parametrize("run", ["fit", "validate", "test", "predict"])
def test_networks_that_do_not_accept_the_size_in_evaluation(run: str, root, trainer) -> None:
    module = ClassificationModule(_Strided(3, 5, 1), task=SemanticSegmentation(5))
    data = SegmentationFolderDataModule(str(root), 5, image_size=(16, 16), eval_size=(24, 20), batch_size=4)
    says = r"20x24 pixels failed: height and width must be divisible by 16; .* set eval_size of the data module"
    with pytest.raises(ValueError, match=says):
        getattr(trainer(max_epochs=1, num_sanity_val_steps=1), run)(module, data)


def test_whole_images_are_held_in_memory_without_a_crop(root) -> None:
    data = _data(root, augment=[RandomHorizontalFlip()])
    assert data.input_shape == data.whole_shape == (3, 32, 32)
    assert data.datasets["train"].stored is not None
    for batch in _epochs(data, 2):
        classes = _classes(batch)
        assert torch.equal(classes.masked_fill(classes == 0, IGNORE_INDEX), batch.target)


def test_lists_of_files(root) -> None:
    """`train.txt` names each image and its mask; without `val.txt`, images are held out."""
    expected = next(iter(_data(root, image_size=(8, 8), augment=[]).test_dataloader()))
    for split in ("train", "test"):
        names = sorted(path.stem for path in (root / split / "images").iterdir())
        lines = [f"{split}/images/{name}.png {split}/masks/{name}.png\n" for name in names]
        (root / f"{split}.txt").write_text("".join(lines))
    data = _data(root, image_size=(8, 8), augment=[], val_size=3)
    assert (len(data.datasets["train"]), len(data.datasets["val"])) == (9, 3)
    (batch,) = data.test_dataloader()
    assert torch.equal(batch.target, expected.target)
    assert torch.equal(batch.input, expected.input)


def test_cache_detects_a_changed_mask(root) -> None:
    first = next(iter(_data(root).test_dataloader()))
    mask = np.asarray(Image.open(root / "test/masks/00.png")).copy()
    mask[:] = 1
    Image.fromarray(mask).save(root / "test/masks/00.png")
    assert not torch.equal(next(iter(_data(root).test_dataloader())).target, first.target)


def test_masks_in_the_cache_are_checked_again_for_fewer_classes(root) -> None:
    assert int(next(iter(_data(root).test_dataloader())).target.max()) == 4
    with pytest.raises(ValueError, match="contains the label 4, but there are 4 classes"):
        list(_data(root, num_classes=4).test_dataloader())


def test_labels_are_mapped(root) -> None:
    (batch,) = _data(root, num_classes=3, label_map={1: 255, 2: 0, 3: 1, 4: 2}).test_dataloader()
    (plain,) = _data(root).test_dataloader()
    expected = torch.where(plain.target < 2, IGNORE_INDEX, plain.target - 2)
    assert torch.equal(batch.target, expected)


def _colored(mask: Path) -> None:
    Image.open(mask).convert("RGB").save(mask)


def _truncated(mask: Path) -> None:
    mask.write_bytes(mask.read_bytes()[:-30])


def _resized(mask: Path) -> None:
    Image.open(mask).resize((7, 9)).save(mask)


def _mislabelled(mask: Path) -> None:
    Image.fromarray(np.full((20, 30), 77, np.uint8)).save(mask)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_colored, r"mask \S+00.png cannot be read \(its mode is RGB, but the pixels of a mask must be the numbers"),
        (_truncated, r"mask \S+00.png cannot be read \(\w+: "),
        (_resized, r"mask \S+00.png cannot be read \(its size is 7x9 pixels, but the size of its image is 30x20\)"),
        (_mislabelled, r"contains the label 77, but there are 5 classes, 0 to 4; map the label to a class or to 255"),
        (lambda mask: mask.write_bytes(b""), r"mask \S+00.png cannot be read \(OSError: it is empty\)"),
        (lambda mask: mask.unlink(), r"1 of 4 images in \S+test/images have no mask in \S+test/masks: 00; add the"),
    ],
)
def test_invalid_masks(root, spoil, message) -> None:
    """Each error is one sentence, in memory or read one by one; images with unreadable masks can be skipped."""
    spoil(root / "test/masks/00.png")
    for settings in ({}, {"resident_limit": 0}):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            list(_data(root, **settings).test_dataloader())
        assert "\n" not in str(caught.value)
    if (root / "test/masks/00.png").exists():
        with pytest.warns(UserWarning, match=r"1 of 4 images in \S+ cannot be read and are skipped"):
            data = _data(root, unreadable="skip")
        assert data.datasets["test"].index.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_map": {9: 5}}, "label_map maps a label to 5, but there are 5 classes, 0 to 4"),
        ({"label_map": {256: 0}}, "labels must be between 0 and 255, got 256"),
        ({"image_size": (0, 8)}, r"image_size must be a height and a width of at least 1 pixel, got \[0, 8\]"),
        ({"class_names": ("a", "b")}, "class_names has 2 names, but there are 5 classes"),
        ({"augment": [RandomHorizontalFlip(), RandomScaledCrop()]}, "RandomScaledCrop must be the first transform"),
    ],
)
def test_invalid_settings(root, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        _data(root, **settings)


def test_one_number_is_height_and_width(root) -> None:
    data = _data(root, image_size=8, eval_size=16)
    assert (data.input_shape, data.whole_shape) == ((3, 8, 8), (3, 16, 16))


@pytest.mark.parametrize("part", ["images", "masks"])
def test_ambiguous_names(root, part) -> None:
    """Otherwise, one of two images would be left out, and one of two masks would be chosen."""
    names = sorted(path.name for path in (root / "train" / part).iterdir())
    copied = root / "train" / part / f"{names[0].rpartition('.')[0]}.bmp"
    Image.open(root / "train" / part / names[0]).save(copied)
    with pytest.raises(ValueError, match=rf"00.bmp and 00\.\w+ in \S+{part} differ only in their extension"):
        _data(root)


def test_missing_folders_and_invalid_lists(root) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder \S+nowhere/train/images not found; expected images in it"):
        _data(root / "nowhere")
    (root / "train.txt").write_text("train/images/00.png train/masks/00.png\ntrain/images/01.png\n")
    with pytest.raises(
        ValueError, match=r"line 2 of \S+train.txt must name an image and its mask, got 'train/images/01"
    ):
        _data(root)
    (root / "train.txt").write_text("\ufefftrain/images/00.png\ttrain/masks/00.png\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"list \S+test.txt not found; create it"):
        _data(root, val_size=0).setup("test")
    (root / "train.txt").write_text("train/images/00.png train/masks/no.png\n")
    with pytest.raises(FileNotFoundError, match=r"1 files listed in \S+train.txt are not in \S+: train/masks/no.png"):
        _data(root)


def _write_as(image: Path, mask: Path, label: np.ndarray) -> None:
    image.parent.mkdir(parents=True, exist_ok=True)
    mask.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*label.shape, 3), np.uint8)).save(image)
    Image.fromarray(label).save(mask)


def _voc(root: Path, label: np.ndarray) -> None:
    base = root / "VOCdevkit/VOC2012"
    for split in ("train", "train_aug", "val"):
        masks = "SegmentationClassAug" if split == "train_aug" else "SegmentationClass"
        _write_as(base / f"JPEGImages/{split}.jpg", base / f"{masks}/{split}.png", label)
        (base / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (base / f"ImageSets/Segmentation/{split}.txt").write_text(f"{split}\n")


def _cityscapes(root: Path, label: np.ndarray) -> None:
    for split in ("train", "val"):
        image = root / f"leftImg8bit/{split}/ulm/ulm_0_0_leftImg8bit.png"
        _write_as(image, root / f"gtFine/{split}/ulm/ulm_0_0_gtFine_labelIds.png", label)
        Image.fromarray(label).save(root / f"gtFine/{split}/ulm/ulm_0_0_gtFine_instanceIds.png")


def _ade(root: Path, label: np.ndarray) -> None:
    base = root / "ADEChallengeData2016"
    for split in ("training", "validation"):
        _write_as(base / f"images/{split}/a.jpg", base / f"annotations/{split}/a.png", label)


@pytest.mark.parametrize(
    ("write", "module", "settings", "stored", "expected"),
    [
        (_voc, VOCSegmentationDataModule, {}, [0, 20, 255], [0, 20, IGNORE_INDEX]),
        (_voc, VOCSegmentationDataModule, {"image_set": "train_aug"}, [0, 20, 255], [0, 20, IGNORE_INDEX]),
        (_cityscapes, CityscapesDataModule, {}, [0, 7, 33], [IGNORE_INDEX, 0, 18]),
        (_ade, ADE20KDataModule, {}, [0, 1, 150], [IGNORE_INDEX, 0, 149]),
    ],
)
def test_published_datasets(tmp_path, write, module, settings, stored, expected) -> None:
    write(tmp_path, np.array([stored, stored], np.uint8))
    data = module(str(tmp_path), val_size=0, batch_size=1, num_workers=0, **settings)
    assert len(data.class_names) == data.num_classes
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    (batch,) = data.train_dataloader()
    assert batch.input.shape[2:] == tuple(data.image_size)
    assert set(batch.target.unique().tolist()) <= {IGNORE_INDEX, *expected}
    (batch,) = data.test_dataloader()
    assert batch.target[0, 0, :3].tolist() == expected


def test_cityscapes_requires_a_registration(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Cityscapes was not found in \S+ \(it requires a registration"):
        CityscapesDataModule(str(tmp_path / "none")).prepare_data()
