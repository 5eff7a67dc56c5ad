"""Base class of data modules with images and boxes."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lkd import devices
from lkd.datamodules.base import Split
from lkd.datamodules.boxes import BoxDataset, BoxSource
from lkd.datamodules.draws import SPLIT, SUBSET, permutation
from lkd.datamodules.limits import Evaluated, is_limited
from lkd.datamodules.loader import Loader, identity
from lkd.datamodules.sampler import EpochSampler
from lkd.types import Batch


class DetectionDataModule(L.LightningDataModule, ABC):
    """Base class of data modules with images and boxes, for `lkd.tasks.Detection`.

    Subclasses set the attributes below and override `make_boxes`. Batches are lists of images `(C, H_i, W_i)` with
    pixels in [0, 1], which may differ in size, and lists of dicts with `boxes` and `labels`. Detectors normalize and
    resize images themselves. Order and flips are a function of (seed, epoch, index of the image), independent of the
    batch size and the number of workers and processes.

    Args:
        batch_size: Number of images per batch in each process.
        num_workers: Number of processes that load images; by default 0 for images in memory, otherwise up to 4.
        val_size: Fraction (below 1) or number of training images held out for validation, at random; 0 for none.
            Ignored if `make_boxes("val")` returns images.
        flip: Probability that a training image is flipped horizontally.
        split_seed: Seed of the validation split. It is independent of the run's seed, so that teacher and students use
            the same split.
        seed: Seed of the order and the flips; by default the seed of the run.

    Attributes:
        num_classes: Number of classes, including class 0, the background.
        class_names: Names of the classes, starting with that of the background.
        input_shape: Channels, height and width of a typical image, with which the networks are checked.
        datasets: Datasets of the splits, after `setup`.

    Raises:
        ValueError: If a setting is out of range.
    """

    num_classes: int
    class_names: tuple[str, ...] = ()
    input_shape: tuple[int, int, int]

    def __init__(
        self,
        batch_size: int = 16,
        num_workers: int | None = None,
        val_size: int | float = 0.1,
        flip: float = 0.5,
        split_seed: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if val_size < 0 or not 0 <= flip <= 1:
            raise ValueError(f"val_size must be at least 0 and flip in [0, 1], got {val_size} and {flip}")
        self.batch_size, self.num_workers, self.val_size = batch_size, num_workers, val_size
        self.flip, self.split_seed, self.seed = flip, split_seed, seed
        self.datasets: dict[Split, BoxDataset] = {}

    @abstractmethod
    def make_boxes(self, split: Split) -> BoxSource | None:
        """Open the images and boxes of a split.

        Args:
            split: "train", "val" or "test".

        Returns:
            Images and boxes. If `None` for "val", validation images are split from "train".
        """

    def category_id(self, label: int) -> int:
        """Return the id of a class in saved detections: the class index, unless the data defines ids."""
        return label

    def image_id(self, position: int) -> int:
        """Return the id of a test image in saved detections: its position, unless the data defines ids."""
        return position

    def setup(self, stage: str) -> None:
        """Open the splits that a stage needs. Splits that are open already are not opened again.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        if stage in ("fit", "validate") and "train" not in self.datasets:
            self._setup_train()
        if stage in ("test", "predict") and "test" not in self.datasets:
            self.datasets["test"] = self._whole("test")
        for dataset in self.datasets.values():  # on every call, as the seed may differ between runs of a program
            dataset.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def _setup_train(self) -> None:
        train, val = self._whole("train", self.flip), self.make_boxes("val")
        if val is not None:
            self._check("val", val)
            self.datasets["val"] = BoxDataset(val, torch.arange(len(val.images)))
        elif self.val_size:
            total = len(train)
            held_out = round(self.val_size * total) if self.val_size < 1 else int(self.val_size)
            if not 0 < held_out < total:
                raise ValueError(
                    f"val_size must be a fraction between 0 and 1, or a number of images below {total}, got "
                    f"{self.val_size}"
                )
            order = permutation(self.split_seed, 0, total, SPLIT)
            self.datasets["val"] = BoxDataset(train.source, order[:held_out].sort().values)
            train.index = order[held_out:].sort().values
        if not len(train.source.labels):
            rank_zero_warn("no training image has a box; check the annotations")
        self.datasets["train"] = train

    def _whole(self, split: Split, flip: float = 0.0) -> BoxDataset:
        source = self.make_boxes(split)
        if source is None:
            raise ValueError(f"{type(self).__name__} has no {split} images; use another data module or subcommand")
        self._check(split, source)
        return BoxDataset(source, torch.arange(len(source.images)), flip)

    def _check(self, split: Split, source: BoxSource) -> None:
        wrong = source.labels[(source.labels < 1) | (source.labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(
                f"the {split} split of {type(self).__name__} has a box of class {int(wrong[0])}, but the classes "
                f"of objects are 1 to {self.num_classes - 1}, and 0 is the background; correct the labels"
            )

    def _loader(self, split: Split, shuffled: bool = False) -> DataLoader[Batch]:
        if split not in self.datasets:
            raise ValueError(f"{type(self).__name__} has no {split} images yet; call prepare_data() and setup()")
        dataset, training = self.datasets[split], split == "train"
        order = permutation(self.split_seed, 0, len(dataset), SUBSET) if shuffled else None
        processes, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if len(dataset) < processes:
            raise ValueError(
                f"the {split} split has {len(dataset)} images for {processes} processes; use fewer processes"
            )
        # In evaluation, each image is assigned to one process only, because a repeated image would count twice.
        sampler = EpochSampler(dataset, processes, rank, training, dataset.seed, training, order)
        workers = self.num_workers
        if workers is None:
            workers = 0 if isinstance(dataset.source.images, list) else min(4, os.cpu_count() or 1)
        loader = Loader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=identity,
            pin_memory=devices.pins_memory(),
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # draws the workers' seeds, so that the global generator is not advanced
            drop_last=training and len(sampler) >= self.batch_size,
        )
        loader.trainer = self.trainer if training else None
        return loader

    def _evaluation_loader(self, split: Evaluated) -> DataLoader[Batch]:
        """Return the loader of a split; limited evaluations use a random order, as images are often stored by class."""
        return self._loader(split, shuffled=is_limited(self.trainer, split))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of training images, shuffled and flipped at random.

        An incomplete last batch is dropped, unless it is the only one.
        """
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the loader of validation images, or an empty list if there are none."""
        return self._evaluation_loader("val") if "val" in self.datasets else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of test images."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of test images."""
        return self._loader("test")
