"""Mixed images depend on (seed, epoch, index) only, and the batch contains the mixing weights."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import TensorDataset

from lkd.datamodules import (
    ClassPartner,
    CutMix,
    DigitsDataModule,
    Key,
    Mix,
    Mixup,
    RotatedViews,
    StrongView,
    SyntheticDataModule,
    uniform,
)
from lkd.datamodules.draws import IMAGE, MIX, ORDER, PARTNER, SPLIT, VIEW
from lkd.datamodules.transforms.mixing import smaller_share
from lkd.datamodules.transforms.views import View
from lkd.types import IGNORE_INDEX
from tests.datamodules.sources import SHUFFLED, in_memory

MIXES = [Mixup(), CutMix(), Mixup(0.3, p=0.5), CutMix(p=0.5)]
every = pytest.mark.parametrize("mix", MIXES, ids=str)


both = pytest.mark.parametrize("make", ["memory", "files"], indirect=True)


def training(datamodule):
    datamodule.setup("fit")
    return datamodule.datasets["train"]


def whole(dataset, epoch=0):
    return dataset.__getitems__([Key(epoch, position) for position in range(len(dataset))])


def rows(batch):
    """Return each image's part of the batch by its index."""
    parts = (batch.input, batch.target, batch.version, batch.mixed.target, batch.mixed.weight)
    return {int(index): row for index, *row in zip(batch.index, *parts, strict=True)}


def read(datamodule, epoch, processes=1):
    """Return all images of one epoch in all processes, by index."""
    datamodule.setup("fit")
    seen = {}
    for rank in range(processes):
        datamodule.trainer = SimpleNamespace(world_size=processes, global_rank=rank)
        loader = datamodule.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            seen |= rows(batch)
    return seen


def partners(dataset, epoch, index, number=0):
    """Compute the indices of the partners from the random draws."""
    draw = uniform(dataset.seed, epoch, index, number * VIEW + MIX)[:, 1]
    chosen = dataset.index[(draw * (len(dataset) - 1)).long()]
    return torch.where(chosen == index, dataset.index[-1], chosen)


@every
@both
def test_images_do_not_depend_on_batch_size_workers_and_processes(make, mix):
    dataset, expected = training(make(mix=mix)), {}
    for position in range(len(dataset)):
        expected |= rows(dataset[Key(3, position)])
    for batch_size, workers, processes in [(1, 0, 1), (7, 2, 1), (64, 0, 1), (7, 0, 3), (20, 2, 2)]:
        seen = read(make(batch_size=batch_size, num_workers=workers, mix=mix), 3, processes)
        assert len(seen) >= 60
        for index, row in seen.items():
            assert all(torch.equal(*pair) for pair in zip(row, expected[index], strict=True))


@every
@both
def test_partners_and_weights_depend_on_epoch_and_seed(make, mix):
    first = whole(training(make(seed=0, mix=mix)), 0)
    for other in (whole(training(make(seed=0, mix=mix)), 1), whole(training(make(seed=1, mix=mix)), 0)):
        assert torch.equal(first.index, other.index)
        same = (first.input == other.input).flatten(1).all(1).sum() + (first.mixed.weight == other.mixed.weight).sum()
        assert same < 0.35 * 2 * len(first.index)  # unmixed images in both epochs have a weight of 1


@both
def test_mixup_is_the_weighted_sum_of_augmented_images(make):
    dataset, plain = training(make(mix=Mixup())), training(make())
    batch = whole(dataset, 2)
    partner = partners(dataset, 2, batch.index)
    assert (partner != batch.index).all()
    own, other = (plain.batch(batch.version, index) for index in (batch.index, partner))
    weight = batch.mixed.weight[:, None, None, None]
    assert torch.equal(batch.input, own.input * weight + other.input * (1 - weight))
    assert torch.equal(batch.mixed.target, other.target)
    assert torch.equal(batch.target, own.target)


