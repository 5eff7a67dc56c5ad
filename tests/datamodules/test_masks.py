"""Images with masks: equal transforms of both, dependence on (seed, epoch, index) only, and invalid masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lkd.datamodules import (
    ColorJitter,
    Mixup,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    SegmentationDataModule,
    SyntheticSegmentationDataModule,
    TrivialAugment,
)
from lkd.types import IGNORE_INDEX, Batch


class Striped(SegmentationDataModule):
    """A data module whose pixels are 50 times their class, so that the mask can be computed from the image."""

    num_classes, input_shape, mean, std = 4, (3, 12, 12), (0.0,) * 3, (1.0,) * 3

    def __init__(self, mask: Tensor | None = None, **settings) -> None:
        super().__init__(**settings)
        generator = torch.Generator().manual_seed(0)
        self.mask = torch.randint(1, 4, (40, 12, 12), generator=generator, dtype=torch.uint8) if mask is None else mask

    def make_masks(self, split: str) -> tuple[Tensor, Tensor] | None:
        if split == "val":
            return None
        return (50 * self.mask)[:, None].expand(-1, 3, -1, -1).contiguous(), self.mask


def _batches(data: SegmentationDataModule, epochs: int = 1) -> list[Batch]:
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    found = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        found += list(loader)
    return found


@pytest.mark.parametrize("augment", [[], [RandomHorizontalFlip()], [RandomCrop(3), RandomHorizontalFlip()]])
def test_masks_follow_their_images(augment) -> None:
    """Pixels that a crop pads are ignored."""
    batches = _batches(Striped(batch_size=8, augment=augment), 2)
    for batch in batches:
        classes = (batch.input[:, 0] * 255 / 50).round().long()
        assert batch.target.dtype == torch.int64
        assert torch.equal(classes.masked_fill(classes == 0, IGNORE_INDEX), batch.target)
    ignored = sum(int((batch.target == IGNORE_INDEX).sum()) for batch in batches)
    assert bool(ignored) == any(isinstance(transform, RandomCrop) for transform in augment)


def test_other_transforms_change_only_the_image() -> None:
    plain, changed = (
        _batches(Striped(batch_size=8, augment=augment))
        for augment in (
            [RandomHorizontalFlip()],
            [RandomHorizontalFlip(), ColorJitter(brightness=0.9), RandomErasing(p=1.0)],
        )
    )
    for one, other in zip(plain, changed, strict=True):
        assert torch.equal(one.target, other.target)
        assert not torch.equal(one.input, other.input)


@pytest.mark.parametrize("transform", [RandAugment(), TrivialAugment()])
def test_transforms_that_masks_cannot_follow(transform) -> None:
    name = type(transform).__name__
    with pytest.raises(ValueError, match=f"{name} rotates and shears images without their masks; remove it"):
        Striped(augment=[RandomHorizontalFlip(), transform])


def test_samples_depend_on_seed_epoch_and_index() -> None:
    def samples(**settings) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        augment = [RandomCrop(3), RandomHorizontalFlip()]
        batches = _batches(SyntheticSegmentationDataModule(16, 48, 8, augment=augment, val_size=8, **settings), 2)
        rows = (
            row for batch in batches for row in zip(batch.version, batch.index, batch.input, batch.target, strict=True)
        )
        return {(int(version), int(index)): (image, mask) for version, index, image, mask in rows}

    few, many, workers = samples(batch_size=5), samples(batch_size=20), samples(batch_size=20, num_workers=1)
    assert len(many) == len(workers) == 80
    for key in few.keys() & many.keys():
        assert all(map(torch.equal, few[key], many[key]))
    assert all(torch.equal(a, b) for key in many for a, b in zip(many[key], workers[key], strict=True))
    other = samples(batch_size=20, seed=1)
    assert not all(torch.equal(other[key][0], many[key][0]) for key in other.keys() & many.keys())


def test_shapes_are_equal_in_every_run() -> None:
    image, mask = SyntheticSegmentationDataModule(size=24, train_size=20).make_masks("train")
    torch.manual_seed(7)
    again = SyntheticSegmentationDataModule(size=24, train_size=20).make_masks("train")
    assert torch.equal(image, again[0])
    assert torch.equal(mask, again[1])
    assert set(mask.unique().tolist()) == {0, 1, 2, 3, 4, 255}


def test_unlabelled_images() -> None:
    """Unlabelled images remain in the training set, and their masks are ignored."""
    batches = _batches(Striped(batch_size=36, augment=[], label_size=10))
    ignored = torch.cat([(batch.target == IGNORE_INDEX).flatten(1).all(1) for batch in batches])
    assert (int(ignored.sum()), len(ignored)) == (26, 36)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((40, 12, 12), 4, dtype=torch.uint8), "mask 0 of the train split of Striped contains the label 4"),
        (torch.zeros(40, 12, 10, dtype=torch.uint8), None),
        (torch.zeros(40, 12, 12, dtype=torch.int64), "uint8 masks"),
    ],
)
def test_invalid_masks(mask, message) -> None:
    data = Striped(mask)
    if message is None:
        data.make_masks = lambda split: (torch.zeros(40, 3, 12, 12, dtype=torch.uint8), mask)
        message = r"masks \(N, H, W\), got torch.uint8 \(40, 3, 12, 12\) and torch.uint8 \(40, 12, 10\)"
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_unsupported_settings() -> None:
    with pytest.raises(ValueError, match="Striped does not support mix"):
        Striped(mix=Mixup())
