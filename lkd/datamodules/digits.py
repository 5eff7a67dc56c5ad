"""Handwritten digits of 8x8 pixels, bundled with scikit-learn; no download required."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

from lkd.datamodules.base import ImageDataModule, Split
from lkd.datamodules.split import stratified
from lkd.datamodules.transforms.base import BatchTransform, ImageTransform, RandomCrop


class DigitsDataModule(ImageDataModule):
    """Digits: 1,797 grayscale images of handwritten digits, 8x8 pixels; a fixed, stratified fifth is the test set.

    References:
        Alpaydin, Kaynak: Optical recognition of handwritten digits (UCI machine learning repository, 1998).
    """

    num_classes = 10
    class_names = tuple("0123456789")
    input_shape = (1, 8, 8)
    mean = (0.3057,)
    std = (0.3762,)

    def default_augment(self) -> list[ImageTransform | BatchTransform]:
        """Return shifts by up to one pixel. Flips are omitted because they change the digit."""
        return [RandomCrop(padding=1)]

    def make_dataset(self, split: Split) -> TensorDataset | None:
        """Open the images of a split; see `ImageDataModule.make_dataset`."""
        from sklearn.datasets import load_digits

        if split == "val":
            return None
        digits = load_digits()
        image = torch.as_tensor(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
        target = torch.as_tensor(digits.target)
        test = torch.zeros(len(target), dtype=torch.bool)
        test[stratified(target, 0.2, seed=0)] = True
        chosen = test if split == "test" else ~test
        return TensorDataset(image[chosen], target[chosen])