@both
def test_cutmix_pastes_a_box_of_the_partner(make):
    dataset, plain = training(make(mix=CutMix(0.7))), training(make())
    batch = whole(dataset, 2)
    own, other = (plain.batch(batch.version, index) for index in (batch.index, partners(dataset, 2, batch.index)))
    assert torch.equal(batch.mixed.target, other.target)
    assert torch.equal(batch.target, own.target)
    draws = uniform(dataset.seed, 2, batch.index, MIX + torch.arange(2)[:, None])
    height, width = batch.input.shape[2:]
    for i, (choice, place) in enumerate(zip(*draws, strict=True)):
        side = float(smaller_share(0.7, choice[2])) ** 0.5
        h, w = int(side * height), int(side * width)
        top, left = int(place[0] * height) - h // 2, int(place[1] * width) - w // 2
        rows, columns = slice(max(top, 0), max(top + h, 0)), slice(max(left, 0), max(left + w, 0))
        expected, remains = own.input[i].clone(), torch.ones(height, width)
        expected[:, rows, columns], remains[rows, columns] = other.input[i, :, rows, columns], 0
        assert torch.equal(batch.input[i], expected)
        assert batch.mixed.weight[i] == remains.double().mean().float()


def boxes(alpha=1.0, size=(16, 20), count=20_000):
    """Apply CutMix to black images and white partners; return boxes `(B, H, W)`, weights and drawn areas."""
    draws = uniform(0, 0, torch.arange(count), torch.arange(2)[:, None])
    black = torch.zeros(count, 1, *size)
    share = smaller_share(alpha, draws[0, :, 2])
    image, own = CutMix(alpha).blend(black, black + 1, share, draws[1])
    return image.squeeze(1), own, share


def test_cutmix_boxes_have_uniform_centers_and_at_most_the_drawn_area():
    box, own, share = boxes()
    assert torch.equal(own, (1 - box.double().mean((1, 2))).float())
    assert (1 - own <= share).all()
    assert own.min() >= 0.5
    height, width = box.any(2).sum(1), box.any(1).sum(1)
    assert torch.equal(height * width, box.sum((1, 2)).long())  # each is a box
    inner = (height == (share.sqrt() * 16).long()) & (width == (share.sqrt() * 20).long())
    assert 0.2 < inner.double().mean() < 0.8
    small = (share.sqrt() * 16).long() == 1
    centre = box[small & (width == 1)].mean(0)
    assert centre.sum().item() == pytest.approx(1.0)
    assert torch.allclose(box.mean(0), box.mean(0).flip(0, 1), atol=0.02)


@pytest.mark.parametrize("alpha", [0.02, 0.05, 0.2, 0.5, 1.0, 1.05, 1.5, 2.0, 8.0, 32.0, 100.0, 1000.0])
def test_shares_are_quantiles_of_the_beta_distribution(alpha):
    draw = torch.cat((torch.arange(0, 1, 1 / 50_001), 2.0 ** -torch.arange(1, 25), 1 - 2.0 ** -torch.arange(1, 25)))
    share = smaller_share(alpha, draw.clamp(max=1 - 2**-24))
    assert share.dtype == torch.float64
    assert 0 <= share.min() <= share.max() <= 0.5
    assert (share[:50_000].diff() >= 0).all()
    probability = 2 * torch.from_numpy(stats.beta.cdf(share.numpy(), alpha, alpha))
    accuracy = 1e-7 if 0.05 <= alpha <= 100 else 1e-6
    assert (probability - draw.clamp(max=1 - 2**-24)).abs().max() < accuracy


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_weights_follow_the_folded_beta_distribution(alpha):
    dataset = training(DigitsDataModule(mix=Mixup(alpha)))
    weight = torch.cat([whole(dataset, epoch).mixed.weight for epoch in range(3)]).numpy()
    assert len(weight) > 3000
    assert weight.min() >= 0.5
    assert weight.max() <= 1
    drawn = stats.beta.rvs(alpha, alpha, size=20_000, random_state=0)
    folded = np.maximum(drawn, 1 - drawn).astype(np.float32)  # weights are float32: many round to 1
    assert stats.ks_2samp(weight, folded).pvalue > 0.01


