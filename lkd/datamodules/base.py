"""What all data modules share: splits, loaders, seeds and checks."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from lkd import devices
from lkd.datamodules.batch_graph import BatchGraph
from lkd.datamodules.dataset import ImageDataset, without_labels
from lkd.datamodules.decoding import resident
from lkd.datamodules.draws import SUBSET, permutation
from lkd.datamodules.extra import ExtraImages
from lkd.datamodules.files import ImageFiles, few
from lkd.datamodules.limits import is_limited
from lkd.datamodules.sampler import EpochSampler
from lkd.datamodules.sources import ImageSource, join
from lkd.datamodules.split import of_each_class, stratified
from lkd.datamodules.transforms.base import Augmentation, BatchTransform, CenterCrop, ImageTransform, divide
from lkd.datamodules.transforms.mixing import Mix
from lkd.datamodules.transforms.views import Views
from lkd.datamodules.unreadable import readable
from lkd.types import IGNORE_INDEX, Batch, Normalization

Split = Literal["train", "val", "test"]


class ImageDataModule(L.LightningDataModule, ABC):
    """Images for training, validation and test.

    A concrete one sets the attributes below and overrides `make_dataset`. Validation images are cut from the
    training images, unless `make_dataset("val")` returns some. Order and augmentation are a function of
    (seed, epoch, index of the image), whatever the batch size and the number of workers and processes. Where the
    trainer limits the batches of validation or test, they hold a random choice of the images, which depends on
    `split_seed` alone: it is the same in every epoch and every run. Predictions keep the data set's order.

    Images that are not in memory, and are brought to size without randomness, are decoded once, if they fit. Image
    files are then kept decoded in the cache folder (`$LKD_CACHE`, by default `~/.cache/lkd`); what is there may be
    deleted at any time. On a GPU, images in memory that take no more than a quarter of what is free there are copied to
    it, and batches are made there.

    Args:
        batch_size: Images in a batch, in each process.
        num_workers: Processes that read images; by default none for data in memory, else up to 4.
        val_size: Share (below 1) or number of training images held out for validation, by class; 0: none.
        label_size: Share (below 1) or number of training images that keep their label, by class; 1.0: all, 0: none.
        drop_unlabelled: Leave the others out of training; otherwise they stay, without a label, for the teacher.
        split_seed: Seed of these choices; not the run's, so that teacher and students agree.
        seed: Seed of order and augmentation; by default the run's.
        augment: Random changes of training images; by default the data set's usual ones, `[]` for none.
        mean: Mean of each channel, of pixels in [0, 1]; by default the data set's.
        std: Standard deviation of each channel; by default the data set's.
        views: Which views of each training image a batch has; by default the image alone.
        mix: How each training image is mixed with another one; by default not at all.
        resident_limit: Bytes that images may take for them to be decoded once, instead of in every epoch; 0: never.
        unreadable: Whether an image file that cannot be read ends the run, when it is met (`fail`), or is left out
            before the training (`skip`); the other images keep their index.
        labels_per_class: In place of `label_size`: how many training images of each class keep their label.
        extra: Training images from elsewhere, beside the data set's own; with `label_size` 0 and `drop_unlabelled`
            instead of them. See `UnlabelledFolder`, `DeepInversion`.

    Attributes:
        num_classes: Number of classes.
        class_names: Their names; their numbers if not given.
        input_shape: Channels, height and width of an image.
        resize: How images of another size are brought to `input_shape`, without randomness.
        datasets: The data sets of the splits, after `setup`.
        uses_graphs: Whether training batches that are made on a GPU are made by replaying a graph, in memory that the
            next batch overwrites. `Speed` sets it where training steps are graphs.
    """

    num_classes: int
    class_names: tuple[str, ...] = ()
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: ImageTransform = CenterCrop()
    uses_graphs: bool = False

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
        _check_sizes(batch_size, label_size, labels_per_class)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_size = val_size
        self.label_size, self.labels_per_class = label_size, labels_per_class
        self.drop_unlabelled = drop_unlabelled
        self.split_seed = split_seed
        self.seed = seed
        self.augment = augment
        self.views = views
        self.mix = mix
        self.resident_limit, self.unreadable = resident_limit, unreadable
        self.extra = extra
        if mean is not None:
            self.mean = mean
        if std is not None:
            self.std = std
        self.datasets: dict[Split, ImageDataset] = {}
        self._on_device: dict[int, ImageSource] = {}
        self._batch_graph: BatchGraph | None = None

    @abstractmethod
    def make_dataset(self, split: Split) -> ImageSource | None:
        """Opens the images of a split.

        Args:
            split: Which ones.

        Returns:
            A data set of (image, class), see `ImageSource`; None for "val" to have it cut from "train".
        """

    def default_augment(self) -> list[ImageTransform | BatchTransform]:
        """The augmentation that is usual for this data set."""
        return []

    def prepare_data(self) -> None:
        """Decodes image files in one process of each machine, before `setup` in all: these find them kept."""
        if self.trainer is not None and self.trainer.world_size > 1 and self.trainer.state.fn is not None:
            self.setup(self.trainer.state.fn)

    def setup(self, stage: str) -> None:
        """Opens the splits that a stage needs, once.

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
            self.datasets["test"] = self._whole("test", *self._open("test"))
        for dataset in self.datasets.values():  # each time: the next run of a program may have another seed
            dataset.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def teardown(self, stage: str) -> None:
        """Frees the GPU's memory."""
        self._on_device.clear()
        self._batch_graph = None

    @property
    def num_samples(self) -> int | None:
        """Number of images that a batch's `index` counts; None before the training images are opened."""
        return len(self.datasets["train"].target) if "train" in self.datasets else None

    @property
    def train_index(self) -> Tensor | None:
        """Positions of the training images `(N,)` among those that `index` counts; None before they are opened."""
        return self.datasets["train"].index if "train" in self.datasets else None

    @property
    def num_labelled(self) -> int | None:
        """Number of training images that have a label; None before they are opened."""
        data = self.datasets.get("train")
        return None if data is None else int((data.target[data.index] != IGNORE_INDEX).sum())

    def _setup_train(self, stage: str) -> None:
        source, target = self._open("train")
        usable = self._readable("train", source, target)
        held_out = torch.zeros(len(target), dtype=torch.bool)
        val = self.make_dataset("val")
        if val is None and self.val_size != 0:
            known = target.masked_fill(~usable, IGNORE_INDEX)
            held_out[stratified(known, self.val_size, self.split_seed)] = True
        val_target = None if val is None else self._targets("val", val)
        augment = self.default_augment() if self.augment is None else self.augment
        labelled = self._labelled(target, ~held_out & usable)
        kept = target.masked_fill(~held_out & ~labelled, IGNORE_INDEX)
        chosen = labelled if self.drop_unlabelled else ~held_out & usable
        decoded = divide(augment)[0] is None  # else a random part of an image has to be cut out of the whole one
        needed = usable if chosen.any() else held_out
        if decoded and needed.any():
            source = self._resident(source, target, needed)
        if val is not None and val_target is not None:
            self.datasets["val"] = self._whole("val", val, val_target)
        elif self.val_size != 0:
            self.datasets["val"] = self._wrap(source, target, held_out)
        if self.extra is None or stage == "fit":  # to measure, none need be found or made
            training = self._with_extra(source, kept, chosen, decoded)
            self.datasets["train"] = self._wrap(*training, augment, self.views, self.mix)

    def _with_extra(
        self, source: ImageSource, target: Tensor, chosen: Tensor, decoded: bool
    ) -> tuple[ImageSource, Tensor, Tensor]:
        """Training images with those from elsewhere: the source, its classes `(N,)`, and which are taken `(N,)`."""
        if self.extra is None and not chosen.any():
            raise ValueError(
                f"no training image of {type(self).__name__} is left, as none keeps its label and drop_unlabelled is "
                "on; turn it off, raise label_size, or give extra images"
            )
        if self.extra is None:
            return source, target, chosen
        device = _gpu(self.trainer) or torch.device("cpu")
        more = self.extra.images(self.input_shape, self.num_classes, Normalization(self.mean, self.std), device)
        classes = self._targets("extra", more)
        usable = self._readable("extra", more, classes)
        if decoded:
            more = self._resident(more, classes, usable)
        if not chosen.any():
            return more, classes, usable
        joined = join(source, more, self.input_shape if decoded else None)
        return joined, torch.cat((target, classes)), torch.cat((chosen, usable))

    def _whole(self, split: Split, source: ImageSource, target: Tensor) -> ImageDataset:
        """All images of a split."""
        usable = self._readable(split, source, target)
        return self._wrap(self._resident(source, target, usable), target, usable)

    def _readable(self, split: str, source: ImageSource, target: Tensor) -> Tensor:
        """Which images are not left out `(N,)`, bool."""
        if self.unreadable == "fail" or type(source) is not ImageFiles:
            return torch.ones(len(target), dtype=torch.bool)
        whole = readable(self._wrap(source, target), self._decoders())
        if gone := sorted(set(target.tolist()) - set(target[whole].tolist())):
            names = few(["(none)" if number == IGNORE_INDEX else self.class_names[number] for number in gone])
            raise ValueError(f"no {split} image of the classes {names} in {source.folder} can be read; replace them")
        return whole

    def _resident(self, source: ImageSource, target: Tensor, usable: Tensor) -> ImageSource:
        """The source's images decoded, if that is of use and they fit; otherwise the source."""
        whole = self._wrap(source, target, usable)
        if whole.stored is not None or len(target) * math.prod(self.input_shape) > self.resident_limit:
            return source
        return resident(whole, self._decoders())

    def _decoders(self) -> int:
        processes = self.trainer.world_size if self.trainer else 1
        return max(1, (os.cpu_count() or 1) // processes) if self.num_workers is None else self.num_workers

    def _labelled(self, target: Tensor, training: Tensor) -> Tensor:
        """Which training images keep their label `(N,)`, bool."""
        labelled = torch.zeros_like(training)
        if self.label_size == 0:
            return labelled
        if self.label_size == 1 and self.labels_per_class is None:
            return training & (target != IGNORE_INDEX)
        position = training.nonzero().squeeze(1)
        if self.labels_per_class is not None:
            chosen = of_each_class(target[position], self.labels_per_class, self.split_seed)
        else:
            chosen = stratified(target[position], self.label_size, self.split_seed, "label_size", ("labelled",))
        labelled[position[chosen]] = True
        return labelled

    def _open(self, split: Split) -> tuple[ImageSource, Tensor]:
        source = self.make_dataset(split)
        if source is None:
            raise ValueError(f"{type(self).__name__}.make_dataset({split!r}) must return a data set, got None")
        return source, self._targets(split, source)

    def _targets(self, split: str, source: ImageSource) -> Tensor:
        """The class of every image, without reading the images if the source has `targets`."""
        where = f"the {split} split of {type(self).__name__}"
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
        wrong = target[((target < 0) | (target >= self.num_classes)) & (target != IGNORE_INDEX)]
        if len(wrong):
            raise ValueError(
                f"{where} has label {int(wrong[0])}, and {len(wrong)} of its {len(target)} labels are "
                f"outside the {self.num_classes} classes, 0 to {self.num_classes - 1}; correct the labels or "
                f"num_classes, or mark images without a label by {IGNORE_INDEX}"
            )
        return target

    def _wrap(
        self,
        source: ImageSource,
        target: Tensor,
        chosen: Tensor | None = None,
        augment: Augmentation = (),
        views: Views | None = None,
        mix: Mix | None = None,
    ) -> ImageDataset:
        first, changes = divide(augment)
        return ImageDataset(
            source,
            target,
            torch.arange(len(target)) if chosen is None else chosen.nonzero().squeeze(1),
            self.input_shape,
            Normalization(self.mean, self.std),
            first or self.resize,
            changes,
            views=views,
            mix=mix,
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch, unless it lies there already: to find that out costs Lightning a tenth of a millisecond."""
        if isinstance(batch, Batch) and getattr(batch.input, "device", None) == device:
            return batch
        if self.trainer is None:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return self.trainer.lightning_module.transfer_batch_to_device(batch, device, dataloader_idx)

    def _loader(self, split: Split, padded: bool = True, plain: bool = False) -> DataLoader[Batch]:
        if split not in self.datasets:
            raise ValueError(f"{type(self).__name__} has no {split} images yet; call prepare_data() and setup()")
        dataset = self.datasets[split]
        if plain:
            chosen = torch.zeros(len(dataset.target), dtype=torch.bool).index_fill_(0, dataset.index, True)
            seed, dataset = dataset.seed, self._wrap(dataset.source, dataset.target, chosen)
            dataset.seed = seed
        dataset = self._placed(dataset)
        processes, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        training = split == "train" and not plain
        order = self._limited_order(split) if padded else None
        sampler = EpochSampler(dataset, processes, rank, training, dataset.seed, padded, order)
        workers = self.num_workers
        if workers is None:
            workers = 0 if isinstance(dataset.source, TensorDataset) else min(4, os.cpu_count() or 1)
        loader = _Loader(
            dataset,
            batch_size=self.batch_size,  # by name, as Lightning repeats it for predict
            sampler=sampler,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=devices.pins_memory() and dataset.index.is_cpu,
            persistent_workers=workers > 0 and not plain,
            generator=torch.Generator(),  # of the workers' seeds, so that they leave the global one alone
            # A rest of one image would break BatchNorm, and compiled steps want one shape. Which images are
            # left out differs from epoch to epoch.
            drop_last=training and len(sampler) >= self.batch_size,
        )
        loader.trainer = self.trainer if training else None
        device = dataset.index.device
        if training and self.uses_graphs and (capture := devices.step_capture(device)):
            self._batch_graph = loader.graph = BatchGraph(dataset, capture, self.batch_size)
        return loader

    def _limited_order(self, split: Split) -> Tensor | None:
        """A random order `(N,)` where only the first batches are measured: in their own, images often lie by class."""
        if split == "train" or not is_limited(self.trainer, split):
            return None
        return permutation(self.split_seed, 0, len(self.datasets[split]), SUBSET)

    def is_static(self, batch: Batch) -> bool:
        """Whether a batch is one that each replay of a graph overwrites, always in the same memory.

        Args:
            batch: A batch.
        """
        return self._batch_graph is not None and self._batch_graph.batch is batch

    def _placed(self, dataset: ImageDataset) -> ImageDataset:
        """The data set, on the GPU if batches can be made there."""
        device, there = _gpu(self.trainer), self._on_device.get(id(dataset.source))
        if device is None or dataset.stored is None or self.num_workers:
            return dataset
        if there is None and 4 * dataset.stored.nbytes > devices.free_memory(device):
            return dataset
        placed = dataset.to(device, there)
        self._on_device[id(dataset.source)] = placed.source  # training and validation images have one source
        return placed

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training images, augmented and shuffled, in full batches unless there is but one."""
        return self._loader("train")

    def plain_train_dataloader(self) -> DataLoader[Batch]:
        """Training images as evaluation sees images: without augmentation, views and mixing, in their order."""
        return self._loader("train", plain=True)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Validation images; no loader if `val_size` is 0."""
        opened = "train" in self.datasets or not self.val_size
        return [] if opened and "val" not in self.datasets else self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test images."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Test images, each in one process."""
        return self._loader("test", padded=False)


def _check_sizes(batch_size: int, label_size: int | float, labels_per_class: int | None) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if labels_per_class is not None and label_size != 1:
        raise ValueError(
            f"label_size {label_size} and labels_per_class {labels_per_class} both say how many labels are kept; leave "
            "one of them out"
        )


class _Loader(DataLoader[Batch]):
    """Takes whole batches of an epoch where there are no workers; begins a resumed epoch where it was left.

    Workers start when the first batch is asked for: Lightning makes the iterator of a resumed run before it tells the
    sampler the epoch; workers that began to read then would read the first epoch again.
    """

    trainer: L.Trainer | None = None
    """Knows where a resumed epoch goes on, once its progress is restored: the loader may be made before that."""
    graph: BatchGraph | None = None
    """Makes full batches, where they are made on a GPU that replays graphs."""

    def state_dict(self) -> dict[str, Any]:
        """Tells Lightning that a run may be resumed in mid-epoch; its own count of batches is what counts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is to be loaded."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        begin = _batches_seen(self.trainer)
        size, sampler, dataset = self.batch_size or 0, self.sampler, self.dataset
        if isinstance(sampler, EpochSampler):
            sampler.begin = begin * size
        # Predict has a batch sampler that notes what it reads; users may have changed the rest.
        own = type(self.batch_sampler) is BatchSampler and self.collate_fn is _as_it_is
        direct = own and size and not (self.num_workers or self.pin_memory)
        if not (direct and type(sampler) is EpochSampler and type(dataset) is ImageDataset):
            yield from super().__iter__()
            return
        epoch, dealt = sampler.epoch, sampler.deal()
        # All positions of the epoch at once: a copy for each batch would make the host wait for a GPU.
        places = torch.split(dealt[0].to(dataset.index.device), size)
        for position, padding in zip(places, torch.split(dealt[1], size), strict=True):
            if len(position) == size or not self.drop_last:
                take = dataset.take if self.graph is None or padding.any() else self.graph.take
                yield without_labels(take(epoch, position), padding)


def _batches_seen(trainer: L.Trainer | None) -> int:
    """How many batches of its epoch a run has seen from which this one goes on."""
    loop: Any = getattr(trainer, "fit_loop", None)
    if loop is None or not loop.restarting or loop.epoch_loop.batch_progress.is_last_batch:
        return 0
    return int(loop.epoch_loop.batch_progress.current.processed)


def _gpu(trainer: L.Trainer | None) -> torch.device | None:
    """The GPU of this process, if it has one."""
    device = getattr(getattr(trainer, "strategy", None), "root_device", None)
    return device if device is not None and devices.is_gpu(device) else None


def _as_it_is(batch: Any) -> Any:
    return batch
