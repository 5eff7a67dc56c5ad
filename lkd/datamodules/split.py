"""Selection of training images: for validation, and those that keep their label."""

from __future__ import annotations

import torch
from torch import Tensor

from lkd.datamodules.draws import SPLIT, permutation
from lkd.types import IGNORE_INDEX


def stratified(
    target: Tensor,
    size: int | float,
    seed: int,
    setting: str = "val_size",
    parts: tuple[str, ...] = ("validation", "training"),
) -> Tensor:
    """Choose samples at random, from each class in proportion to its size.

    Remainders are assigned, one sample each, to the classes with the largest fractional parts. Samples without a label
    are never chosen.

    Args:
        target: Classes `(N,)`, int64.
        size: Number of samples to choose, or their fraction if it is below 1.
        seed: Seed of the choice.
        setting: Name of the size in error messages.
        parts: Names of the chosen and the remaining part in error messages; each named part must contain a sample of
            every class.

    Returns:
        Positions of the chosen samples `(M,)`, int64, sorted.

    Raises:
        ValueError: If a class would have no sample in a named part.
    """
    labelled = (target != IGNORE_INDEX).nonzero().squeeze(1)
    classes, member, count = torch.unique(target[labelled], return_inverse=True, return_counts=True)
    total, whole = len(labelled), round(size * len(labelled)) if size < 1 else int(size)
    if not 0 < whole < total or (size > 1 and size != whole):
        raise ValueError(
            f"{setting} must be a fraction between 0 and 1, or a number of images below {total} (the images with a "
            f"label), got {size}"
        )
    quota = whole * count // total
    largest = (whole * count % total).argsort(descending=True, stable=True)
    quota[largest[: whole - int(quota.sum())]] += 1
    for part, name in zip((quota, count - quota), parts, strict=False):
        if int(part.min()) == 0:
            worst = int(part.argmin())
            raise ValueError(
                f"{setting} {size} leaves no {name} image of class {int(classes[worst])}, which has "
                f"{int(count[worst])} of the {total} images; change {setting} or add images"
            )
    return labelled[_first(member, count, quota, seed)]


def of_each_class(target: Tensor, number: int, seed: int) -> Tensor:
    """Choose the same number of samples of each class at random. Smaller choices with the same seed are subsets.

    Args:
        target: Classes `(N,)`, int64; samples without a label are never chosen.
        number: Number of samples of each class.
        seed: Seed of the choice.

    Returns:
        Positions of the chosen samples `(M,)`, int64, sorted.

    Raises:
        ValueError: If the number is less than 1, or a class has fewer samples.
    """
    labelled = (target != IGNORE_INDEX).nonzero().squeeze(1)
    classes, member, count = torch.unique(target[labelled], return_inverse=True, return_counts=True)
    least = int(count.min()) if len(count) else 0
    if not 1 <= number <= least:
        rarest = f"class {int(classes[count.argmin()])} has {least}" if least else "none has a label"
        raise ValueError(
            "labels_per_class must be between 1 and the number of training images of the smallest class "
            f"({rarest}), got {number}"
        )
    return labelled[_first(member, count, torch.full_like(count, number), seed)]


def _first(member: Tensor, count: Tensor, quota: Tensor, seed: int) -> Tensor:
    """Return the sorted positions of the first samples of each class in a random order.

    Args:
        member: Group number of each sample's class `(N,)`.
        count: Number of samples of each class `(K,)`.
        quota: Number of samples to take of each class `(K,)`.
        seed: Seed of the order.
    """
    order = permutation(seed, 0, len(member), SPLIT)
    by_class = order[member[order].argsort(stable=True)]
    group = member[by_class]
    rank = torch.arange(len(member)) - (count.cumsum(0) - count)[group]
    return by_class[rank < quota[group]].sort().values
