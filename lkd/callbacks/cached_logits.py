"""The teacher's logits of a run: read from cached files, or computed in the first epoch of a variant and then saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lkd.callbacks.logit_table import LogitTable, SharedRows, Storage
from lkd.datamodules.dataset import ImageDataset
from lkd.io.tensor_cache import fingerprint, load_tensors, made_from, save_tensors
from lkd.types import Batch, Outputs

_ON_DEVICE = 2**31
"""Maximum size in bytes of a variant's logits on a GPU; larger ones stay on the host and are copied for each batch."""

_SAMPLE = 16
"""Number of images of a cached variant that are recomputed as a check, once per run."""

_TOLERANCE = 0.1
"""Maximum error of cached logits relative to the mean deviation of the logits; bfloat16 stays below 0.02."""


class LogitFiles:
    """Files with the logits of all variants of the images, one file per variant.

    Args:
        root: Folder of all caches. The files are in a subfolder that is named after their inputs.
        inputs: Everything that determines the logits, by name.
    """

    def __init__(self, root: Path, inputs: Mapping[str, str]) -> None:
        self.root, self.inputs = root, dict(inputs)
        self.folder = root / fingerprint(sorted(self.inputs.items()))

    def path(self, variant: int) -> Path:
        """Return the file of a variant."""
        return self.folder / f"{variant}.safetensors"

    def load(self, variant: int) -> tuple[tuple[Tensor, ...], int] | None:
        """Return the stored tensors and the number of classes; `None` without a valid file."""
        found = load_tensors(self.path(variant), self._inputs_of(variant))
        if found is None:
            return None
        return tuple(found[name] for name in ("logits", "classes") if name in found), len(found["example"])

    def save(self, variant: int, stored: Sequence[Tensor], num_classes: int) -> None:
        """Write the file of a variant."""
        named = dict(zip(("logits", "classes"), stored, strict=False))
        example = torch.empty(num_classes, 0)  # its shape stores the number of classes
        save_tensors(self.path(variant), {**named, "example": example}, self._inputs_of(variant))

    def _inputs_of(self, variant: int) -> dict[str, str]:
        return {**self.inputs, "version": str(variant)}

    def difference(self) -> str:
        """Describe how the inputs of the most similar cache in `root` differ; empty if there is none."""
        differ: list[list[str]] = []
        for file in self.root.glob("*/0.safetensors"):
            other = made_from(file) or {}
            differ.append([name for name, value in self.inputs.items() if other.get(name) != value])
        return f"; another cache in this folder differs in {' and '.join(sorted(differ, key=len)[0])}" if differ else ""


@dataclass
class Counts:
    """Numbers of images: computed in steps of this process, computed outside of steps, and read from the cache."""

    computed: int = 0
    missing: int = 0
    read: int = 0


