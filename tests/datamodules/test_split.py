import pytest
import torch

from lkd.datamodules.split import of_each_class, stratified
from lkd.types import IGNORE_INDEX


def targets(*counts):
    target = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    return target[torch.randperm(len(target), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("counts", "size", "expected"),
    [
        ((100, 100, 100), 0.1, (10, 10, 10)),
        ((100, 200, 300), 0.05, (5, 10, 15)),
        ((100, 200, 300), 60, (10, 20, 30)),
        ((10, 10, 10), 7, (3, 2, 2)),  # the remaining image goes to the first of equal classes
        ((55, 25, 20), 10, (6, 2, 2)),  # 5.5, 2.5, 2.0
        ((13, 18, 29), 0.25, (3, 5, 7)),  # 3.25, 4.5, 7.25
    ],
)
def test_classes_are_stratified(counts, size, expected):
    target = targets(*counts)
    chosen = stratified(target, size, seed=0)
    assert tuple(target[chosen].bincount().tolist()) == expected
    assert torch.equal(chosen, chosen.unique())


def test_choice_depends_only_on_the_seed_and_is_uniform():
    target = targets(40, 40)
    assert torch.equal(stratified(target, 0.25, 3), stratified(target, 0.25, 3))
    counts = torch.zeros(80)
    for seed in range(400):
        counts[stratified(target, 0.25, seed)] += 1
    assert counts.min() > 60  # 100 expected, standard deviation 8.7
    assert counts.max() < 140


def test_unlabelled_samples_are_not_chosen():
    target = torch.cat((targets(20, 20), torch.full((60,), IGNORE_INDEX)))
    chosen = stratified(target, 0.5, 0)
    assert target[chosen].bincount().tolist() == [10, 10]


@pytest.mark.parametrize("size", [-0.1, -3, 30, 31, 2.5, 0.001, 0.999])
def test_invalid_sizes(size):
    message = f"val_size must be a fraction between 0 and 1, .* below 30 .* got {size}"
    with pytest.raises(ValueError, match=message):
        stratified(targets(15, 15), size, 0)


def test_class_without_validation_images():
    with pytest.raises(ValueError, match="val_size 5 leaves no validation image of class 1, which has 2 of the 52"):
        stratified(targets(50, 2), 5, 0)


def test_class_without_training_images():
    with pytest.raises(ValueError, match=r"val_size 0.9 leaves no training image of class 0, which has 1 of the 51"):
        stratified(targets(1, 50), 0.9, 0)


def test_label_size():
    from lkd import SyntheticDataModule

    def training(**settings):
        data = SyntheticDataModule(num_classes=4, input_shape=(3, 8, 8), train_size=200, val_size=40, **settings)
        data.setup("fit")
        dataset = data.datasets["train"]
        return dataset.index, dataset.target[dataset.index], data.datasets["val"].target

    index, target, val = training(label_size=20)
    assert len(index) == 160
    assert target[target != IGNORE_INDEX].bincount().tolist() == [5, 5, 5, 5]
    assert (val != IGNORE_INDEX).all()
    few, labels, _ = training(label_size=20, drop_unlabelled=True)
    assert torch.equal(few, index[target != IGNORE_INDEX])
    assert torch.equal(labels, target[target != IGNORE_INDEX])
    assert torch.equal(training(label_size=20, seed=5)[1], target)
    assert not torch.equal(training(label_size=20, split_seed=5)[1], target)
    assert (training()[1] != IGNORE_INDEX).all()
    with pytest.raises(ValueError, match="label_size 3 leaves no labelled image of class 3"):
        training(label_size=3)


def test_labels_per_class_are_nested():
    target = torch.cat((targets(9, 40, 20), torch.full((30,), IGNORE_INDEX)))
    many, few, other = (of_each_class(target, number, seed) for number, seed in ((7, 0), (3, 0), (3, 1)))
    assert target[many].bincount().tolist() == [7, 7, 7]
    assert set(few.tolist()) < set(many.tolist())
    assert torch.equal(few, few.unique())
    assert not torch.equal(few, other)
    assert torch.equal(of_each_class(targets(5, 5), 5, 0), torch.arange(10))


@pytest.mark.parametrize(("number", "rarest"), [(0, "class 0 has 3"), (4, "class 0 has 3"), (1, "none has a label")])
def test_too_many_labels_per_class(number, rarest):
    target = torch.full((4,), IGNORE_INDEX) if "none" in rarest else targets(3, 5)
    with pytest.raises(ValueError, match=rf"training images of the smallest class \({rarest}\), got {number}"):
        of_each_class(target, number, 0)
