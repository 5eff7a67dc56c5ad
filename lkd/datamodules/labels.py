"""Labels of a dataset: reading and checking them, and choosing those that training uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lkd.datamodules.sources import ImageSource
from lkd.datamodules.split import of_each_class, stratified
from lkd.types import IGNORE_INDEX


def check_sizes(batch_size: int, label_size: int | float, labels_per_class: int | None) -> None:
    """Check settings of a data module.

    Args:
        batch_size: Number of images per batch, at least 1.
        label_size: Share or number of training images that keep their label.
        labels_per_class: Number of training images of each class that keep their label, instead of `label_size`.

    Raises:
        ValueError: If the batch size is less than 1, or both settings of labels are given.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if labels_per_class is not None and label_size != 1:
        raise ValueError(
            f"label_size {label_size} and labels_per_class {labels_per_class} cannot be combined; set only one of them"
        )


def choose_labelled(
    target: Tensor, training: Tensor, label_size: int | float, labels_per_class: int | None, seed: int
) -> Tensor:
    """Choose the training images that keep their label.

    Args:
        target: Class of each image `(N,)`, int64.
        training: Whether each image is a training image `(N,)`, bool.
        label_size: Share or number of the training images, stratified.
        labels_per_class: Number of images per class, instead of `label_size`.
        seed: Seed of the choice.

    Returns:
        Whether each image keeps its label `(N,)`, bool.
    """
    labelled = torch.zeros_like(training)
    if label_size == 0:
        return labelled
    if label_size == 1 and labels_per_class is None:
        return training & (target != IGNORE_INDEX)
    position = training.nonzero().squeeze(1)
    if labels_per_class is not None:
        chosen = of_each_class(target[position], labels_per_class, seed)
    else:
        chosen = stratified(target[position], label_size, seed, "label_size", ("labelled",))
    labelled[position[chosen]] = True
    return labelled


def read_targets(source: ImageSource, num_classes: int, where: str) -> Tensor:
    """Read the class of every image, without reading the images if the source has `targets`.

    Args:
        source: Source of the images.
        num_classes: Number of classes.
        where: Description of the source for error messages.

    Returns:
        Classes `(N,)`, int64.

    Raises:
        ValueError: If there are no images, or labels are out of range.
        TypeError: If images in memory are not uint8 `(N, C, H, W)`.
    """
    if len(source) == 0:
        raise ValueError(f"{where} has no images")
    found: Any
    if isinstance(source, TensorDataset):
        image, found = source.tensors
        if image.dtype != torch.uint8 or image.dim() != 4:
            got = f"{image.dtype} {tuple(image.shape)}"
            raise TypeError(f"{where} must have uint8 images (N, C, H, W), got {got}")
    elif hasattr(source, "targets"):
        found = source.targets
    else:
        found = [source[i][1] for i in range(len(source))]
    target = torch.as_tensor(found).to(torch.int64)
    wrong = target[((target < 0) | (target >= num_classes)) & (target != IGNORE_INDEX)]
    if len(wrong):
        raise ValueError(
            f"{where} has {len(wrong)} of {len(target)} labels outside the {num_classes} classes 0 to "
            f"{num_classes - 1}, such as {int(wrong[0])}; correct the labels or num_classes, or use "
            f"{IGNORE_INDEX} for images without a label"
        )
    return target
