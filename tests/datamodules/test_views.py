"""Views of an image depend on (seed, epoch, index) only, and the first view is the image without views."""

import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset

from lkd.datamodules import (
    ClassPartner,
    DigitsDataModule,
    ImageFolderDataModule,
    Key,
    RandAugment,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RotatedViews,
    StrongView,
    SyntheticDataModule,
    Views,
)
from lkd.datamodules.dataset import without_labels
from lkd.datamodules.transforms.views import View
from lkd.types import IGNORE_INDEX, Batch
from tests.datamodules.sources import in_memory as any_in_memory

in_memory = partial(any_in_memory, (3, 9, 9))
VIEWS = {"strong": StrongView(), "rotated": RotatedViews(), "partner": ClassPartner()}
COUNT = {"strong": 2, "rotated": 4, "partner": 2}

CPU = SimpleNamespace(root_device=torch.device("cpu"))


both = pytest.mark.parametrize("make", ["square", "files"], indirect=True)
every = pytest.mark.parametrize("name", VIEWS)


def training(datamodule):
    datamodule.setup("fit")
    return datamodule.datasets["train"]


def views_by_index(batch):
    """Return `(views, C, H, W)`, targets and indices of each image's views, by the image's index."""
    size = len(batch.target) // batch.views
    rows = [part.reshape(batch.views, size, *part.shape[1:]).transpose(0, 1) for part in batch[:3]]
    return {int(index[0]): (image, target, index) for image, target, index in zip(*rows, strict=True)}


def read(datamodule, epoch, processes=1):
    """Return all images of one epoch in all processes, by index."""
    datamodule.setup("fit")
    seen = {}
    for rank in range(processes):
        datamodule.trainer = SimpleNamespace(world_size=processes, global_rank=rank, strategy=CPU)
        loader = datamodule.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            seen |= views_by_index(batch)
    return seen


def reference(datamodule, epoch):
    """Return the same images, read one at a time."""
    dataset = training(datamodule)
    found = {}
    for position in range(len(dataset)):
        found |= views_by_index(dataset[Key(epoch, position)])
    return found


