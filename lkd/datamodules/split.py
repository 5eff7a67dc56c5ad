"""Choosing images from the training set: those for validation, those that keep their label."""

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
    """Chooses samples at random, from each class in proportion to its size.

    What does not divide goes, one sample each, to the classes with the largest remainders. Samples without a
    label are never chosen.

    Args:
        target: Classes `(N,)`, int64.
        size: Number of samples to choose, or their share if it is below 1.
        seed: Seed of the choice.
        setting: What the size is called in messages.
        parts: What the chosen ones and the others are called in messages; a part that is named must have a sample of
            each class.

    Returns:
        Positions of the chosen samples `(M,)`, int64, sorted.

    Raises:
        ValueError: If a class would get no sample in a part that is named.
    """
    labelled = (target != IGNORE_INDEX).nonzero().squeeze(1)
    classes, member, count = torch.unique(target[labelled], return_inverse=True, return_counts=True)
    total, whole = len(labelled), round(size * len(labelled)) if size < 1 else int(size)
    if not 0 < whole < total or (size > 1 and size != whole):
        raise ValueError(
            f"{setting} must be a fraction between 0 and 1 or a number of images below the {total} "
            f"training images with a label, got {size}"
        )
    quota = whole * count // total
    largest = (whole * count % total).argsort(descending=True, stable=True)
    quota[largest[: whole - int(quota.sum())]] += 1
    for part, name in zip((quota, count - quota), parts, strict=False):
        if int(part.min()) == 0:
            worst = int(part.argmin())
            raise ValueError(
                f"{setting} {size} leaves no {name} image of class {int(classes[worst])}, which has "
                f"{int(count[worst])} of the {total} images; choose another {setting} or add images"
            )
    order = permutation(seed, 0, total, SPLIT)
    by_class = order[member[order].argsort(stable=True)]
    group = member[by_class]
    rank = torch.arange(total) - (count.cumsum(0) - count)[group]
    return labelled[by_class[rank < quota[group]].sort().values]
