"""Base class of the data modules: splits, data loaders, seeds and checks."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lkd import devices
from lkd.datamodules.batch_graph import BatchGraph
from lkd.datamodules.dataset import ImageDataset
from lkd.datamodules.dataset_factory import DatasetFactory
from lkd.datamodules.draws import SUBSET, permutation
from lkd.datamodules.extra import ExtraImages
from lkd.datamodules.labels import check_sizes, choose_labelled, read_targets
from lkd.datamodules.limits import is_limited
from lkd.datamodules.loader import Loader, identity
from lkd.datamodules.placement import Placement
from lkd.datamodules.sampler import EpochSampler
from lkd.datamodules.sources import ImageSource, join
from lkd.datamodules.split import stratified
from lkd.datamodules.transforms.base import BatchTransform, CenterCrop, ImageTransform, divide
from lkd.datamodules.transforms.mixing import Mix
from lkd.datamodules.transforms.views import Views
from lkd.types import IGNORE_INDEX, Batch, Normalization

Split = Literal["train", "val", "test"]


class ImageDataModule(L.LightningDataModule, ABC):
    """Base class of data modules with images for training, validation and test.

    Subclasses set the attributes below and override `make_dataset`. Validation images are held out from the training
    images, unless `make_dataset("val")` returns some. Order and augmentation are a function of (seed, epoch, index of
    the image), independent of the batch size and the number of workers and processes. If the trainer limits the number
    of validation or test batches, they contain a random subset, which depends only on `split_seed` and is hence the
    same in every epoch and run. Predictions are in the order of the dataset.

    Images that are not in memory and are resized without randomness are decoded once, if they fit. Decoded image files
    are cached on disk (`$LKD_CACHE`, by default `~/.cache/lkd`); the cache may be deleted at any time. Images in memory
    that require at most a quarter of the free memory of a GPU are copied to it, and batches are created there.

    Args:
        batch_size: Number of images per batch in each process.
        num_workers: Number of processes that load images; by default 0 for images in memory, otherwise up to 4.
        val_size: Fraction (below 1) or number of training images held out for validation, stratified by class; 0 for
            none.
        label_size: Fraction (below 1) or number of training images that keep their label, stratified by class; 1.0 for
            all, 0 for none.
        drop_unlabelled: Whether to exclude training images without a label. Otherwise they remain and are supervised by
            the teacher alone.
        split_seed: Seed of the splits above. It is independent of the run's seed, so that teacher and students use the
            same split.
        seed: Seed of the order and the augmentation; by default the seed of the run.
        augment: Augmentation of training images; by default the usual one for the dataset, `[]` for none.
        mean: Mean of each channel for pixels in [0, 1]; by default that of the dataset.
        std: Standard deviation of each channel; by default that of the dataset.
        views: Views of each training image in a batch; by default a single one.
        mix: Mixing of each training image with another one (`Mixup`, `CutMix`); by default none.
        resident_limit: Maximum size in bytes of a dataset that is decoded once and held in memory instead of being
            decoded in every epoch; 0 disables this.
        unreadable: What to do with image files that cannot be read: `fail` raises an error when such a file is
            encountered; `skip` excludes these files before training, and the other images keep their index.
        labels_per_class: Number of training images per class that keep their label; an alternative to `label_size`.
        extra: Additional training images from another source (`UnlabelledFolder`, `DeepInversion`). With `label_size` 0
            and `drop_unlabelled`, they replace those of the dataset.

    Attributes:
        num_classes: Number of classes.
        class_names: Names of the classes; by default their numbers.
        input_shape: Channels, height and width of an image.
        resize: Deterministic transform of images of a different size to `input_shape`.
        datasets: Datasets of the splits, after `setup`.
        uses_graphs: Whether training batches on a GPU are created by replaying a graph; the next batch then overwrites
            them. `Speed` sets it if training steps are graphs.

    Raises:
        ValueError: If `batch_size` or the label settings are invalid; in `setup`, if labels or splits are invalid.
    """

    num_classes: int
    class_names: tuple[str, ...] = ()
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: ImageTransform = CenterCrop()
    uses_graphs: bool = False
    _dataset_class: type[ImageDataset] = ImageDataset

    def __init__(
        self,
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
        resident_limit: int = 4 * 2**30,
        unreadable: Literal["fail", "skip"] = "fail",
        labels_per_class: int | None = None,
        extra: ExtraImages | None = None,
    ) -> None:
        super().__init__()
        check_sizes(batch_size, label_size, labels_per_class)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_size = val_size
        self.label_size, self.labels_per_class = label_size, labels_per_class
        self.drop_unlabelled = drop_unlabelled
        self.split_seed, self.seed = split_seed, seed
        self.augment, self.views, self.mix = augment, views, mix
        self.resident_limit, self.unreadable = resident_limit, unreadable
        self.extra = extra
        if mean is not None:
            self.mean = mean
        if std is not None:
            self.std = std
        self.datasets: dict[Split, ImageDataset] = {}
        self._placement = Placement()
        self._batch_graph: BatchGraph | None = None

    @abstractmethod
    def make_dataset(self, split: Split) -> ImageSource | None:
        """Open the images of a split.

        Args:
            split: "train", "val" or "test".

        Returns:
            Dataset of (image, class), see `ImageSource`. If `None` for "val", validation images are split from "train".
        """

    def default_augment(self) -> list[ImageTransform | BatchTransform]:
        """Return the usual augmentation of this dataset."""
        return []

    def prepare_data(self) -> None:
        """Decode image files in one process per machine. In `setup`, all processes then read the cached result."""
        if self.trainer is not None and self.trainer.world_size > 1 and self.trainer.state.fn is not None:
            self.setup(self.trainer.state.fn)

    def setup(self, stage: str) -> None:
        """Open the splits that a stage needs. Splits that are open already are not opened again.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        for name in ("num_classes", "input_shape", "mean", "std"):
            if not hasattr(self, name):
                raise TypeError(f"{type(self).__name__} must set the attribute {name}")
        if len(self.mean) != self.input_shape[0]:
            raise ValueError(f"mean has {len(self.mean)} values, but images have {self.input_shape[0]} channels")
        self.class_names = self.class_names or tuple(str(c) for c in range(self.num_classes))
        if stage in ("fit", "validate") and "train" not in self.datasets:
            self._setup_train(stage)
        if stage in ("test", "predict") and "test" not in self.datasets:
            images = self._open("test")
            self.datasets["test"] = self._factory.whole("test", *images)
        for dataset in self.datasets.values():  # on every call, as the seed may differ between runs of a program
            dataset.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def teardown(self, stage: str) -> None:
        """Release the GPU memory."""
        self._placement.clear()
        self._batch_graph = None

    @property
    def whole_shape(self) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of images without random cropping: in evaluation, and in training without a random crop."""
        return self.input_shape

    @property
    def num_samples(self) -> int | None:
        """Number of images to which `Batch.index` refers; `None` before the training images are opened."""
        return len(self.datasets["train"].target) if "train" in self.datasets else None

    @property
    def train_index(self) -> Tensor | None:
        """Positions of the training images `(N,)` in the source, as in `Batch.index`; `None` before they are opened."""
        return self.datasets["train"].index if "train" in self.datasets else None

    @property
    def num_labelled(self) -> int | None:
        """Number of training images with a label; `None` before they are opened."""
        data = self.datasets.get("train")
        return None if data is None else int((data.target[data.index] != IGNORE_INDEX).sum())

    def _setup_train(self, stage: str) -> None:
        source, target = self._open("train")
        factory = self._factory  # after make_dataset, which may set the class names
        usable = factory.readable("train", source, target)
        held_out = torch.zeros(len(target), dtype=torch.bool)
        val = self.make_dataset("val")
        if val is None and self.val_size != 0:
            known = target.masked_fill(~usable, IGNORE_INDEX)
            held_out[stratified(known, self.val_size, self.split_seed)] = True
        val_target = None if val is None else self._targets("val", val)
        augment = self.default_augment() if self.augment is None else self.augment
        labelled = choose_labelled(target, ~held_out & usable, self.label_size, self.labels_per_class, self.split_seed)
        kept = target.masked_fill(~held_out & ~labelled, IGNORE_INDEX)
        chosen = labelled if self.drop_unlabelled else ~held_out & usable
        decoded = divide(augment)[0] is None  # otherwise a random crop needs the full-size image
        needed = usable if chosen.any() else held_out
        if decoded and needed.any():
            source = factory.resident(source, target, needed)
        if val is not None and val_target is not None:
            self.datasets["val"] = factory.whole("val", val, val_target)
        elif self.val_size != 0:
            self.datasets["val"] = factory.dataset(source, target, held_out)
        if self.extra is None or stage == "fit":  # evaluation does not need the extra images
            training = self._with_extra(source, kept, chosen, decoded)
            self.datasets["train"] = factory.dataset(*training, augment, self.views, self.mix)

    def _with_extra(
        self, source: ImageSource, target: Tensor, chosen: Tensor, decoded: bool
    ) -> tuple[ImageSource, Tensor, Tensor]:
        """Add the extra images. Return the source, its classes `(N,)` and which images are used `(N,)`."""
        if self.extra is None and not chosen.any():
            raise ValueError(
                f"{type(self).__name__} has no training images: none keeps its label, and drop_unlabelled is on; turn "
                "it off, increase label_size, or provide extra images"
            )
        if self.extra is None:
            return source, target, chosen
        device = _gpu(self.trainer) or torch.device("cpu")
        more = self.extra.images(self.input_shape, self.num_classes, Normalization(self.mean, self.std), device)
        classes = self._targets("extra", more)
        usable = self._factory.readable("extra", more, classes)
        if decoded:
            more = self._factory.resident(more, classes, usable)
        if not chosen.any():
            return more, classes, usable
        joined = join(source, more, self.input_shape if decoded else None)
        return joined, torch.cat((target, classes)), torch.cat((chosen, usable))

    @property
    def _factory(self) -> DatasetFactory:
        return DatasetFactory(
            self._dataset_class,
            self.class_names,
            self.input_shape,
            self.whole_shape,
            self.resize,
            Normalization(self.mean, self.std),
            self.resident_limit,
            self.unreadable,
            self._decoders(),
        )

    def _decoders(self) -> int:
        processes = self.trainer.world_size if self.trainer else 1
        return max(1, (os.cpu_count() or 1) // processes) if self.num_workers is None else self.num_workers

    def _open(self, split: Split) -> tuple[ImageSource, Tensor]:
        source = self.make_dataset(split)
        if source is None:
            raise ValueError(f"{type(self).__name__}.make_dataset({split!r}) must return a dataset, got None")
        return source, self._targets(split, source)

    def _targets(self, split: str, source: ImageSource) -> Tensor:
        return read_targets(source, self.num_classes, f"the {split} split of {type(self).__name__}")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to a device. A batch already there is returned at once, as Lightning's check takes 0.1 ms."""
        if isinstance(batch, Batch) and getattr(batch.input, "device", None) == device:
            return batch
        if self.trainer is None:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return self.trainer.lightning_module.transfer_batch_to_device(batch, device, dataloader_idx)

    def _dataset(self, split: Split) -> ImageDataset:
        if split not in self.datasets:
            raise ValueError(f"{type(self).__name__} has no {split} images yet; call prepare_data() and setup()")
        return self.datasets[split]

    def _loader(
        self,
        dataset: ImageDataset,
        training: bool = False,
        padded: bool = True,
        order: Tensor | None = None,
        persistent: bool = True,
    ) -> DataLoader[Batch]:
        if not self.num_workers and (gpu := _gpu(self.trainer)) is not None:
            dataset = self._placement.place(dataset, gpu)
        processes, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = EpochSampler(dataset, processes, rank, training, dataset.seed, padded, order)
        workers = self.num_workers
        if workers is None:
            workers = 0 if isinstance(dataset.source, TensorDataset) else min(4, os.cpu_count() or 1)
        loader = Loader(
            dataset,
            batch_size=self.batch_size,  # as a keyword, because Lightning passes it again for predict
            sampler=sampler,
            num_workers=workers,
            collate_fn=identity,
            pin_memory=devices.pins_memory() and dataset.index.is_cpu,
            persistent_workers=workers > 0 and persistent,
            generator=torch.Generator(),  # draws the workers' seeds, so that the global generator is not advanced
            # A last batch of a single image would break BatchNorm, and compiled steps need a fixed shape. The dropped
            # images differ between epochs.
            drop_last=training and len(sampler) >= self.batch_size,
        )
        loader.trainer = self.trainer if training else None
        if training and self.uses_graphs and (capture := devices.step_capture(dataset.index.device)):
            self._batch_graph = loader.graph = BatchGraph(dataset, capture, self.batch_size)
        return loader

    def _evaluation_loader(self, split: Literal["val", "test"]) -> DataLoader[Batch]:
        """Return the loader of a split; limited evaluations use a random order, as images are often stored by class."""
        dataset, order = self._dataset(split), None
        if is_limited(self.trainer, split):
            order = permutation(self.split_seed, 0, len(dataset), SUBSET)
        return self._loader(dataset, order=order)

    def is_static(self, batch: Batch) -> bool:
        """Return whether a batch is the one that each replay of a graph overwrites, at a fixed memory address.

        Args:
            batch: A batch.
        """
        return self._batch_graph is not None and self._batch_graph.batch is batch

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of training images: augmented, shuffled, in full batches if there is at least one."""
        return self._loader(self._dataset("train"), training=True)

    def plain_train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of training images in dataset order, without augmentation, views or mixing."""
        training = self._dataset("train")
        chosen = torch.zeros(len(training.target), dtype=torch.bool).index_fill_(0, training.index, True)
        dataset = self._factory.dataset(training.source, training.target, chosen)
        dataset.seed = training.seed
        return self._loader(dataset, persistent=False)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the loader of validation images, or an empty list if `val_size` is 0."""
        opened = "train" in self.datasets or not self.val_size
        return [] if opened and "val" not in self.datasets else self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of test images."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of test images; with several processes, each image is predicted by exactly one."""
        return self._loader(self._dataset("test"), padded=False)


def _gpu(trainer: L.Trainer | None) -> torch.device | None:
    """Return the GPU of this process, or `None` if it has none."""
    device = getattr(getattr(trainer, "strategy", None), "root_device", None)
    return device if device is not None and devices.is_gpu(device) else None
