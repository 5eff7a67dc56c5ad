"""Images streamed from tar shards with WebDataset."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lkd import devices
from lkd.datamodules.dataset import ImageDataset
from lkd.datamodules.draws import permutation
from lkd.datamodules.files import ImageBytes
from lkd.datamodules.folder import IMAGENET_STATISTICS
from lkd.datamodules.shards import Sample, find_shards, read_shard, require_webdataset
from lkd.datamodules.transforms.base import (
    BatchTransform,
    CenterCrop,
    ImageTransform,
    RandomHorizontalFlip,
    RandomResizedCrop,
    divide,
)
from lkd.datamodules.transforms.mixing import Mix
from lkd.datamodules.transforms.views import ClassPartner, Views
from lkd.types import IGNORE_INDEX, Batch, Normalization

_SHARD, _TURN = 2**32, 2**20
"""Factors in the number of an image, which determines its random numbers: shard number * `_SHARD` + position in the
shard. Each time a shard is read again in the same epoch, `_TURN` is added to its number."""


class WebDatasetDataModule(L.LightningDataModule):
    """Images streamed from tar shards with WebDataset.

    A shard contains `<name>.(jpg|jpeg|png|webp)` and `<name>.cls`, a class number, for each image. Other members are
    not read, and no pickle is ever loaded. Shards are specified as a folder of `*.tar` files, or as paths and URLs in
    brace notation (`train-{0000..0099}.tar`); paths may contain `*` and `?`.

    In training, each worker of each process reads its own shards, which change in every epoch, and shuffles within a
    buffer of `shuffle_size` images. An epoch consists of `train_size` images, with the same number of batches in each
    process. Workers with fewer images repeat their shards; workers with more skip the rest. The order is a function of
    (seed, epoch, number of processes and workers), and the augmentation of an image is a function of (seed, epoch,
    image). A run that is resumed mid-epoch reads the first images of that epoch again.

    In evaluation, each process reads all shards and decodes its share of the images, so each image counts once. If the
    trainer limits the number of batches, the first ones are evaluated, so each shard should contain images of all
    classes.

    Training images have no index, so criteria that need one (`CRD`) and `teacher_cache` reject them.

    Args:
        train: Shards of the training images.
        num_classes: Number of classes.
        train_size: Number of images per training epoch over all processes.
        test: Shards of the test images.
        val: Shards of the validation images; `None` for no validation.
        image_size: Height and width to which images are resized.
        in_channels: 3 for color, 1 for grayscale.
        crop_ratio: Fraction of the shorter side that the center crop covers in evaluation; images that already have
            the size are not cropped.
        batch_size: Number of images per batch in each process.
        num_workers: Number of processes that load images, at most one per shard; by default up to 4.
        shuffle_size: Size of each worker's shuffle buffer, in encoded images.
        seed: Seed of the order and the augmentation; by default the seed of the run.
        augment: Augmentation of training images; by default RandomResizedCrop and RandomHorizontalFlip.
        mean: Mean of each channel for pixels in [0, 1]; by default that of ImageNet.
        std: Standard deviation of each channel; by default that of ImageNet.
        views: Views of each training image in a batch; by default a single one. `ClassPartner` is not supported.
        mix: Mixing of each training image with another one of its batch (`Mixup`, `CutMix`); by default none.
        class_names: Names of the classes; by default their numbers.

    Attributes:
        input_shape: Channels, height and width of an image.
        resize: Deterministic transform of images of a different size to `input_shape`.

    Raises:
        ValueError: If a size is less than 1, the numbers of class names and classes differ, or `views` require random
            access to images.
    """

    def __init__(
        self,
        train: str,
        num_classes: int,
        train_size: int,
        test: str | None = None,
        val: str | None = None,
        image_size: int = 224,
        in_channels: Literal[1, 3] = 3,
        crop_ratio: float = 0.875,
        batch_size: int = 128,
        num_workers: int | None = None,
        shuffle_size: int = 1000,
        seed: int | None = None,
        augment: list[ImageTransform | BatchTransform] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        views: Views | None = None,
        mix: Mix | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "train_size": train_size, "image_size": image_size}
        for name, size in {**sizes, "batch_size": batch_size, "shuffle_size": shuffle_size}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names, but there are {num_classes} classes")
        if isinstance(views, ClassPartner):
            raise ValueError("ClassPartner requires random access to images, which shards lack; use other views")
        self.patterns = {"train": train, "val": val, "test": test}
        self.num_classes, self.train_size = num_classes, train_size
        self.batch_size, self.num_workers, self.shuffle_size = batch_size, num_workers, shuffle_size
        self.seed, self.augment, self.views, self.mix = seed, augment, views, mix
        self.class_names = tuple(class_names or map(str, range(num_classes)))
        self.input_shape = (in_channels, image_size, image_size)
        self.resize = CenterCrop(crop_ratio)
        self.mean, self.std = _statistics(in_channels, mean, std)
        self.shards: dict[str, tuple[str, ...]] = {}

    def setup(self, stage: str) -> None:
        """Find the shards that a stage needs.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        require_webdataset()
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            pattern = self.patterns[split]
            if pattern is None and (split != "val" or stage == "validate"):
                raise ValueError(f"WebDatasetDataModule has no {split} images; specify their shards as `{split}`")
            self.shards[split] = () if pattern is None else find_shards(pattern)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of training images: augmented, shuffled, in full batches."""
        processes, rank = self._processes()
        shards, steps = self._of("train"), self.train_size // (self.batch_size * processes)
        if len(shards) < processes:
            raise ValueError(
                f"each of {processes} processes needs its own training shard, got {len(shards)}; split the data into "
                "more shards"
            )
        if steps == 0:
            raise ValueError(
                f"train_size {self.train_size} is less than one full batch of {self.batch_size} in each of {processes} "
                "processes; decrease batch_size"
            )
        usual: list[ImageTransform | BatchTransform] = [RandomResizedCrop(), RandomHorizontalFlip()]
        augment = usual if self.augment is None else self.augment
        images = self._images(augment, self.views, self.mix)
        dataset = _Training(shards, images, self.num_classes, self.batch_size, processes, rank)
        dataset.steps, dataset.shuffle_size = steps, self.shuffle_size
        loader = self._loader(dataset, min(self._workers(), len(shards) // processes))
        loader.trainer = self.trainer
        return loader

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the loader of validation images, or an empty list if there are none."""
        return self._evaluated("val", self._workers()) if self._of("val") else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of test images."""
        return self._evaluated("test", self._workers())

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of test images in the order of the shards, with an index, read by at most one worker.

        With several processes, each image is predicted by exactly one.
        """
        return self._evaluated("test", min(1, self._workers()), padded=False)

    def _evaluated(self, split: str, workers: int, padded: bool = True) -> DataLoader[Batch]:
        shards = self._of(split)
        dataset = _Evaluation(shards, self._images(), self.num_classes, self.batch_size, *self._processes())
        dataset.padded = padded
        return self._loader(dataset, min(workers, len(shards)))

    def _loader(self, dataset: _Stream, workers: int) -> _Loader:
        generator = torch.Generator()  # draws the workers' seeds, so that the global generator is not advanced
        pinned = devices.pins_memory()
        return _Loader(dataset, batch_size=None, num_workers=workers, pin_memory=pinned, generator=generator)

    def _images(
        self,
        augment: Sequence[ImageTransform | BatchTransform] = (),
        views: Views | None = None,
        mix: Mix | None = None,
    ) -> _Held:
        first, changes = divide(augment)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        none = torch.zeros(0, dtype=torch.int64)
        statistics = Normalization(self.mean, self.std)
        resize = first or self.resize
        return _Held(ImageBytes({}), none, none, self.input_shape, statistics, resize, changes, seed, views, mix)

    def _of(self, split: str) -> tuple[str, ...]:
        if split not in self.shards:
            raise ValueError(f"WebDatasetDataModule has no {split} shards yet; call setup()")
        return self.shards[split]

    def _processes(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _workers(self) -> int:
        return min(4, os.cpu_count() or 1) if self.num_workers is None else self.num_workers


class _Held(ImageDataset):
    """Dataset of the images of one batch at a time, addressed by their numbers."""

    def of(self, epoch: int, samples: dict[int, Sample]) -> Batch:
        """Create the batch of some samples."""
        self.source, self.index = ImageBytes(samples), torch.tensor(list(samples))
        return self.make(torch.full_like(self.index, epoch), self.index)

    def unmixed(self, epoch: Tensor, index: Tensor) -> Batch:
        """Read, augment and normalize images; see `ImageDataset.unmixed`. The classes are stored with the images."""
        samples = cast("ImageBytes", self.source).samples
        target = torch.tensor([samples[number][2] for number in index.tolist()])
        return Batch(self.view(self.images(epoch, index), epoch, index), target, index, version=epoch)


class _Stream(IterableDataset[Batch]):
    """Batches from shards.

    Args:
        shards: Paths and URLs.
        images: Dataset that creates batches.
        num_classes: Number of classes.
        batch_size: Number of images per batch.
        processes: Number of processes.
        rank: Rank of this process.

    Attributes:
        steps: Number of batches of all workers together; `None` if it is unknown.
        epoch: Epoch, which determines order and augmentation.
    """

    def __init__(
        self,
        shards: Sequence[str],
        images: _Held,
        num_classes: int,
        batch_size: int,
        processes: int,
        rank: int,
    ) -> None:
        self.shards, self.images, self.num_classes, self.batch_size = tuple(shards), images, num_classes, batch_size
        self.processes, self.rank = processes, rank
        self.steps: int | None = None
        self.epoch = 0

    def read(self, numbers: Sequence[int], turn: int = 0) -> Iterator[tuple[int, Sample]]:
        """Yield number and content of each sample of some shards; `turn` counts how often they were read before."""
        for number in numbers:
            samples = read_shard(self.shards[number], self.num_classes, IGNORE_INDEX)
            yield from enumerate(samples, (turn * _TURN + number) * _SHARD)


class _Training(_Stream):
    """Shuffled training batches of the shards of each worker."""

    shuffle_size = 1

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _worker()
        order = permutation(self.images.seed, self.epoch, len(self.shards))
        own = order[self.rank :: self.processes][worker::workers].tolist()
        samples = chain.from_iterable(self._shuffled(own, worker, turn) for turn in count())
        for _ in range(worker, self.steps or 0, workers):
            batch = dict(islice(samples, self.batch_size))
            yield self.images.of(self.epoch, batch)._replace(index=None, version=None)

    def _shuffled(self, numbers: Sequence[int], worker: int, turn: int) -> Iterator[tuple[int, Sample]]:
        from webdataset.filters import shuffle

        own = random.Random(f"{self.images.seed} {self.epoch} {self.rank} {worker} {turn}")
        shuffled: Any = shuffle(bufsize=self.shuffle_size, initial=self.shuffle_size, rng=own)
        yield from shuffled(self.read(numbers, turn))


class _Evaluation(_Stream):
    """Evaluation batches in the order of the shards; each process returns its share of the images."""

    padded = True

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _worker()
        share = self._share(enumerate(s for _, s in self.read(range(worker, len(self.shards), workers))))
        while batch := dict(islice(share, self.batch_size)):
            made = self.images.of(0, batch)
            yield made if workers == 1 else made._replace(index=None, version=None)

    def _share(self, samples: Iterator[tuple[int, Sample]]) -> Iterator[tuple[int, Sample]]:
        """Yield one of every `processes` samples. If the last ones are fewer, yield padding without a label.

        All processes thus have the same number of batches; otherwise some would wait for the others forever.
        """
        while group := list(islice(samples, self.processes)):
            if self.rank < len(group):
                yield group[self.rank]
            elif self.padded:
                number, sample = group[0]
                yield number, sample._replace(label=IGNORE_INDEX)


class _Loader(DataLoader[Batch]):
    """Data loader with the length of a stream, which passes the epoch to the stream.

    Workers are restarted in each epoch when the first batch is requested, and receive the epoch with the dataset.
    """

    trainer: L.Trainer | None = None

    def __len__(self) -> int:
        steps = cast("_Stream", self.dataset).steps
        if steps is None:
            raise TypeError("the number of samples in shards is unknown")
        return steps

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self.trainer is not None:
            cast("_Stream", self.dataset).epoch = self.trainer.current_epoch
        yield from super().__iter__()


def _statistics(
    in_channels: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    usual = IMAGENET_STATISTICS[in_channels]
    chosen = mean or usual[0], std or usual[1]
    if len(chosen[0]) != in_channels:
        raise ValueError(f"mean has {len(chosen[0])} values, but images have {in_channels} channels")
    return chosen


def _worker() -> tuple[int, int]:
    """Return the number of this worker and the number of workers."""
    info: Any = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
