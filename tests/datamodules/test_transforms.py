import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from lkd.datamodules import CenterCrop, ImageTransform, RandomCrop, RandomHorizontalFlip, RandomResizedCrop, uniform


def images(batch, channels=3, height=10, width=14, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def photo(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_equals_torchvision_one_image_at_a_time(padding, channels):
    image, draws = images(50, channels), uniform(0, 0, torch.arange(50), 0)
    expected = []
    for one, draw in zip(image, draws, strict=True):
        top, left = int(draw[0] * (2 * padding + 1)), int(draw[1] * (2 * padding + 1))
        expected.append(TF.crop(TF.pad(one, [padding]), top, left, *one.shape[1:]))
    assert torch.equal(RandomCrop(padding)(image, draws), torch.stack(expected))


def test_crop_offsets_are_uniform():
    marked = torch.zeros(9000, 1, 5, 5, dtype=torch.uint8)
    marked[:, :, 2, 2] = 1
    moved = RandomCrop(1)(marked, uniform(0, 0, torch.arange(9000), 0)).sum((0, 1))
    assert moved.sum() == 9000
    assert moved[1:4, 1:4].min() > 900
    assert moved[1:4, 1:4].max() < 1100


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_flip_equals_torchvision_one_image_at_a_time(p):
    image, draws = images(50), uniform(0, 0, torch.arange(50), 1)
    expected = [TF.horizontal_flip(i) if d[0] < p else i for i, d in zip(image, draws, strict=True)]
    flipped = RandomHorizontalFlip(p)(image, draws)
    assert torch.equal(flipped, torch.stack(expected))
    assert sum(torch.equal(a, b) for a, b in zip(image, flipped, strict=True)) == (draws[:, 0] >= p).sum()


def test_transforms_do_not_change_their_input():
    image, draws = images(8), uniform(0, 0, torch.arange(8), 0)
    before = image.clone()
    RandomCrop(2)(image, draws)
    RandomHorizontalFlip(1.0)(image, draws)
    assert torch.equal(image, before)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (100, 57), (32, 90)])
@pytest.mark.parametrize(("size", "scaled"), [(56, 64), (16, 18), (33, 38)])
def test_center_crop_equals_torchvision(height, width, size, scaled):
    image = photo(height, width)
    expected = v2.CenterCrop(size)(v2.Resize(scaled)(image))
    result = CenterCrop(0.875)(image, (size, size), torch.zeros(10, 4))
    assert result.size == (size, size)
    assert np.array_equal(np.asarray(result), np.asarray(expected))


def test_center_crop_keeps_images_of_the_requested_size():
    image = photo(32, 32)
    assert CenterCrop(0.875)(image, (32, 32), torch.zeros(10, 4)) is image


def test_center_crop_fills_non_square_sizes():
    for height, width in [(33, 20), (20, 33), (24, 49), (10, 100)]:
        result = CenterCrop(0.9)(photo(height, width), (24, 48), torch.zeros(10, 4))
        assert result.size == (48, 24)
        assert np.asarray(result).min(-1).max() > 0  # no black borders


def test_resized_crop_equals_torchvision():
    image, draws = photo(60, 80), uniform(0, 0, torch.tensor(5), torch.arange(10))
    crop = RandomResizedCrop()
    top, left, height, width = crop.box(60, 80, draws)
    expected = TF.resize(TF.crop(image, top, left, height, width), [32, 32])
    assert np.array_equal(np.asarray(crop(image, (32, 32), draws)), np.asarray(expected))


@pytest.mark.parametrize(("height", "width"), [(60, 80), (32, 32), (20, 200)])
def test_resized_crop_is_distributed_as_in_torchvision(height, width):
    torch.manual_seed(0)
    count = 3000
    draws = uniform(0, 0, torch.arange(count)[:, None], torch.arange(10))
    ours = torch.tensor([RandomResizedCrop().box(height, width, d) for d in draws]).double()
    theirs = v2.RandomResizedCrop(8)
    image = torch.zeros(3, height, width)
    params = [theirs.make_params([image]) for _ in range(count)]
    expected = torch.tensor([[p[k] for k in ("top", "left", "height", "width")] for p in params]).double()
    error = (ours.var(0) / count + expected.var(0) / count).sqrt() + 1e-9
    assert ((ours.mean(0) - expected.mean(0)).abs() / error).max() < 4
    assert torch.allclose(ours.std(0), expected.std(0), rtol=0.1, atol=1e-9)
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width
    assert ours[:, 2:].min() >= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomCrop(-1), "RandomCrop: padding must be at least 0 pixels, got -1"),
        (lambda: RandomHorizontalFlip(1.5), "the probability p must be between 0 and 1, got 1.5"),
        (lambda: CenterCrop(0.0), "CenterCrop: ratio must be greater than 0 and at most 1, got 0.0"),
        (lambda: RandomResizedCrop(scale=(0.0, 1.0)), "RandomResizedCrop: scale must satisfy 0 < low"),
        (lambda: RandomResizedCrop(ratio=(2.0, 1.0)), "RandomResizedCrop: ratio must satisfy 0 < low"),
    ],
)
def test_invalid_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def smooth(height, width):
    """Return an image as smooth as a photo, so that JPEG preserves it."""
    coarse = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return TF.to_pil_image(fine[0])


@pytest.mark.parametrize(
    "transform", [CenterCrop(), CenterCrop(0.875), RandomResizedCrop(), RandomResizedCrop((0.5, 1))]
)
@pytest.mark.parametrize(("full", "size"), [((375, 500), (40, 40)), ((501, 333), (30, 70)), ((300, 299), (200, 100))])
def test_reduced_decoding_gives_nearly_the_same_image(tmp_path, transform, full, size):
    smooth(*full).save(tmp_path / "photo.jpg", quality=95)
    whole, factors = Image.open(tmp_path / "photo.jpg").convert("RGB"), set()
    for draws in uniform(0, 0, torch.arange(12)[:, None], torch.arange(10)):
        least = transform.least(full, size, draws)
        image = Image.open(tmp_path / "photo.jpg")
        image.draft(None, (least[1], least[0]))
        factors.add(round(full[0] / image.height))
        if image.size != whole.size:
            assert image.height >= least[0]
            assert image.width >= least[1]
        small = np.asarray(transform.reduced(image, full, size, draws), dtype=float)
        expected = np.asarray(transform(whole, size, draws), dtype=float)
        assert small.shape == (*size, 3)
        assert np.abs(small - expected).mean() < 1.5
        if image.size == whole.size:
            assert np.array_equal(small, expected)
    assert (max(factors) > 1) == (size != (200, 100))


def test_reduced_crop_has_at_least_the_requested_pixels():
    crop, full, size = RandomResizedCrop(), (700, 900), (48, 64)
    for draws in uniform(0, 0, torch.arange(300)[:, None], torch.arange(10)):
        (height, width), (_, _, part_height, part_width) = crop.least(full, size, draws), crop.box(*full, draws)
        assert part_height * height >= size[0] * full[0]
        assert part_width * width >= size[1] * full[1]


def test_own_transforms_get_the_whole_image_by_default():
    class Own(ImageTransform):
        def __call__(self, image, size, draws):
            return image.resize(size[::-1])

    assert Own().least((300, 400), (3, 4), torch.zeros(10, 4)) == (300, 400)
    assert Own().reduced(photo(30, 40), (30, 40), (3, 4), torch.zeros(10, 4)).size == (4, 3)