@pytest.mark.parametrize("own", [0, 4, 10])
def test_all_partners_are_equally_likely(own):
    dataset = training(SyntheticDataModule(11, (1, 4, 4), train_size=11, val_size=0, mix=Mixup()))
    found = dataset.batch(torch.arange(6000), torch.full((6000,), own)).mixed.target.bincount(minlength=11)
    assert found[own] == 0
    assert torch.cat((found[:own], found[own + 1 :])).min() > 500


def test_partners_are_training_images():
    dataset = training(in_memory(mix=Mixup()))
    found = torch.cat([partners(dataset, epoch, dataset.index) for epoch in range(30)])
    assert set(found.tolist()) == set(dataset.index.tolist())
    assert len(dataset) < 170


def test_single_image_is_its_own_partner():
    dataset = training(SyntheticDataModule(1, (1, 4, 4), train_size=1, val_size=0, mix=CutMix()))
    plain = training(SyntheticDataModule(1, (1, 4, 4), train_size=1, val_size=0))
    assert torch.equal(dataset[0].input, plain[0].input)


@pytest.mark.parametrize("kind", [Mixup, CutMix])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_unmixed_images_are_unchanged_and_have_no_partner(kind, p):
    batch, plain = (whole(training(DigitsDataModule(mix=mix))) for mix in (kind(p=p), None))
    alone = batch.mixed.target == IGNORE_INDEX
    assert (~alone).double().mean().item() == pytest.approx(p, abs=0.05)
    assert (batch.mixed.weight[alone] == 1).all()
    assert torch.equal(batch.input[alone], plain.input[alone])
    for name in ("target", "index", "version"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))


def test_unlabelled_partners():
    dataset = training(DigitsDataModule(label_size=100, mix=Mixup()))
    batch = whole(dataset)
    partner = partners(dataset, 0, batch.index)
    assert torch.equal(batch.mixed.target, dataset.target[partner])
    assert 900 < (batch.mixed.target == IGNORE_INDEX).sum() < len(dataset)


@every
def test_each_view_is_mixed_with_separate_draws(mix):
    dataset = training(in_memory(mix=mix, views=StrongView(SHUFFLED)))
    plain = training(in_memory(views=StrongView(SHUFFLED)))
    batch, size = whole(dataset, 1), len(dataset)
    weight, target = batch.mixed.weight.chunk(2), batch.mixed.target.chunk(2)
    assert (weight[0] != weight[1]).double().mean() > 0.4
    for number in range(2):
        view = dataset.variant(number).batch(torch.ones_like(dataset.index), dataset.index)
        assert torch.equal(batch.input[number * size :][:size], view.input)
        assert torch.equal(weight[number], view.mixed.weight)
        partner = partners(dataset, 1, dataset.index, number)
        both = target[number] != IGNORE_INDEX
        assert torch.equal(target[number][both], dataset.target[partner][both])
        if isinstance(mix, Mixup):
            other = plain.variant(number).batch(torch.ones_like(partner), partner).input
            own = plain.variant(number).batch(torch.ones_like(partner), dataset.index).input
            share = weight[number][:, None, None, None]
            assert torch.allclose(view.input, own * share + other * (1 - share))


def test_rotated_and_partner_views_contain_their_mixing_targets():
    for views, number in ((RotatedViews(), 4), (ClassPartner(), 2)):
        module = SyntheticDataModule(4, (3, 9, 9), train_size=100, mix=Mixup(), views=views)
        batch = whole(training(module))
        assert batch.views == number
        assert len(batch.mixed.weight) == len(batch.mixed.target) == len(batch.target) == len(batch.input)
        assert ((batch.target == IGNORE_INDEX).sum() / len(batch.target)).item() == pytest.approx(1 - 1 / number)


