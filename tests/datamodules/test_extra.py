"""Data modules with few or no labels, and with additional training images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lkd import ClassificationModule, DistillModule
from lkd.__main__ import main
from lkd.datamodules import (
    DigitsDataModule,
    ImageFolderDataModule,
    Mixup,
    RandomCrop,
    RandomResizedCrop,
    StrongView,
    UnlabelledFolder,
)
from lkd.datamodules.files import ImageFiles
from lkd.datamodules.sources import Joined
from lkd.types import IGNORE_INDEX


def write(root: Path, names: list[str], size: tuple[int, int] = (8, 8), seed: int = 5) -> dict[str, np.ndarray]:
    """Write gray images as PNG files and return their pixels by name."""
    generator = np.random.default_rng(seed)
    pixels = {}
    for name in names:
        pixels[name] = generator.integers(256, size=size, dtype=np.uint8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[name]).save(root / name)
    return pixels


def digits(**settings) -> DigitsDataModule:
    data = DigitsDataModule(**{"augment": [], "batch_size": 50, **settings})
    data.setup("fit")
    return data


def epoch_samples(data) -> dict[int, tuple[torch.Tensor, int]]:
    """Return image and target by index, for the full batches of one epoch."""
    found = {}
    for batch in data.train_dataloader():
        found |= {int(i): (x, int(t)) for x, t, i in zip(batch.input, batch.target, batch.index, strict=True)}
    return found


def test_label_size_zero_keeps_the_images() -> None:
    data = digits(label_size=0)
    everything = digits()
    assert torch.equal(data.train_index, everything.train_index)
    assert set(data.datasets["train"].target[data.train_index].tolist()) == {IGNORE_INDEX}
    val = data.datasets["val"]
    assert set(val.target[val.index].tolist()) == set(range(10))


def test_labels_per_class() -> None:
    data = digits(labels_per_class=4)
    target = data.datasets["train"].target[data.train_index]
    assert data.num_labelled == 40
    assert torch.equal(target[target != IGNORE_INDEX].bincount(), torch.full((10,), 4))
    assert len(target) == 1294
    few = digits(labels_per_class=2, drop_unlabelled=True)
    assert len(few.train_index) == 20
    more = set(data.train_index[target != IGNORE_INDEX].tolist())
    assert set(few.train_index.tolist()) < more


def test_invalid_numbers_of_labels() -> None:
    with pytest.raises(ValueError, match=r"labels_per_class must be between 1 and .*\(class 8 has 125\), got 200"):
        digits(labels_per_class=200)
    with pytest.raises(ValueError, match=r"labels_per_class must be between 1 and .*, got 0"):
        digits(labels_per_class=0)
    with pytest.raises(ValueError, match="label_size 50 and labels_per_class 3 cannot be combined"):
        digits(labels_per_class=3, label_size=50)
    with pytest.raises(ValueError, match="DigitsDataModule has no training images"):
        digits(label_size=0, drop_unlabelled=True)


def test_images_of_a_folder_are_appended(tmp_path) -> None:
    pixels = write(tmp_path / "more", ["b.png", "a/deep/1.PNG", "a/0.png"])
    (tmp_path / "more" / "notes.txt").write_text("no image")
    plain, data = digits(), digits(extra=UnlabelledFolder(str(tmp_path / "more")), batch_size=1)
    own = len(plain.datasets["train"].target)
    assert data.num_samples == own + 3
    assert data.train_index.tolist() == [*plain.train_index.tolist(), own, own + 1, own + 2]
    seen = epoch_samples(data)
    for place, name in enumerate(["b.png", "a/0.png", "a/deep/1.PNG"]):
        image, target = seen[own + place]
        expected = (pixels[name] / 255 - 0.3057) / 0.3762
        assert target == IGNORE_INDEX
        assert np.allclose(image[0], expected, atol=1e-5)
    for index, (image, target) in epoch_samples(plain).items():
        assert torch.equal(image, seen[index][0])
        assert target == seen[index][1]


def test_training_on_a_transfer_set_only(tmp_path, monkeypatch) -> None:
    """The training images come from one dataset only, the validation and test images from another."""
    write(tmp_path / "other" / "train", [f"class{i % 3}/{i}.png" for i in range(12)], (16, 11))
    names = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("cat", "dog") for i in range(10)]
    write(tmp_path / "own", names)
    read, opened = [], ImageFiles.open

    def note(self: ImageFiles, index: int) -> Image.Image:
        read.append(str(self.path(index)))
        return opened(self, index)

    monkeypatch.setattr(ImageFiles, "open", note)
    settings = {"root": str(tmp_path / "own"), "image_size": 8, "in_channels": 1, "augment": [], "num_workers": 0}
    settings |= {"label_size": 0, "drop_unlabelled": True, "extra": UnlabelledFolder(str(tmp_path / "other"))}
    data = ImageFolderDataModule(**settings, batch_size=4, val_size=4)
    data.setup("fit")
    assert len(epoch_samples(data)) == data.num_samples == 12
    assert {target for _, target in epoch_samples(data).values()} == {IGNORE_INDEX}
    val = data.datasets["val"]
    held_out = {str(tmp_path / "own" / "train" / name.decode()) for name in val.source.original.files[val.index]}
    assert len(held_out) == 4
    assert {path for path in read if "/own/" in path} == held_out
    assert sum("/other/" in path for path in read) == 12
    data.setup("test")
    assert sorted(data.datasets["test"].target.tolist()) == [0] * 10 + [1] * 10
    assert data.class_names == ("cat", "dog")


@pytest.mark.parametrize("in_memory", [True, False])
def test_random_crops_of_joined_images(tmp_path, in_memory) -> None:
    """Random crops are read from the files in each epoch, as if one folder contained all images."""
    write(tmp_path / "one" / "train", [f"x/{i}.png" for i in range(3)], (20, 15), seed=1)
    write(tmp_path / "more", [f"{i}.png" for i in range(3)], (20, 15), seed=2)
    write(tmp_path / "all" / "train", [f"x/{i}.png" for i in range(3)], (20, 15), seed=1)
    write(tmp_path / "all" / "train", [f"x/{i}.png" for i in range(3, 6)], (20, 15), seed=2)
    settings = {"image_size": 8, "in_channels": 1, "num_workers": 0, "val_size": 0, "batch_size": 2, "mix": Mixup()}
    settings["augment"] = [RandomCrop(1)] if in_memory else [RandomResizedCrop(), RandomCrop(1)]
    settings["views"] = StrongView([RandomResizedCrop()])
    joined = ImageFolderDataModule(str(tmp_path / "one"), **settings, extra=UnlabelledFolder(str(tmp_path / "more")))
    whole = ImageFolderDataModule(str(tmp_path / "all"), **settings)
    for data in (joined, whole):
        data.setup("fit")
    assert isinstance(joined.datasets["train"].source, Joined) is not in_memory
    for ours, theirs in zip(joined.train_dataloader(), whole.train_dataloader(), strict=True):
        assert torch.equal(ours.input, theirs.input)
        assert torch.equal(ours.index, theirs.index)


def test_files_are_joined_with_images_in_memory(tmp_path) -> None:
    pixels = write(tmp_path / "more", ["0.png"], (20, 15))["0.png"]
    settings = {"augment": [RandomResizedCrop((1.0, 1.0), (0.75, 0.75))], "batch_size": 1, "num_workers": 0}
    plain, data = digits(**settings), digits(**settings, extra=UnlabelledFolder(str(tmp_path / "more")))
    assert isinstance(data.datasets["train"].source, Joined)
    seen = epoch_samples(data)
    for index, (image, _) in epoch_samples(plain).items():
        assert torch.equal(image, seen[index][0])
    whole = Image.fromarray(pixels).resize((8, 8), Image.Resampling.BILINEAR)
    expected = (np.asarray(whole) / 255 - 0.3057) / 0.3762
    assert np.allclose(seen[data.num_samples - 1][0], expected, atol=1e-5)


def test_joined_images_have_names(tmp_path) -> None:
    """The teacher cache and repeated runs identify the dataset by these names."""
    write(tmp_path / "more", ["0.png", "1.png"])
    extra = UnlabelledFolder(str(tmp_path / "more"))
    for augment in ([], [RandomResizedCrop()]):
        first, again = (digits(extra=extra, augment=augment).datasets["train"] for _ in range(2))
        plain = digits(augment=augment).datasets["train"]
        assert first.made_from() == again.made_from() != plain.made_from()
        assert first.contents() == again.contents() != plain.contents()


def test_corrupt_image(tmp_path) -> None:
    write(tmp_path / "more", ["0.png"])
    (tmp_path / "more" / "1.png").write_bytes(b"no image")
    extra = UnlabelledFolder(str(tmp_path / "more"))
    with pytest.raises(ValueError, match=r"image .*more/1\.png cannot be read"):
        digits(extra=extra)
    only = {"label_size": 0, "drop_unlabelled": True, "unreadable": "skip"}
    with pytest.warns(UserWarning, match="1 of 2 images"):
        assert digits(extra=extra, **only, batch_size=1).train_index.tolist() == [0]
    (tmp_path / "more" / "0.png").write_bytes(b"none either")
    with (
        pytest.warns(UserWarning, match="2 of 2"),
        pytest.raises(ValueError, match=r"no extra image of these classes in .*more can be read: \(none\)"),
    ):
        digits(extra=extra, **only)


@pytest.mark.parametrize(("made", "message"), [(False, "folder .* not found"), (True, "no images in")])
def test_folder_without_images(tmp_path, made, message) -> None:
    if made:
        (tmp_path / "more").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        digits(extra=UnlabelledFolder(str(tmp_path / "more")))


def test_a_student_learns_without_labels(tiny, trainer) -> None:
    """The student learns from the teacher's logits alone."""
    data = DigitsDataModule(label_size=0, batch_size=256)
    networks = [tiny(seed, num_classes=10, in_channels=1) for seed in (1, 2)]
    module = DistillModule(*networks, distill_weight=1.0, hard_weight=0.0)
    before = [parameter.clone() for parameter in module.student.parameters()]
    fit = trainer(max_epochs=1)
    fit.fit(module, data)
    assert all(not torch.equal(old, new) for old, new in zip(before, module.student.parameters(), strict=True))
    assert "train/hard" not in fit.logged_metrics
    assert 0 < fit.callback_metrics["val/acc"] < 1


def test_training_without_teacher_requires_labels(tiny, trainer) -> None:
    data = DigitsDataModule(label_size=0)
    networks = [tiny(seed, num_classes=10, in_channels=1) for seed in (1, 2)]
    for module in (ClassificationModule(networks[0]), DistillModule(*networks, distill_weight=0.0, hard_weight=1.0)):
        with pytest.raises(ValueError, match="no training image has a label"):
            trainer().fit(module, data)
    trainer().validate(ClassificationModule(networks[0]), data, verbose=False)


def test_command_line(tmp_path) -> None:
    write(Path("data/unlabelled"), [f"x/{i}.png" for i in range(20)], (9, 9))
    overlays = ["data/digits", "pairs/digits", "methods/transfer_set", "methods/patient"]
    short = ["--trainer.max_epochs=1", "--data.init_args.batch_size=8", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *(f"--config={name}" for name in overlays), *short]) == 0
    (checkpoint,) = Path("runs").rglob("best.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
