"""Caching of the teacher's logits on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lkd.__about__ import __version__
from lkd.callbacks.logit_table import Answers, SharedRows, Storage
from lkd.datamodules import ImageDataModule
from lkd.datamodules.dataset import ImageDataset
from lkd.io.tensor_cache import cache_folder, fingerprint, load_tensors, made_from, save_tensors
from lkd.types import Batch, Outputs

_ON_DEVICE = 2**31
"""Maximum size in bytes of a variant's logits on a GPU; larger ones stay on the host and are copied for each batch."""

_SAMPLE = 16
"""Number of images of a cached variant that are recomputed as a check, once per run."""

_TOLERANCE = 0.1
"""Maximum error of cached logits relative to the mean deviation of the logits; bfloat16 stays below 0.02."""


class TeacherCache(L.Callback):
    """Cache the teacher's logits on disk and reuse them in later epochs and runs.

    With `versions=N`, each image has N augmented variants, and epoch `e` uses variant `e % N`. The first epoch of a
    variant runs the teacher and stores its logits; later epochs read them, as do later runs with the same teacher,
    data, augmentation, seed and precision. Logits are always read back from storage, so a run that creates the cache
    and a run that finds it train on the same values. Corrupt or stale files cause a warning and are rebuilt.

    The teacher must be frozen, the criterion may read only its logits, and the data module must be an
    `ImageDataModule`, not a stream such as `WebDatasetDataModule`.

    Args:
        versions: Number of augmented variants of each image. `None` disables the cache, and every epoch uses new random
            augmentations.
        dtype: Data type of the stored logits.
        top_k: Number of largest logits to store, with their classes; the remaining probability is spread evenly over
            the other classes (Shen, Xing 2021, arXiv 2112.01528, "marginal smoothing"). `None` stores all logits.
        folder: Folder of the cache. By default, it is below `$LKD_CACHE`, or else in the user's cache folder.

    Raises:
        ValueError: If an argument is out of range, or, at the start of `fit`, if the logits cannot be cached.
    """

    def __init__(
        self,
        versions: int | None = None,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
        top_k: int | None = None,
        folder: str | None = None,
    ) -> None:
        for name, number in (("versions", versions), ("top_k", top_k)):
            if number is not None and number < 1:
                raise ValueError(f"teacher_cache.{name} must be at least 1, or null to disable it, got {number}")
        self.versions = versions
        self.storage = Storage(getattr(torch, dtype), top_k)
        self.folder = folder
        self._answers: Answers | None = None
        self._shared: SharedRows | None = None
        self._on_device: Answers | None = None  # one table for all variants: a graph reads it by address
        self._is_active = self._is_checked = False
        self._made_from: dict[str, str] = {}
        self._trusted: set[int] = set()
        self._epoch = -1  # the epoch whose variant is loaded
        self._num_computed = self._num_missing = self._num_read = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the logits can be cached, and restrict the dataset to a fixed number of variants."""
        self._is_active = self.versions is not None and stage == "fit"
        if self._is_active:
            _check(trainer, pl_module)
            self._replay(trainer, self.versions)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Identify the cache, print how many variants it contains, and attach it to the module."""
        if not self._is_active:
            return
        self._num_computed = self._num_missing = self._num_read = 0
        self._trusted, self._epoch, self._teacher = set(), -1, pl_module.teacher_version
        parts = {
            **_images(trainer).made_from(),
            "teacher": fingerprint(str(pl_module.teacher), *pl_module.teacher.state_dict().values()),
            "teacher_normalization": str(pl_module.teacher_normalization),
            "precision": str(trainer.precision),
            "storage": str(self.storage),
            "lkd": __version__,
        }
        self._made_from = trainer.strategy.broadcast(parts)
        kept = sum(self._path(version).is_file() for version in range(cast("int", self.versions)))
        others = "" if kept else self._others()
        pl_module.print(f"Teacher cache: {kept} of {self.versions} variants found in {self._path(0).parent}{others}")
        pl_module.recall = _Recall(self, trainer)

    @property
    def _root(self) -> Path:
        return Path(self.folder) if self.folder else cache_folder("answers")

    def _others(self) -> str:
        """Return in what the most similar cache in the folder differs from this one."""
        differ: list[list[str]] = []
        for file in self._root.glob("*/0.safetensors"):
            other = made_from(file) or {}
            differ.append([name for name, value in self._made_from.items() if other.get(name) != value])
        return f"; another cache there differs in {' and '.join(sorted(differ, key=len)[0])}" if differ else ""

    def _path(self, version: int) -> Path:
        return self._root / fingerprint(sorted(self._made_from.items())) / f"{version}.safetensors"

    def _of(self, version: int) -> dict[str, str]:
        return {**self._made_from, "version": str(version)}

    def _version(self, trainer: L.Trainer) -> int:
        return trainer.current_epoch % cast("int", self.versions)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Load the cached logits of this epoch's variant."""
        if self._is_active:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: L.Trainer, module: Any) -> None:
        """Load the cached logits of this epoch's variant if all processes find them."""
        if module.teacher_version != self._teacher:
            raise ValueError(
                "the teacher has changed since the start of fit, so its logits cannot be cached; remove "
                "teacher_cache.versions"
            )
        version, self._epoch = self._version(trainer), trainer.current_epoch
        found = load_tensors(self._path(version), self._of(version))
        self._answers, self._shared, self._is_checked = None, None, False
        agrees = False
        if found is not None:
            stored = tuple(found[name] for name in ("logits", "classes") if name in found)
            self._answers = self._table(trainer, stored, len(found["example"]))
            agrees = version in self._trusted or self._agrees(trainer, module, version, self._answers)
        if trainer.strategy.reduce_boolean_decision(agrees):
            self._trusted.add(version)
        else:
            self._answers = None

    def _agrees(self, trainer: L.Trainer, module: Any, version: int, answers: Answers) -> bool:
        """Return whether cached logits agree with the teacher on a few images.

        Weights and names do not determine everything that a teacher computes.
        """
        images = _images(trainer)
        index = images.index[:: max(1, len(images) // _SAMPLE)][:_SAMPLE]
        fresh = self._ask(trainer, module, version, index)
        self._num_computed += len(index)
        fresh = self.storage.unpack(self.storage.pack(fresh), answers.num_classes)
        kept = answers.read(index.to(answers.seen.device)).cpu()
        apart, spread = (kept - fresh).abs().mean(), (fresh - fresh.mean(1, keepdim=True)).abs().mean()
        if apart <= _TOLERANCE * spread:
            return True
        rank_zero_warn(
            f"{self._path(version)} is rebuilt: its logits of {len(index)} sample images differ from the teacher's"
        )
        return False

    def _ask(self, trainer: L.Trainer, module: Any, version: int, index: Tensor) -> Tensor:
        """Compute the teacher's logits `(views * B, K)` of images outside of a training step, on the CPU."""
        batch = _images(trainer).make(torch.full_like(index, version), index)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            logits = module.teacher_outputs(batch._replace(input=batch.input.to(module.device))).logits
        return cast("Tensor", logits.float().cpu())

    def _table(self, trainer: L.Trainer, stored: tuple[Tensor, ...], num_classes: int) -> Answers:
        device = trainer.strategy.root_device
        if sum(part.numel() * part.element_size() for part in stored) > _ON_DEVICE:
            device = torch.device("cpu")
        if device.type != "cpu" and self._on_device is not None and self._on_device.load(stored):
            return self._on_device
        table = Answers(self.storage, stored, _images(trainer).index, num_classes, device)
        self._on_device = None if device.type == "cpu" else table
        return table

    @property
    def state(self) -> tuple[str, int]:
        """Whether logits are read or written, and in which memory. A change makes a graph of the step invalid."""
        return "written" if self._shared is not None else "read", id(self._answers)

    @property
    def is_on_host(self) -> bool:
        """Whether the logits are too large for the device, so that each step copies its own from the host."""
        return self._answers is not None and self._answers.seen.is_cpu

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check once per epoch that the cached logits belong to the images of the epoch."""
        if not self._is_active:
            return
        if self._epoch != trainer.current_epoch:  # a run resumed within an epoch skips on_train_epoch_start
            self._begin(trainer, pl_module)
        if not self._is_checked:
            self._check_version(trainer, pl_module.unpack(batch))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the images whose logits were computed and those whose logits were read."""
        if self._is_active and self._answers is not None:
            batch = pl_module.unpack(batch)
            size = len(batch.target) // batch.views
            self._num_computed += size if self._shared is not None else 0
            self._num_read += size if self._shared is None else 0

    def recall(self, trainer: L.Trainer, batch: Batch, ask: Callable[[Batch], Outputs]) -> Outputs:
        """Return the teacher's logits of a batch, read from the cache or computed and stored.

        Args:
            trainer: The trainer.
            batch: The batch.
            ask: Function that runs the teacher.
        """
        if self._answers is None or self._shared is not None:
            outputs = ask(batch)
            if self._answers is None and not self._open(trainer, batch, outputs.logits):
                return outputs
        size = len(batch.target) // batch.views
        answers, index = cast("Answers", self._answers), cast("Tensor", batch.index)[:size]
        index = index.to(answers.seen.device)  # a copy to the host must be complete before its use
        if self._shared is not None:
            answers.write(index, outputs.logits.to(index.device))
        return Outputs(answers.read(index).to(batch.target.device, non_blocking=True), {})

    def _check_version(self, trainer: L.Trainer, batch: Batch) -> None:
        shown = None if batch.version is None else int(batch.version[0])
        if shown != self._version(trainer):
            raise ValueError(
                f"teacher_cache expects variant {self._version(trainer)} of the images in epoch "
                f"{trainer.current_epoch}, but the batch has variant {shown}; use the original data loaders of the "
                "data module, or remove teacher_cache"
            )
        self._is_checked = True

    def _open(self, trainer: L.Trainer, batch: Batch, logits: Tensor) -> bool:
        """Create the memory that all processes fill in this epoch; return False if it does not fit."""
        views = len(logits) // len(batch.target) * batch.views
        example = torch.zeros(1, views, logits.shape[1])
        rows, like = len(_images(trainer)), self.storage.pack(example)
        file, reason = "", "training runs on several nodes; create the cache on one of them first"
        if trainer.is_global_zero and trainer.num_nodes == 1:
            try:
                file = SharedRows.reserve(self._path(0).parent, SharedRows.size(rows, like))
            except OSError as error:
                reason = f"{error}; set teacher_cache.folder to a writable folder with enough space"
        file = trainer.strategy.broadcast(file)
        if not file:
            rank_zero_warn(
                f"cannot cache the teacher's logits in {self._path(0).parent}; each step computes them: {reason}"
            )
            self._is_active = False
            trainer.lightning_module.recall = None  # type: ignore[assignment]
            return False
        self._shared = SharedRows(rows, like, file)
        self._answers = self._table(trainer, self._shared.stored, logits.shape[1])
        trainer.strategy.barrier("teacher cache created")
        if trainer.is_global_zero:
            Path(file).unlink()  # mapped memory stays valid; no file is left if a process is killed
        return True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the logits that were computed in this epoch."""
        if self._shared is None or self._answers is None:
            return
        answers, shared = self._answers, self._shared
        own = answers.seen.cpu()
        for memory, part in zip(shared.stored, answers.stored, strict=True):
            if part.device.type != "cpu":
                memory[own] = part[answers.seen].cpu()
        shared.seen[own] = True
        trainer.strategy.barrier("teacher cache filled")
        kept = False
        if trainer.is_global_zero:
            try:
                kept = self._finish(trainer, pl_module, answers, shared)
            except Exception as error:  # any error is only reported, since the other processes are waiting
                rank_zero_warn(f"failed to cache variant {self._version(trainer)} of the teacher's logits: {error}")
        if trainer.strategy.broadcast(kept):
            self._trusted.add(self._version(trainer))
        self._answers = self._shared = None

    def _finish(self, trainer: L.Trainer, module: Any, answers: Answers, shared: SharedRows) -> bool:
        """Compute the logits of images in the dropped last batch, and save the variant; return whether it was saved."""
        images, version = _images(trainer), self._version(trainer)
        batch_size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        missing = (~shared.seen).nonzero().squeeze(1)
        if len(missing) > batch_size * trainer.world_size:
            rank_zero_warn(
                f"variant {version} of the teacher's logits was not cached: the epoch contained only "
                f"{len(images) - len(missing):,} of {len(images):,} images"
            )
            return False
        host = Answers(self.storage, shared.stored, images.index, answers.num_classes, torch.device("cpu"))
        for index in torch.split(images.index[missing], batch_size) if len(missing) else ():
            host.write(index, self._ask(trainer, module, version, index))
            self._num_missing += len(index)
        named = dict(zip(("logits", "classes"), shared.stored, strict=False))
        example = torch.empty(answers.num_classes, 0)  # its shape stores the number of classes
        save_tensors(self._path(version), {**named, "example": example}, self._of(version))
        return True

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print how many forward passes of the teacher were saved."""
        if self._is_active:
            computed = self._num_computed * trainer.world_size + self._num_missing
            saved = self._num_read * trainer.world_size
            pl_module.print(f"Teacher cache: {computed:,} forward passes computed, {saved:,} saved")

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Detach the cache from the module, and restore random augmentations in the dataset."""
        if self._is_active or getattr(pl_module, "recall", None) is not None:
            pl_module.recall = None
        self._answers = self._shared = self._on_device = None
        self._replay(trainer, None)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Detach the cache if the run fails."""
        self.teardown(trainer, pl_module, "fit")

    def _replay(self, trainer: L.Trainer, versions: int | None) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ImageDataModule) and "train" in data.datasets:
            data.datasets["train"].replay = versions


class _Recall:
    """The value of `DistillModule.recall` while logits are cached."""

    def __init__(self, cache: TeacherCache, trainer: L.Trainer) -> None:
        self._cache, self._trainer = cache, trainer

    def __call__(self, batch: Batch, ask: Callable[[Batch], Outputs]) -> Outputs:
        return self._cache.recall(self._trainer, batch, ask)

    @property
    def state(self) -> tuple[str, int]:
        """Equal to `TeacherCache.state`."""
        return self._cache.state

    @property
    def obstacle(self) -> str:
        """Why a graph cannot read the logits; empty if it can."""
        return "the cached logits are too large for the device" if self._cache.is_on_host else ""


def _images(trainer: L.Trainer) -> ImageDataset:
    images: ImageDataset = trainer.datamodule.datasets["train"]  # type: ignore[attr-defined]
    return images


def _check(trainer: L.Trainer, module: Any) -> None:
    data = trainer.datamodule  # type: ignore[attr-defined]
    reason = getattr(module, "not_to_be_kept", f"{type(module).__name__} is not a DistillModule")
    if not isinstance(data, ImageDataModule):
        reason = "only lkd's data modules can repeat augmented images (except WebDatasetDataModule, a stream)"
    elif trainer.overfit_batches:  # type: ignore[attr-defined]
        reason = "with overfit_batches, every epoch contains the same few images"
    if reason:
        raise ValueError(f"cannot cache the teacher's logits: {reason}; remove teacher_cache.versions")