def test_views_that_are_not_mixed():
    class Clean(StrongView):
        def plan(self, seed, epoch, index, classes):
            return [View(index), View(index, 1, is_mixed=False)]

    first, second = (part.chunk(2) for part in whole(training(in_memory(mix=Mixup(), views=Clean()))).mixed)
    assert (first[0] >= 0).all()
    assert (first[1] == IGNORE_INDEX).all()
    assert (second[0] < 1).all()
    assert (second[1] == 1).all()


@every
def test_evaluation_is_not_mixed(mix):
    datamodule, plain = in_memory(mix=mix, batch_size=10), in_memory(batch_size=10)
    for each in (datamodule, plain):
        each.setup("fit")
        each.setup("test")
    for name in ("val", "test", "predict"):
        batch, expected = (next(iter(getattr(each, f"{name}_dataloader")())) for each in (datamodule, plain))
        assert batch.mixed is None
        assert torch.equal(batch.input, expected.input)


@every
def test_dataset_can_be_pickled_for_workers(mix):
    dataset = training(in_memory(mix=mix))
    before, after = whole(dataset), whole(pickle.loads(pickle.dumps(dataset)))
    assert torch.equal(before.input, after.input)
    assert torch.equal(before.mixed.weight, after.mixed.weight)


def test_stored_images_are_not_modified():
    dataset = training(in_memory(mix=CutMix()))
    before = dataset.stored.clone()
    whole(dataset)
    assert torch.equal(dataset.stored, before)


def test_streams_do_not_meet():
    """Transforms, mixing and reading use disjoint streams, for the maximum number of views."""
    used = {ORDER, SPLIT, PARTNER}
    last = (IMAGE // VIEW) - 2  # the last view whose streams for reading an image stay below the largest stream
    for number in (0, 1, 2, 3, last):
        own = {number * VIEW + stream for stream in (*range(200), *range(MIX, MIX + 2))}
        own |= {IMAGE + number * VIEW + stream for stream in range(10)}
        assert len(own) == 212
        assert not own & used
        used |= own
    assert max(used) < 2**32


def test_own_mix():
    class Halves(Mix):
        alpha, p = 1.0, 1.0

        def blend(self, image, partner, share, draws):
            half = image.shape[3] // 2
            return torch.cat((image[..., : half + 1], partner[..., half + 1 :]), 3), torch.full((len(image),), 4 / 7)

    class Given(SyntheticDataModule):
        def make_dataset(self, split):
            levels = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).expand(30, 3, 9, 7)
            return TensorDataset(levels.contiguous(), torch.arange(30) % 4)

    dataset = training(Given(4, (3, 9, 7), val_size=0, mix=Halves()))
    batch = whole(dataset)
    level = (batch.input[:, 0, 0] * 0.25 + 0.5) * 255
    partner = partners(dataset, 0, batch.index)
    assert torch.allclose(level[:, :4], batch.index[:, None].float().expand(-1, 4), atol=1e-3)
    assert torch.allclose(level[:, 4:], partner[:, None].float().expand(-1, 3), atol=1e-3)
    assert torch.equal(batch.mixed.target, partner % 4)


@pytest.mark.parametrize(
    ("make_mix", "message"),
    [
        (lambda: Mixup(0.0), "Mixup: alpha must be greater than 0, got 0.0; to disable mixing, remove Mixup"),
        (lambda: CutMix(float("inf")), "CutMix: alpha must be greater than 0, got inf"),
        (lambda: CutMix(p=1.5), "CutMix: the probability p must be between 0 and 1, got 1.5"),
    ],
)
def test_invalid_settings(make_mix, message):
    with pytest.raises(ValueError, match=message):
        make_mix()
