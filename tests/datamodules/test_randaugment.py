import pytest
import torch
from torchvision.transforms import v2

from lkd.datamodules import (
    DigitsDataModule,
    Key,
    RandAugment,
    RandomCrop,
    RandomHorizontalFlip,
    TrivialAugment,
    uniform,
)
from lkd.datamodules.transforms.randaugment import OPERATIONS


def images(batch, channels=3, height=21, width=26, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)
    reduction = torch.tensor([1, 2, 4], dtype=torch.uint8)[torch.arange(batch) % 3]  # of the contrast
    return noise // reduction.view(-1, 1, 1, 1)


def draws_for(operation, negative, batch):
    """Return draws that select one operation and its sign."""
    kind = (list(OPERATIONS).index(operation) + 0.5) / len(OPERATIONS)
    return torch.tensor([kind, 0.2 if negative else 0.8, 0.0, 0.0]).expand(batch, 4)


def torchvisions(monkeypatch, operation, negative, magnitude):
    """Return torchvision's RandAugment with this operation only."""
    transform = v2.RandAugment(1, magnitude)
    monkeypatch.setattr(transform, "_AUGMENTATION_SPACE", {operation: transform._AUGMENTATION_SPACE[operation]})
    monkeypatch.setattr(torch, "rand", lambda shape: torch.tensor(0.2 if negative else 0.8))
    return transform


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 1, 10, 30])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_equals_torchvision(operation, magnitude, channels, monkeypatch):
    batch = images(9, channels)
    for negative in (False, True):
        transform = torchvisions(monkeypatch, operation, negative, magnitude)
        expected = torch.stack([transform(image) for image in batch])
        assert torch.equal(RandAugment(1, magnitude)(batch, draws_for(operation, negative, 9)), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_trivial_operation_equals_torchvision_at_every_strength(operation, channels, monkeypatch):
    batch, transform = images(31, channels), v2.TrivialAugmentWide()
    monkeypatch.setattr(transform, "_AUGMENTATION_SPACE", {operation: transform._AUGMENTATION_SPACE[operation]})
    for negative in (False, True):
        draws, expected = draws_for(operation, negative, 31).clone(), []
        draws[:, 2] = (torch.arange(31) + 0.5) / 31
        monkeypatch.setattr(torch, "rand", lambda shape, negative=negative: torch.tensor(0.2 if negative else 0.8))
        for strength, image in enumerate(batch):
            monkeypatch.setattr(torch, "randint", lambda n, shape, at=strength: torch.tensor(at if n == 31 else 0))
            expected.append(transform(image))
        assert torch.equal(TrivialAugment()(batch, draws), torch.stack(expected))


@pytest.mark.parametrize("theirs", [v2.RandAugment, v2.TrivialAugmentWide])
def test_operations_are_those_of_torchvision(theirs):
    assert list(OPERATIONS) == list(theirs._AUGMENTATION_SPACE)
    signed = {name: signed for name, (_, signed) in theirs._AUGMENTATION_SPACE.items()}
    assert {name: operation.signed for name, operation in OPERATIONS.items()} == signed


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7), (3, 32, 32)])
@pytest.mark.parametrize("transform", [RandAugment(), TrivialAugment()])
def test_images_are_independent_of_the_batch(transform, shape):
    batch, draws = images(200, *shape), uniform(0, 0, torch.arange(200), 0)
    changed = transform(batch, draws)
    assert changed.dtype == torch.uint8
    for i in range(200):
        assert torch.equal(transform(batch[i : i + 1], draws[i : i + 1])[0], changed[i])


def test_operations_are_applied_in_order():
    batch, draws = images(100), uniform(0, 0, torch.arange(100), torch.arange(2)[:, None]).transpose(0, 1).flatten(1)
    assert RandAugment(3).num_draws == 8
    step, expected = RandAugment(1), batch
    for number in range(3):
        expected = step(expected, draws[:, 2 * number : 2 * number + 2])
    assert torch.equal(RandAugment(3)(batch, draws), expected)
    assert not torch.equal(RandAugment(2)(batch, draws), expected)


def test_all_operations_and_signs_are_equally_likely(monkeypatch):
    seen = {}
    for name, operation in OPERATIONS.items():

        def count(image, level, name=name, operation=operation):
            key = (name, level < 0) if operation.signed else (name, False)
            seen[key] = seen.get(key, 0) + len(image)
            return image

        monkeypatch.setitem(OPERATIONS, name, operation._replace(change=count))
    RandAugment(2)(images(14_000, 1, 2, 2), uniform(0, 0, torch.arange(14_000), 0))
    assert len(seen) == 14 + 9
    for (name, _), count in seen.items():
        assert count == pytest.approx(1000 if OPERATIONS[name].signed else 2000, rel=0.1)


def test_all_trivial_strengths_are_equally_likely(monkeypatch):
    seen = []
    for name, operation in OPERATIONS.items():
        change = lambda image, level: seen.extend([abs(level)] * len(image)) or image  # noqa: E731
        monkeypatch.setitem(OPERATIONS, name, operation._replace(change=change, wide=OPERATIONS["Solarize"].wide))
    TrivialAugment()(images(31_000, 1, 2, 2), uniform(0, 0, torch.arange(31_000), 0))
    levels, counts = torch.tensor(seen).unique(return_counts=True)
    assert torch.equal(levels, torch.linspace(1.0, 0.0, 31).sort().values)
    assert counts.min() > 850
    assert counts.max() < 1150


@pytest.mark.parametrize("transform", [RandAugment(), TrivialAugment()])
def test_input_is_not_modified(transform):
    batch = images(50)
    before = batch.clone()
    changed = transform(batch, uniform(0, 0, torch.arange(50), 0))
    assert torch.equal(batch, before)
    assert not torch.equal(changed, before)


def test_following_transforms_use_separate_draws():
    """Each transform uses as many streams as it requires, in order."""
    augment = [RandAugment(3), RandomCrop(1), RandomHorizontalFlip()]
    datamodule = DigitsDataModule(augment=augment, seed=5)
    datamodule.setup("fit")
    dataset = datamodule.datasets["train"]
    batch = dataset.__getitems__([Key(2, position) for position in range(40)])
    draws = uniform(5, 2, batch.index, torch.arange(4)[:, None])
    image = RandAugment(3)(dataset.stored[batch.index], torch.cat((draws[0], draws[1]), dim=1))
    image = RandomHorizontalFlip()(RandomCrop(1)(image, draws[2]), draws[3])
    expected = (image / torch.tensor(255.0) - torch.tensor(dataset.normalization.mean)) / torch.tensor(
        dataset.normalization.std
    )
    assert torch.equal(batch.input, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandAugment(0), "RandAugment: num_ops must be at least 1, got 0"),
        (lambda: RandAugment(2, 31), "magnitude must be between 0 and 30, got 31"),
        (
            lambda: RandAugment()(images(2, 5), torch.zeros(2, 4)),
            "RandAugment requires images with 1 or 3 channels, got 5; remove it",
        ),
        (
            lambda: TrivialAugment()(images(2, 5), torch.zeros(2, 4)),
            "TrivialAugment requires images with 1 or 3 channels",
        ),
    ],
)
def test_invalid_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
