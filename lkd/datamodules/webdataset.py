"""Images that are streamed from tar shards, by WebDataset."""

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
"""The number of an image, of which its draws are a function: its shard's number times the first, and its place in it.

Where shards are read again in the same epoch, the shard's number is higher by a multiple of the second.
"""


class WebDatasetDataModule(L.LightningDataModule):
    """Images streamed by WebDataset from tar shards of `<name>.(jpg|jpeg|png|webp)` and `<name>.cls`, a number.

    Shards are a folder with `*.tar` in it, or paths and URLs in brace notation (`train-{0000..0099}.tar`); a path may
    have `*` and `?`. Other members are not read: no pickle of a shard is ever loaded.

    In training each process and each of its workers has shards of its own, other ones in every epoch, and draws the
    order from `shuffle_size` images. An epoch is `train_size` images, in equally many batches in each process; a worker
    that has seen its shards by then begins them again, and one that has more leaves the rest out. The order is a
    function of (seed, epoch, number of processes and workers), an image's augmentation one of (seed, epoch, image)
    alone. A run that is resumed in mid-epoch sees the beginning of that epoch again. In evaluation each process reads
    all shards, and decodes its share of the images: each counts once. Where the trainer limits the batches, the first
    ones are measured, so each shard should hold images of all classes.

    Training images have no index: criteria that need one (CRD), and `teacher_cache`, refuse them.

    Args:
        train: Shards of the training images.
        num_classes: Number of classes.
        train_size: Images in an epoch of training, in all processes together.
        test: Shards of the test images.
        val: Shards of the validation images; without, there is no validation.
        image_size: Height and width that images are brought to.
        in_channels: 3 for colour, 1 for gray.
        crop_ratio: Share of an image's shorter side that is evaluated, at its centre; images that have the
            size already are taken whole.
        batch_size: Images in a batch, in each process.
        num_workers: Processes that read, at most one for each shard; by default up to 4.
        shuffle_size: Images that each worker holds, encoded, to draw the next one from.
        seed: Seed of order and augmentation; by default the run's.
        augment: Random changes of training images; by default RandomResizedCrop and RandomHorizontalFlip.
        mean: Mean of each channel, of pixels in [0, 1]; by default ImageNet's.
        std: Standard deviation of each channel; by default ImageNet's.
        views: Which views of each training image a batch has; by default the image alone. No `ClassPartner`.
        mix: How each training image is mixed with another one of its batch; by default not at all.
        class_names: Names of the classes; by default their numbers.

    Attributes:
        input_shape: Channels, height and width of an image.
        resize: How images of another size are brought to `input_shape`, without randomness.
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
                raise ValueError(f"{name} must be 1 or more, got {size}")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names, but there are {num_classes} classes")
        if isinstance(views, ClassPartner):
            raise ValueError("ClassPartner chooses among all images of a class, and a stream does not know them")
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
        """Finds the shards that a stage needs.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        require_webdataset()
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            pattern = self.patterns[split]
            if pattern is None and (split != "val" or stage == "validate"):
                raise ValueError(f"WebDatasetDataModule has no {split} images; give their shards as `{split}`")
            self.shards[split] = () if pattern is None else find_shards(pattern)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training images, augmented and shuffled, in full batches."""
        processes, rank = self._processes()
        shards, steps = self._of("train"), self.train_size // (self.batch_size * processes)
        if len(shards) < processes:
            raise ValueError(f"{processes} processes need a training shard each, got {len(shards)}: write smaller ones")
        if steps == 0:
            raise ValueError(
                f"train_size {self.train_size} is no full batch of {self.batch_size} in each of {processes} processes: "
                "set a smaller batch_size"
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
        """Validation images; no loader if there are none."""
        return self._evaluated("val", self._workers()) if self._of("val") else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test images."""
        return self._evaluated("test", self._workers())

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Test images, each in one process, read by one worker: so in the shards' order, and with an index."""
        return self._evaluated("test", min(1, self._workers()), padded=False)

    def _evaluated(self, split: str, workers: int, padded: bool = True) -> DataLoader[Batch]:
        shards = self._of(split)
        dataset = _Evaluation(shards, self._images(), self.num_classes, self.batch_size, *self._processes())
        dataset.padded = padded
        return self._loader(dataset, min(workers, len(shards)))

    def _loader(self, dataset: _Stream, workers: int) -> _Loader:
        generator = torch.Generator()  # of the workers' seeds, so that they leave the global one alone
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
    """The images of one batch at a time, by their numbers."""

    def of(self, epoch: int, samples: dict[int, Sample]) -> Batch:
        """Makes the batch of some samples."""
        self.source, self.index = ImageBytes(samples), torch.tensor(list(samples))
        return self.make(torch.full_like(self.index, epoch), self.index)

    def unmixed(self, epoch: Tensor, index: Tensor) -> Batch:
        """See `ImageDataset.unmixed`; the classes stand beside the images."""
        samples = cast("ImageBytes", self.source).samples
        target = torch.tensor([samples[number][2] for number in index.tolist()])
        return Batch(self.view(self.images(epoch, index), epoch, index), target, index, version=epoch)


class _Stream(IterableDataset[Batch]):
    """Batches from shards.

    Args:
        shards: Paths and URLs.
        images: Makes batches.
        num_classes: Number of classes.
        batch_size: Images in a batch.
        processes: Number of processes.
        rank: Number of this one.

    Attributes:
        steps: Number of batches, of all workers together; None if nobody knows.
        epoch: Decides order and augmentation.
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
        """Number and content of each sample of some shards, read for the first time or again."""
        for number in numbers:
            samples = read_shard(self.shards[number], self.num_classes, IGNORE_INDEX)
            yield from enumerate(samples, (turn * _TURN + number) * _SHARD)


class _Training(_Stream):
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
    padded = True

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _worker()
        share = self._share(enumerate(s for _, s in self.read(range(worker, len(self.shards), workers))))
        while batch := dict(islice(share, self.batch_size)):
            made = self.images.of(0, batch)
            yield made if workers == 1 else made._replace(index=None, version=None)

    def _share(self, samples: Iterator[tuple[int, Sample]]) -> Iterator[tuple[int, Sample]]:
        """Of every `processes` samples this process's; padding, without a label, if the last are fewer.

        So all processes have as many batches: one that had less would leave the others waiting for it.
        """
        while group := list(islice(samples, self.processes)):
            if self.rank < len(group):
                yield group[self.rank]
            elif self.padded:
                number, sample = group[0]
                yield number, sample._replace(label=IGNORE_INDEX)


class _Loader(DataLoader[Batch]):
    """Knows the length of a stream, and tells it the epoch.

    Workers start anew in each epoch, when the first batch is asked for: they get the epoch with the data set.
    """

    trainer: L.Trainer | None = None

    def __len__(self) -> int:
        steps = cast("_Stream", self.dataset).steps
        if steps is None:
            raise TypeError("nobody knows how many samples there are in shards")
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
    """Number of this worker, and how many there are."""
    info: Any = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