class CachedLogits:
    """Provides the teacher's logits during one run, as `DistillModule.teacher_cache`.

    At the start of an epoch, the file of the epoch's variant is loaded if all processes find it and it agrees with the
    teacher. Otherwise, the steps of the epoch compute the logits and fill memory that all processes share, which is
    saved at the end of the epoch.

    Args:
        trainer: Trainer of the run.
        module: A `DistillModule`.
        files: The cached files.
        storage: Storage format of the logits.
        variants: Number of augmented variants of each image.

    Attributes:
        counts: Numbers of images so far.
        is_active: Whether the run caches logits. It becomes False if they do not fit on the disk.
    """

    def __init__(self, trainer: L.Trainer, module: Any, files: LogitFiles, storage: Storage, variants: int) -> None:
        self.trainer, self.module, self.files, self.storage, self.variants = trainer, module, files, storage, variants
        self.counts = Counts()
        self.is_active = True
        self._table: LogitTable | None = None  # logits of this epoch's variant, once they are read or written
        self._memory: SharedRows | None = None  # shared with other processes, while logits are written
        self._on_device: LogitTable | None = None  # one table for all variants: a graph reads it by address
        self._verified: set[int] = set()
        self._teacher_version = module.teacher_version
        self._epoch = -1  # the epoch whose variant is loaded
        self._is_checked = False  # whether a batch of this epoch has shown the expected variant

    @property
    def variant(self) -> int:
        """Variant of the images in this epoch."""
        return self.trainer.current_epoch % self.variants

    @property
    def _images(self) -> ImageDataset:
        images: ImageDataset = self.trainer.datamodule.datasets["train"]  # type: ignore[attr-defined]
        return images

    @property
    def state(self) -> tuple[bool, int]:
        """Whether logits are written, and which table holds them. A change invalidates a graph of the step."""
        return self._memory is not None, id(self._table)

    @property
    def obstacle(self) -> str:
        """Why a graph of the step cannot read the logits; empty if it can."""
        is_on_host = self._table is not None and self._table.seen.is_cpu
        return "the cached logits are too large for the device" if is_on_host else ""

    def __call__(self, batch: Batch, run_teacher: Callable[[Batch], Outputs]) -> Outputs:
        """Return the teacher's logits of a batch, read from the cache or computed and stored.

        Args:
            batch: The batch.
            run_teacher: Function that runs the teacher.
        """
        if self._table is None or self._memory is not None:
            outputs = run_teacher(batch)
            if self._table is None and not self._reserve(batch, outputs.logits):
                return outputs
        size = len(batch.target) // batch.views
        table, index = cast("LogitTable", self._table), cast("Tensor", batch.index)[:size]
        index = index.to(table.seen.device)  # a copy to the host must be complete before its use
        if self._memory is not None:
            table.write(index, outputs.logits.to(index.device))
        return Outputs(table.read(index).to(batch.target.device, non_blocking=True), {})

    def begin_epoch(self) -> None:
        """Load the logits of this epoch's variant if all processes find them.

        Raises:
            ValueError: If the teacher has changed since the start of the run.
        """
        if self.module.teacher_version != self._teacher_version:
            raise ValueError(
                "the teacher has changed since the start of fit, so its logits cannot be cached; remove "
                "teacher_cache.versions"
            )
        self._epoch, self._table, self._memory, self._is_checked = self.trainer.current_epoch, None, None, False
        found, agrees = self.files.load(self.variant), False
        if found is not None:
            self._table = self._new_table(*found)
            agrees = self.variant in self._verified or self._agrees(self._table)
        if self.trainer.strategy.reduce_boolean_decision(agrees):
            self._verified.add(self.variant)
        else:
            self._table = None

    def begin_step(self, batch: Batch) -> None:
        """Check once per epoch that the batches show this epoch's variant of the images.

        Raises:
            ValueError: If they do not.
        """
        if self._epoch != self.trainer.current_epoch:  # a run resumed within an epoch skips its start
            self.begin_epoch()
        if self._is_checked:
            return
        shown = None if batch.version is None else int(batch.version[0])
        if shown != self.variant:
            raise ValueError(
                f"teacher_cache expects variant {self.variant} of the images in epoch {self.trainer.current_epoch}, "
                f"but the batch has variant {shown}; use the original data loaders of the data module, or remove "
                "teacher_cache"
            )
        self._is_checked = True

    def end_step(self, batch: Batch) -> None:
        """Count the images whose logits were computed or read. A replayed step does not call this object."""
        if self._table is None:
            return
        size = len(batch.target) // batch.views
        if self._memory is None:
            self.counts.read += size
        else:
            self.counts.computed += size

    def end_epoch(self) -> None:
        """Save the logits that were computed in this epoch."""
        if self._memory is None or self._table is None:
            return
        table, memory = self._table, self._memory
        own = table.seen.cpu()
        for rows, part in zip(memory.stored, table.stored, strict=True):
            if part.device.type != "cpu":
                rows[own] = part[table.seen].cpu()
        memory.seen[own] = True
        self.trainer.strategy.barrier("teacher cache filled")
        is_saved = False
        if self.trainer.is_global_zero:
            try:
                is_saved = self._complete_and_save(table.num_classes, memory)
            except Exception as error:  # any error is only reported, since the other processes are waiting
                reason = f"{type(error).__name__}: {error}"
                rank_zero_warn(f"failed to cache variant {self.variant} of the teacher's logits ({reason})")
        if self.trainer.strategy.broadcast(is_saved):
            self._verified.add(self.variant)
        self._table = self._memory = None

    def _agrees(self, table: LogitTable) -> bool:
        """Return whether cached logits agree with the teacher on a few images.

        Weights and names do not determine everything that a teacher computes.
        """
        index = self._images.index[:: max(1, len(self._images) // _SAMPLE)][:_SAMPLE]
        fresh = self._computed(index)
        self.counts.computed += len(index)
        fresh = self.storage.unpack(self.storage.pack(fresh), table.num_classes)
        cached = table.read(index.to(table.seen.device)).cpu()
        apart, spread = (cached - fresh).abs().mean(), (fresh - fresh.mean(1, keepdim=True)).abs().mean()
        if apart <= _TOLERANCE * spread:
            return True
        rank_zero_warn(
            f"{self.files.path(self.variant)} is rebuilt: its logits of {len(index)} sample images differ from the "
            "teacher's"
        )
        return False

    def _computed(self, index: Tensor) -> Tensor:
        """Compute the teacher's logits `(views * B, K)` of images outside of a training step, on the CPU."""
        batch = self._images.make(torch.full_like(index, self.variant), index)
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            logits = self.module.teacher_outputs(batch._replace(input=batch.input.to(self.module.device))).logits
        return cast("Tensor", logits.float().cpu())

    def _new_table(self, stored: tuple[Tensor, ...], num_classes: int) -> LogitTable:
        device = self.trainer.strategy.root_device
        if sum(part.numel() * part.element_size() for part in stored) > _ON_DEVICE:
            device = torch.device("cpu")
        if device.type != "cpu" and self._on_device is not None and self._on_device.load(stored):
            return self._on_device
        table = LogitTable(self.storage, stored, self._images.index, num_classes, device)
        self._on_device = None if device.type == "cpu" else table
        return table

    def _reserve(self, batch: Batch, logits: Tensor) -> bool:
        """Create the memory that all processes fill in this epoch; without space, stop caching and return False."""
        views = len(logits) // len(batch.target) * batch.views
        rows, like = len(self._images), self.storage.pack(torch.zeros(1, views, logits.shape[1]))
        file, reason = "", "training runs on several nodes; create the cache on one of them first"
        if self.trainer.is_global_zero and self.trainer.num_nodes == 1:
            try:
                file = SharedRows.reserve(self.files.folder, SharedRows.size(rows, like))
            except OSError as error:
                reason = f"{error}; set teacher_cache.folder to a writable folder with enough space"
        file = self.trainer.strategy.broadcast(file)
        if not file:
            rank_zero_warn(
                f"cannot cache the teacher's logits in {self.files.folder}; each step computes them: {reason}"
            )
            self.is_active, self.module.teacher_cache = False, None
            return False
        self._memory = SharedRows(rows, like, file)
        self._table = self._new_table(self._memory.stored, logits.shape[1])
        self.trainer.strategy.barrier("teacher cache created")
        if self.trainer.is_global_zero:
            Path(file).unlink()  # mapped memory stays valid; no file is left if a process is killed
        return True

    def _complete_and_save(self, num_classes: int, memory: SharedRows) -> bool:
        """Compute the logits of images in the dropped last batch, and save the variant; return whether it was saved."""
        images, batch_size = self._images, self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        missing = (~memory.seen).nonzero().squeeze(1)
        if len(missing) > batch_size * self.trainer.world_size:
            rank_zero_warn(
                f"variant {self.variant} of the teacher's logits was not cached: the epoch contained only "
                f"{len(images) - len(missing):,} of {len(images):,} images"
            )
            return False
        host = LogitTable(self.storage, memory.stored, images.index, num_classes, torch.device("cpu"))
        for index in torch.split(images.index[missing], batch_size) if len(missing) else ():
            host.write(index, self._computed(index))
            self.counts.missing += len(index)
        self.files.save(self.variant, memory.stored, num_classes)
        return True