def equal(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@every
@both
def test_images_do_not_depend_on_batch_size_workers_and_processes(make, name):
    expected = reference(make(views=VIEWS[name]), epoch=3)
    for batch_size, workers, processes in [(1, 0, 1), (7, 2, 1), (64, 0, 1), (7, 0, 3), (20, 2, 2)]:
        seen = read(make(batch_size=batch_size, num_workers=workers, views=VIEWS[name]), 3, processes)
        assert len(seen) >= 60
        assert all(equal(seen[index], expected[index]) for index in seen)


@every
@both
def test_views_depend_on_epoch_and_seed(make, name):
    first = reference(make(seed=0, views=VIEWS[name]), epoch=0)
    for other in (
        reference(make(seed=0, views=VIEWS[name]), epoch=1),
        reference(make(seed=1, views=VIEWS[name]), epoch=0),
    ):
        assert other.keys() == first.keys()
        for view in range(COUNT[name]):
            different = sum(not torch.equal(first[i][0][view], other[i][0][view]) for i in first)
            assert different > 0.9 * len(first)


@every
@both
def test_first_view_is_the_image_without_views(make, name):
    plain, views = (training(make(batch_size=16, views=v)) for v in (None, VIEWS[name]))
    keys = [Key(2, position) for position in range(16)]
    one, several = plain.__getitems__(keys), views.__getitems__(keys)
    assert (one.views, several.views) == (1, COUNT[name])
    assert len(several.input) == 16 * several.views
    assert equal(one[:3], [part[:16] for part in several[:3]])


@every
def test_evaluation_has_one_view(name):
    datamodule = in_memory(views=VIEWS[name], batch_size=10)
    datamodule.setup("fit")
    datamodule.setup("test")
    for loader in (datamodule.val_dataloader(), datamodule.test_dataloader(), datamodule.predict_dataloader()):
        batch = next(iter(loader))
        assert (batch.views, len(batch.input)) == (1, 10)


@every
def test_views_can_be_pickled_for_workers(name):
    dataset = training(in_memory(views=VIEWS[name]))
    keys = [Key(1, 3), Key(1, 5)]
    before = dataset.__getitems__(keys)
    assert equal(pickle.loads(pickle.dumps(dataset)).__getitems__(keys)[:3], before[:3])


def test_strong_view_applies_its_augmentation():
    images, labels = torch.randint(256, (30, 3, 8, 8), dtype=torch.uint8), torch.arange(30) % 3
    crop, flip, changes = RandomCrop(1), RandomHorizontalFlip(0.5), RandAugment(2, 10)

    class Given(SyntheticDataModule):
        def make_dataset(self, split):
            return TensorDataset(images, labels)

    def batch(**kwargs):
        made = Given(3, (3, 8, 8), val_size=0, augment=[crop, flip], **kwargs)
        return training(made).__getitems__([Key(0, position) for position in range(30)])

    default, listed = batch(views=StrongView()), batch(views=StrongView([crop, flip, changes]))
    assert torch.equal(default.input, listed.input)
    assert default.target.tolist() == default.index.remainder(3).tolist() == 2 * labels.tolist()
    assert default.index.tolist() == 2 * list(range(30))
    unchanged = batch(views=StrongView([])).input[30:]
    assert torch.equal(unchanged, (images / torch.tensor(255.0) - 0.5) / 0.25)
    again = batch(views=StrongView([crop, flip])).input
    assert sum(torch.equal(*pair) for pair in zip(*again.chunk(2), strict=True)) < 10  # the views use different draws


def test_strong_view_of_files_with_another_crop(write_tree):
    root = write_tree({"train": {"cat": 20, "dog": 20}, "test": {"cat": 2, "dog": 2}})

    def views(*augment):
        datamodule = ImageFolderDataModule(root, 24, num_workers=0, views=StrongView(list(augment)), augment=[])
        return training(datamodule).__getitems__([Key(0, position) for position in range(20)]).input.chunk(2)

    whole, same = views()
    assert torch.equal(whole, same)
    whole, cut = views(RandomResizedCrop())
    assert not any(torch.equal(*pair) for pair in zip(whole, cut, strict=True))


def test_rotated_views():
    batch = training(in_memory(views=RotatedViews())).__getitems__([Key(0, 3), Key(0, 4)])
    views, target = batch.input.unflatten(0, (4, 2)), batch.target.view(4, 2)
    for turn in range(4):
        assert torch.equal(views[turn], torch.rot90(views[0], turn, (2, 3)))
    assert (target[0] >= 0).all()
    assert (target[1:] == IGNORE_INDEX).all()
    assert batch.index.view(4, 2).unique(dim=0).shape == (1, 2)


def test_rotated_views_require_square_images():
    with pytest.raises(ValueError, match="must be square, got 9x7"):
        SyntheticDataModule(4, (3, 9, 7), views=RotatedViews()).setup("fit")
    SyntheticDataModule(4, (3, 9, 7), views=RotatedViews()).setup("test")


def partners(datamodule, epoch):
    """Return the partner's index of each image."""
    return {index: int(found[2][1]) for index, found in reference(datamodule, epoch).items()}


def test_partner_is_another_training_image_of_the_class():
    datamodule = in_memory(views=ClassPartner())
    by_epoch = [partners(datamodule, epoch) for epoch in range(30)]
    target = datamodule.datasets["train"].target
    every = set(datamodule.datasets["train"].index.tolist())
    chosen = {index: {found[index] for found in by_epoch} for index in every}
    for index, others in chosen.items():
        assert index not in others
        assert others <= every
        assert {int(target[other]) for other in others} == {int(target[index])}
    # 38 images in a class: with 37 possible partners, 30 draws find 20.7 on average
    assert 19 < sum(len(others) for others in chosen.values()) / len(every) < 22


def test_all_partners_are_equally_likely():
    dataset = training(SyntheticDataModule(2, (1, 4, 4), train_size=12, val_size=0, views=ClassPartner()))
    epoch, index = torch.arange(4000), torch.full((4000,), 4)
    counts = dataset.make(epoch, index).index[4000:].bincount(minlength=12)
    assert counts[[4, *range(1, 12, 2)]].sum() == 0
    assert counts[[0, 2, 6, 8, 10]].min() > 700


def test_partner_has_no_label_and_separate_draws():
    dataset = training(in_memory(views=ClassPartner()))
    batch = dataset.__getitems__([Key(0, position) for position in range(50)])
    assert (batch.target[50:] == IGNORE_INDEX).all()
    own = dataset.batch(torch.zeros(50, dtype=torch.int64), batch.index[50:]).input
    assert sum(torch.equal(*pair) for pair in zip(own, batch.input[50:], strict=True)) < 10


def test_single_image_is_its_own_partner():
    class Given(SyntheticDataModule):
        def make_dataset(self, split):
            target = torch.tensor([0, 1, 1, IGNORE_INDEX, IGNORE_INDEX, 3])
            return TensorDataset(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), target)

    assert partners(Given(4, (3, 8, 8), val_size=0, views=ClassPartner()), 0) == {0: 0, 1: 2, 2: 1, 3: 3, 4: 4, 5: 5}


def test_labelled_images_are_partners_of_each_other():
    datamodule = DigitsDataModule(label_size=40, views=ClassPartner())
    found = partners(datamodule, 0)
    labelled = (datamodule.datasets["train"].target != IGNORE_INDEX).nonzero().squeeze(1).tolist()
    assert len(found) > 1000
    training_images = set(labelled) & set(found)
    assert len(training_images) == 40
    for index, partner in found.items():
        assert (partner in training_images and partner != index) if index in training_images else partner == index


def test_own_views():
    class Twice(Views):
        def plan(self, seed, epoch, index, classes):
            return [View(index), View(index, 1)]

    batch = training(in_memory(views=Twice(), batch_size=8)).__getitems__([Key(0, 1)])
    assert isinstance(batch, Batch)
    assert batch.views == 2
    assert not torch.equal(*batch.input)


def test_crop_must_be_the_first_transform():
    with pytest.raises(ValueError, match="RandomResizedCrop must be the first transform"):
        StrongView([RandomCrop(1), RandomResizedCrop()])


def test_padding_is_unlabelled_in_all_views():
    batch = Batch(torch.zeros(4, 1), torch.arange(4), views=2)
    assert without_labels(batch, torch.tensor([False, True])).target.tolist() == [0, IGNORE_INDEX, 2, IGNORE_INDEX]
    assert without_labels(batch, torch.tensor([False, False])) is batch
