"""Synthetic images, for tests and benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from lkd.datamodules.base import ImageDataModule, Split
from lkd.datamodules.extra import ExtraImages
from lkd.datamodules.transforms.base import BatchTransform, ImageTransform
from lkd.datamodules.transforms.mixing import Mix
from lkd.datamodules.transforms.views import Views


class SyntheticDataModule(ImageDataModule):
    """Synthetic images: a smooth pattern per class plus noise. They are the same in every run and easy to learn.

    Args:
        num_classes: Number of classes.
        input_shape: Channels, height and width.
        train_size: Number of training images, including those for validation.
        test_size: Number of test images.
        batch_size: Number of images per batch in each process.
        num_workers: Number of processes that load images; by default 0.
        val_size: Fraction (below 1) or number of training images held out for validation, stratified by class; 0 for
            none.
        label_size: Fraction (below 1) or number of training images that keep their label, stratified by class; 1.0 for
            all, 0 for none.
        drop_unlabelled: Exclude training images without a label. Otherwise they remain and are supervised by the
            teacher alone.
        split_seed: Seed of the splits above. It is independent of the run's seed, so that teacher and students use the
            same split.
        seed: Seed of the order and the augmentation; by default the seed of the run.
        augment: Augmentation of training images; by default none.
        mean: Mean of each channel for pixels in [0, 1].
        std: Standard deviation of each channel.
        views: Views of each training image in a batch; by default a single one.
        mix: Mixing of each training image with another one (`Mixup`, `CutMix`); by default none.
        labels_per_class: Number of training images per class that keep their label; an alternative to `label_size`.
        extra: Additional training images from another source (`UnlabelledFolder`, `DeepInversion`). With `label_size` 0
            and `drop_unlabelled`, they replace those of the dataset.
    """

    def __init__(
        self,
        num_classes: int = 10,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        train_size: int = 1000,
        test_size: int = 200,
        batch_size: int = 128,
        num_workers: int | None = None,
        val_size: int | float = 0.1,
        label_size: int | float = 1.0,
        drop_unlabelled: bool = False,
        split_seed: int = 0,
        seed: int | None = None,
        augment: list[ImageTransform | BatchTransform] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        views: Views | None = None,
        mix: Mix | None = None,
        labels_per_class: int | None = None,
        extra: ExtraImages | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.input_shape = input_shape
        self.mean, self.std = (0.5,) * input_shape[0], (0.25,) * input_shape[0]
        own = (batch_size, num_workers, val_size, label_size, drop_unlabelled, split_seed)
        shown = (seed, augment, mean, std, views, mix)
        super().__init__(*own, *shown, labels_per_class=labels_per_class, extra=extra)
        self.train_size = train_size
        self.test_size = test_size

    def make_dataset(self, split: Split) -> TensorDataset | None:
        """Generate the images of a split; see `ImageDataModule.make_dataset`."""
        if split == "val":
            return None
        size = self.train_size if split == "train" else self.test_size
        channels, height, width = self.input_shape
        coarse = torch.rand(self.num_classes, channels, 4, 4, generator=torch.Generator().manual_seed(0))
        smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        pattern = (smooth * 192).to(torch.uint8)
        generator = torch.Generator().manual_seed(1 if split == "train" else 2)
        noise = torch.randint(64, (size, *self.input_shape), dtype=torch.uint8, generator=generator)
        target = torch.arange(size) % self.num_classes
        return TensorDataset(noise.add_(pattern[target]), target)
