"""Caching of the teacher's logits on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lkd.__about__ import __version__
from lkd.callbacks.cached_logits import CachedLogits, LogitFiles
from lkd.callbacks.logit_table import Storage
from lkd.datamodules import ImageDataModule
from lkd.io.tensor_cache import cache_folder, network_fingerprint


class TeacherCache(L.Callback):
    """Cache the teacher's logits on disk and reuse them in later epochs and runs.

    With `versions=N`, each image has N augmented variants, and epoch `e` uses variant `e % N`. The first epoch of a
    variant runs the teacher and stores its logits; later epochs read them, as do later runs with the same teacher,
    data, augmentation, seed and precision. Logits are always read back from storage, so a run that creates the cache
    and a run that finds it train on the same values. Corrupt or stale files cause a warning and are rebuilt.

    The teacher must be frozen, the criterion may read only its logits, and the data module must be an
    `ImageDataModule`, not a stream such as `WebDatasetDataModule`. Hooks that may change a batch
    (`on_before_batch_transfer`, `on_after_batch_transfer`) must not be overridden.

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
        self._logits: CachedLogits | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the logits can be cached, and restrict the dataset to a fixed number of variants."""
        if self.versions is not None and stage == "fit":
            _check(trainer, pl_module)
            _limit_variants(trainer, self.versions)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Identify the cache, print how many variants it contains, and attach it to the module."""
        if self.versions is None:
            return
        inputs = {
            **trainer.datamodule.datasets["train"].made_from(),  # type: ignore[attr-defined]
            "teacher": network_fingerprint(pl_module.teacher),
            "teacher_normalization": str(pl_module.teacher_normalization),
            "precision": str(trainer.precision),
            "storage": str(self.storage),
            "lkd": __version__,
        }
        root = Path(self.folder) if self.folder else cache_folder("teacher_logits")
        files = LogitFiles(root, trainer.strategy.broadcast(inputs))
        found = sum(files.path(variant).is_file() for variant in range(self.versions))
        others = "" if found else files.difference()
        pl_module.print(f"Teacher cache: {found} of {self.versions} variants found in {files.folder}{others}")
        self._logits = CachedLogits(trainer, pl_module, files, self.storage, self.versions)
        pl_module.teacher_cache = self._logits

    @property
    def _active(self) -> CachedLogits | None:
        """The cached logits, unless caching has failed."""
        return self._logits if self._logits is not None and self._logits.is_active else None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Load the cached logits of this epoch's variant."""
        if logits := self._active:
            logits.begin_epoch()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check that the cached logits belong to the images of the epoch."""
        if logits := self._active:
            logits.begin_step(pl_module.read(batch))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the images whose logits were computed and those whose logits were read."""
        if logits := self._active:
            logits.end_step(pl_module.read(batch))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the logits that were computed in this epoch."""
        if logits := self._active:
            logits.end_epoch()

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print how many forward passes of the teacher were avoided."""
        if logits := self._active:
            counts = logits.counts
            computed, saved = counts.computed * trainer.world_size + counts.missing, counts.read * trainer.world_size
            pl_module.print(f"Teacher cache: {computed:,} forward passes computed, {saved:,} avoided")

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Detach the cache from the module, and restore random augmentations in the dataset."""
        if getattr(pl_module, "teacher_cache", None) is not None:
            pl_module.teacher_cache = None
        self._logits = None
        _limit_variants(trainer, None)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Detach the cache if the run fails."""
        self.teardown(trainer, pl_module, "fit")


_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")
"""Hooks of data module and module that may change a batch, for example by random augmentation on a GPU."""


def _limit_variants(trainer: L.Trainer, number: int | None) -> None:
    """Make the training images repeat after a number of epochs; `None` for new augmentations in each epoch."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, ImageDataModule) and "train" in data.datasets:
        data.datasets["train"].replay = number


def _check(trainer: L.Trainer, module: Any) -> None:
    data = trainer.datamodule  # type: ignore[attr-defined]
    reason = getattr(module, "cache_obstacle", f"{type(module).__name__} is not a DistillModule")
    if not reason and not isinstance(data, ImageDataModule):
        reason = "only lkd's data modules can repeat augmented images (except WebDatasetDataModule, a stream)"
    elif not reason and trainer.overfit_batches:  # type: ignore[attr-defined]
        reason = "with overfit_batches, every epoch contains the same few images"
    elif not reason and (hooks := [hook for part in (data, module) for hook in _HOOKS if is_overridden(hook, part)]):
        reason = f"{hooks[0]} may change the images of a batch, which the cache identifies by their index"
    if reason:
        raise ValueError(f"cannot cache the teacher's logits: {reason}; remove teacher_cache.versions")
