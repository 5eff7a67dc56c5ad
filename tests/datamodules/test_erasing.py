import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from lkd.datamodules import Cutout, DigitsDataModule, Key, RandomErasing, uniform

PAIR = [Cutout(5), RandomErasing(0.7)]


def images(batch, channels=3, height=21, width=26, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def drawn(transform, batch, epoch=0):
    streams = torch.arange(transform.num_draws // 4)[:, None]
    return uniform(0, epoch, torch.arange(batch), streams).transpose(0, 1).flatten(1)


def erased(image, box, fill):
    """Erase one image with torchvision."""
    top, left, height, width = (int(edge) for edge in box)
    level = torch.tensor(fill, dtype=torch.uint8).view(-1, 1, 1)
    return TF.erase(image, top, left, height, width, level)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 4, 7, 60])
def test_cutout_equals_torchvision(size, channels):
    image, transform = images(60, channels), Cutout(size, fill=9)
    draws, expected = drawn(transform, 60), []
    for one, draw in zip(image, draws, strict=True):
        row, column = int(draw[0] * 21), int(draw[1] * 26)
        top, left = max(row - size // 2, 0), max(column - size // 2, 0)
        bottom, right = min(row - size // 2 + size, 21), min(column - size // 2 + size, 26)
        expected.append(erased(one, (top, left, bottom - top, right - left), 9))
    assert torch.equal(transform(image, draws), torch.stack(expected))


def test_cutout_centers_are_uniform():
    white = torch.full((12_000, 1, 4, 6), 255, dtype=torch.uint8)
    holes = (Cutout(1)(white, drawn(Cutout(), 12_000)) == 0).sum((0, 1))
    assert holes.sum() == 12_000
    assert holes.min() > 400
    assert holes.max() < 600


def test_cutout_area():
    """For 16 possible centers, a square of 8 pixels covers 8 - (4 + 3 + 2 + 1 + 1 + 2 + 3) / 16 rows on average."""
    white = torch.full((20_000, 1, 16, 16), 255, dtype=torch.uint8)
    lost = (Cutout(8)(white, drawn(Cutout(), 20_000)) == 0).sum((1, 2, 3)).double()
    assert lost.max() == 64
    assert lost.mean().item() == pytest.approx((8 - 16 / 16) ** 2, rel=0.02)


def test_erasing_equals_torchvision():
    image, transform = images(200), RandomErasing(fill=(1, 2, 3))
    draws = drawn(transform, 200)
    boxes = torch.stack(transform.box(21, 26, draws), dim=1)
    expected = [erased(one, box, (1, 2, 3)) if box[2] else one for one, box in zip(image, boxes, strict=True)]
    assert torch.equal(transform(image, draws), torch.stack(expected))


@pytest.mark.parametrize(
    "ranges", [{}, {"scale": (0.3, 1.0), "ratio": (0.2, 5.0)}, {"scale": (0.1, 0.1), "ratio": (2.0, 3.0)}]
)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 45), (8, 3)])
def test_erasing_is_distributed_as_in_torchvision(height, width, ranges):
    torch.manual_seed(0)
    count, transform = 4000, RandomErasing(1.0, **ranges)
    ours = torch.stack(transform.box(height, width, drawn(transform, count)), dim=1).double()
    theirs, image = v2.RandomErasing(1.0, **ranges), torch.zeros(1, height, width)
    params = [theirs.make_params([image]) for _ in range(count)]
    boxes = [[p[k] for k in "ijhw"] if p["v"] is not None else [0, 0, 0, 0] for p in params]
    expected = torch.tensor(boxes).double()
    ours[ours[:, 2] == 0] = 0
    expected[expected[:, 2] == 0] = 0
    error = (ours.var(0) / count + expected.var(0) / count).sqrt() + 1e-9
    assert ((ours.mean(0) - expected.mean(0)).abs() / error).max() < 4
    assert torch.allclose(ours.std(0), expected.std(0), rtol=0.1, atol=1e-9)
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width


def test_box_that_never_fits_changes_nothing():
    transform, image = RandomErasing(1.0, scale=(1.0, 1.0), ratio=(1.0, 1.0)), images(10, height=8, width=8)
    assert torch.equal(transform(image, drawn(transform, 10)), image)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_fraction_of_erased_images(p):
    transform, white = RandomErasing(p), torch.full((5000, 1, 16, 16), 255, dtype=torch.uint8)
    lost = (transform(white, drawn(transform, 5000)) == 0).flatten(1).any(1).double().mean()
    assert lost.item() == pytest.approx(p, abs=0.02)


@pytest.mark.parametrize("transform", PAIR)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7), (3, 32, 32)])
def test_images_are_independent_of_the_batch(transform, shape):
    batch, draws = images(100, *shape), drawn(transform, 100)
    changed = transform(batch, draws)
    assert changed.dtype == torch.uint8
    for i in range(100):
        assert torch.equal(transform(batch[i : i + 1], draws[i : i + 1])[0], changed[i])


@pytest.mark.parametrize("transform", PAIR)
def test_input_is_not_modified(transform):
    batch, draws = images(50), drawn(transform, 50)
    before = batch.clone(), draws.clone()
    changed = transform(batch, draws)
    assert torch.equal(batch, before[0])
    assert torch.equal(draws, before[1])
    assert not torch.equal(changed, batch)


def test_transforms_of_a_data_module_use_separate_draws():
    datamodule = DigitsDataModule(augment=PAIR, seed=5)
    datamodule.setup("fit")
    dataset = datamodule.datasets["train"]
    batch = dataset.__getitems__([Key(2, position) for position in range(40)])
    draws = uniform(5, 2, batch.index, torch.arange(7)[:, None])
    image = PAIR[0](dataset.stored[batch.index], draws[0])
    image = PAIR[1](image, draws[1:].transpose(0, 1).flatten(1))
    mean, std = torch.tensor(dataset.normalization.mean), torch.tensor(dataset.normalization.std)
    assert torch.equal(batch.input, (image / torch.tensor(255.0) - mean) / std)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cutout(0), "Cutout: size must be at least 1 pixel, got 0"),
        (lambda: Cutout(3, 256), "Cutout: fill must be between 0 and 255, got 256"),
        (
            lambda: Cutout(3, (1, 2))(images(2), torch.zeros(2, 4)),
            "Cutout: fill has 2 levels, but images have 3 channels",
        ),
        (lambda: RandomErasing(1.5), "RandomErasing: the probability p must be between 0 and 1, got 1.5"),
        (lambda: RandomErasing(scale=(0.5, 0.1)), "RandomErasing: scale must satisfy 0 <= low"),
        (lambda: RandomErasing(ratio=(0.0, 1.0)), "RandomErasing: ratio must satisfy 0 < low"),
        (lambda: RandomErasing(fill=(0, -1, 0)), r"RandomErasing: fill must be between 0 and 255, got \(0, -1, 0\)"),
    ],
)
def test_invalid_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
