import itertools

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from lkd.datamodules import ColorJitter, uniform

CHANGES = {
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
}
WIDE = {"brightness": 0.9, "contrast": 0.9, "saturation": 0.9, "hue": 0.5}
ALL = ColorJitter(0.4, 0.4, 0.4, 0.1)


def images(batch, channels=3, height=21, width=26, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)
    noise[1::5] = noise[1::5, :1]  # some images are gray
    return noise // torch.tensor([1, 2, 4], dtype=torch.uint8)[torch.arange(batch) % 3].view(-1, 1, 1, 1)


def drawn(batch, epoch=0):
    return uniform(0, epoch, torch.arange(batch), torch.arange(2)[:, None]).transpose(0, 1).flatten(1)


def factors(transform, draws):
    low, high = torch.tensor(transform.ranges).T
    return low + (high - low) * draws[:, :4]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CHANGES)
def test_each_change_agrees_with_torchvision_within_one_level(name, channels):
    image, draws = images(150, channels), drawn(150)
    transform = ColorJitter(**{name: WIDE[name]})
    factor = factors(transform, draws)[:, list(CHANGES).index(name)]
    expected = torch.stack([CHANGES[name](one, float(f)) for one, f in zip(image, factor, strict=True)])
    difference = (transform(image, draws).int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_equals_torchvision(channels):
    image, draws, transform = images(150, channels), drawn(150), ColorJitter(0.9)
    factor = factors(transform, draws)[:, 0]
    expected = [TF.adjust_brightness(one, float(f)) for one, f in zip(image, factor, strict=True)]
    assert torch.equal(transform(image, draws), torch.stack(expected))


def test_gray_levels_are_truncated_weighted_sums():
    levels = torch.arange(256)
    red, green, blue = torch.meshgrid(levels, levels, levels[::5], indexing="ij")
    image = torch.stack((red, green, blue)).to(torch.uint8).flatten(1).view(1, 3, 256, -1)
    expected = ((2989 * red + 5870 * green + 1140 * blue) // 10_000).view(1, 1, 256, -1).expand(-1, 3, -1, -1)
    assert torch.equal(ColorJitter(saturation=(0.0, 0.0))(image, torch.zeros(1, 8)).long(), expected)


def test_hue_of_all_colours():
    levels = torch.arange(0, 256, 3)
    colours = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).to(torch.uint8)
    image = colours.flatten(1).view(1, 3, len(levels), -1)
    draws = torch.zeros(1, 8)
    assert torch.equal(ColorJitter(hue=(1e-9, 1e-9))(image, draws), image)
    third = ColorJitter(hue=(1 / 3, 1 / 3))(image, draws)
    assert (third.int() - image.roll(1, dims=1).int()).abs().max() <= 1  # red becomes green
    for factor in (-0.5, -0.2, 0.1, 0.4):
        turned = ColorJitter(hue=(factor, factor))(image, draws)
        assert (turned.int() - TF.adjust_hue(image, factor).int()).abs().max() <= 1


def test_order_of_changes_follows_the_last_draws():
    image, orders = images(24), list(itertools.permutations(range(4)))
    draws = drawn(24)
    draws[:, 4:] = torch.tensor(orders).argsort(1) / 4
    factor, expected = factors(ALL, draws), []
    for one, order, own in zip(image, orders, factor, strict=True):
        for number in order:
            one = ColorJitter(**{name: (float(own[number]),) * 2 for name in [list(CHANGES)[number]]})(
                one[None], torch.zeros(1, 8)
            )[0]
        expected.append(one)
    assert torch.equal(ALL(image, draws), torch.stack(expected))


def test_all_orders_are_equally_likely():
    """The factors saturate the pixels, so each of the 24 orders gives a different image."""
    image = images(1)[:, :, :4, :4].expand(24_000, -1, -1, -1)
    transform = ColorJitter((1.8, 1.8), (1.5, 1.5), (1.7, 1.7), (0.2, 0.2))
    _, counts = transform(image, drawn(24_000)).flatten(1).unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() > 880
    assert counts.max() < 1120


def test_factors_are_distributed_as_in_torchvision():
    transform, theirs = ColorJitter(0.4, (0.5, 3.0), 1.5, 0.2), v2.ColorJitter(0.4, (0.5, 3.0), 1.5, 0.2)
    assert transform.ranges == (theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue)
    found = factors(transform, drawn(5000)).double()
    low, high = torch.tensor(transform.ranges).double().T
    assert torch.allclose(found.mean(0), (low + high) / 2, atol=0.04)
    assert torch.allclose(found.std(0), (high - low) / 12**0.5, rtol=0.05)


def test_without_changes_the_image_is_unchanged():
    for channels in (1, 3):
        assert torch.equal(ColorJitter()(images(10, channels), drawn(10)), images(10, channels))


def test_gray_images_remain_gray():
    image = images(10, 1)
    assert torch.equal(ColorJitter(saturation=0.9, hue=0.5)(image, drawn(10)), image)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7), (3, 32, 32), (3, 97, 101)])
def test_images_are_independent_of_the_batch(shape):
    batch, draws = images(100, *shape), drawn(100)
    changed = ALL(batch, draws)
    assert changed.dtype == torch.uint8
    for i in range(100):
        assert torch.equal(ALL(batch[i : i + 1], draws[i : i + 1])[0], changed[i])


def test_input_is_not_modified():
    batch, draws = images(50), drawn(50)
    before = batch.clone()
    changed = ALL(batch, draws)
    assert torch.equal(batch, before)
    assert not torch.equal(changed, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColorJitter(brightness=-0.1), "ColorJitter: brightness must be at least 0, or a range"),
        (lambda: ColorJitter(saturation=(2.0, 1.0)), "saturation must be at least 0, or a range"),
        (
            lambda: ColorJitter(hue=0.6),
            "ColorJitter: hue must be between 0 and 0.5, or a range in -0.5 to 0.5, got 0.6",
        ),
        (
            lambda: ColorJitter(0.4)(images(2, 5), torch.zeros(2, 8)),
            "requires images with 1 or 3 channels, got 5; remove it",
        ),
    ],
)
def test_invalid_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
