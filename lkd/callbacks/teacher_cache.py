"""The teacher's answers, kept: it is asked once for each version of an image."""

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
"""Bytes of a version's answers up to which they lie on a GPU; beyond, each batch's are fetched from the host."""


_SAMPLE = 16
"""Images of a kept version of which the teacher is asked all the same, once in a run."""

_TOLERANCE = 0.1
"""How far kept logits may be from fresh ones, as a share of the logits' mean deviation: bfloat16 stays below 0.02."""


class TeacherCache(L.Callback):
    """Keep the teacher's logits in files, and read them where the same images come again.

    Each image then has a fixed number of augmented versions: epoch `e` shows version `e mod versions`. The first pass
    over a version asks the teacher, and writes; later passes read, and so do later runs with the same teacher, images,
    augmentation, seed and precision. What a pass has written it reads back, so that a run which fills the files and one
    which finds them filled train on the same numbers. A file that is torn, or was made from something else, draws a
    warning, and is made anew.

    For teachers that are frozen, criteria that read of them nothing but logits, and lkd's data modules.

    Args:
        versions: Augmented versions of each image; None: nothing is kept, and every epoch shows new ones.
        dtype: How a logit is stored.
        top_k: How many of the largest logits are stored, with their classes; the rest's probability is spread evenly
            over the other classes (Shen, Xing 2021, arXiv 2112.01528, "marginal smoothing"). None: all are stored.
        folder: Where the files are; by default below `$LKD_CACHE`, else in the user's cache folder.

    Raises:
        ValueError: If an argument is out of range, or, at the start of fit, the answers cannot be kept.
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
                raise ValueError(f"teacher_cache needs {name} of 1 or more, or null for none, got {number}")
        self.versions = versions
        self.storage = Storage(getattr(torch, dtype), top_k)
        self.folder = folder
        self._answers: Answers | None = None
        self._shared: SharedRows | None = None
        self._on_device: Answers | None = None  # one table for all versions: a graph reads it at its address
        self._keeps = self._is_checked = False
        self._made_from: dict[str, str] = {}
        self._trusted: set[int] = set()
        self._epoch = -1  # whose version is open
        self._asked = self._rest = self._read = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the answers can be kept, and give the images their versions."""
        self._keeps = self.versions is not None and stage == "fit"
        if self._keeps:
            _check(trainer, pl_module)
            self._replay(trainer, self.versions)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stand between the module and its teacher."""
        if not self._keeps:
            return
        self._asked = self._rest = self._read = 0
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
        pl_module.print(
            f"The teacher's answers: {kept} of {self.versions} versions are kept in {self._path(0).parent}{others}"
        )
        pl_module.recall = _Recall(self, trainer)

    @property
    def _root(self) -> Path:
        return Path(self.folder) if self.folder else cache_folder("answers")

    def _others(self) -> str:
        """What the nearest answers in the folder were made from that these are not."""
        differ: list[list[str]] = []
        for file in self._root.glob("*/0.safetensors"):
            other = made_from(file) or {}
            differ.append([name for name, value in self._made_from.items() if other.get(name) != value])
        return f"; others there were made from another {' and '.join(sorted(differ, key=len)[0])}" if differ else ""

    def _path(self, version: int) -> Path:
        return self._root / fingerprint(sorted(self._made_from.items())) / f"{version}.safetensors"

    def _of(self, version: int) -> dict[str, str]:
        return {**self._made_from, "version": str(version)}

    def _version(self, trainer: L.Trainer) -> int:
        return trainer.current_epoch % cast("int", self.versions)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Open the answers to this epoch's version."""
        if self._keeps:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: L.Trainer, module: Any) -> None:
        """Open the answers, if all processes find them."""
        if module.teacher_version != self._teacher:
            raise ValueError(
                "the teacher has changed since the start of fit, so its answers cannot be kept; leave "
                "teacher_cache.versions out"
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
        """Whether the teacher says of a few images what was kept: not all that it does shows in weights and names."""
        images = _images(trainer)
        index = images.index[:: max(1, len(images) // _SAMPLE)][:_SAMPLE]
        fresh = self._ask(trainer, module, version, index)
        self._asked += len(index)
        fresh = self.storage.unpack(self.storage.pack(fresh), answers.num_classes)
        kept = answers.read(index.to(answers.seen.device)).cpu()
        apart, spread = (kept - fresh).abs().mean(), (fresh - fresh.mean(1, keepdim=True)).abs().mean()
        if apart <= _TOLERANCE * spread:
            return True
        rank_zero_warn(
            f"{self._path(version)} is not used, and made anew: of {len(index)} images the teacher says something else"
        )
        return False

    def _ask(self, trainer: L.Trainer, module: Any, version: int, index: Tensor) -> Tensor:
        """The teacher's logits `(views * B, K)`, on the CPU, for images that are not asked in a step."""
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
        """Whether logits are read or written, and in which memory: while it stays, a graph of the step can be used."""
        return "written" if self._shared is not None else "read", id(self._answers)

    @property
    def is_on_host(self) -> bool:
        """Whether the logits are too large for the device, so that each step fetches its own."""
        return self._answers is not None and self._answers.seen.is_cpu

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Once an epoch, check that the cached logits are those of the images to come."""
        if not self._keeps:
            return
        if self._epoch != trainer.current_epoch:  # a run resumed in mid-epoch does not start it
            self._begin(trainer, pl_module)
        if not self._is_checked:
            self._check_version(trainer, pl_module.unpack(batch))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the images whose logits were computed, and those whose logits were read."""
        if self._keeps and self._answers is not None:
            batch = pl_module.unpack(batch)
            size = len(batch.target) // batch.views
            self._asked += size if self._shared is not None else 0
            self._read += size if self._shared is None else 0

    def recall(self, trainer: L.Trainer, batch: Batch, ask: Callable[[Batch], Outputs]) -> Outputs:
        """The teacher's logits of a batch: read, or computed and written.

        Args:
            trainer: The trainer.
            batch: The batch.
            ask: Runs the teacher.
        """
        if self._answers is None or self._shared is not None:
            outputs = ask(batch)
            if self._answers is None and not self._open(trainer, batch, outputs.logits):
                return outputs
        size = len(batch.target) // batch.views
        answers, index = cast("Answers", self._answers), cast("Tensor", batch.index)[:size]
        index = index.to(answers.seen.device)  # to the host it must have arrived before it is used
        if self._shared is not None:
            answers.write(index, outputs.logits.to(index.device))
        return Outputs(answers.read(index).to(batch.target.device, non_blocking=True), {})

    def _check_version(self, trainer: L.Trainer, batch: Batch) -> None:
        shown = None if batch.version is None else int(batch.version[0])
        if shown != self._version(trainer):
            raise ValueError(
                f"teacher_cache expects version {self._version(trainer)} of the images in epoch "
                f"{trainer.current_epoch}, and the batch has version {shown}: leave the data module's loaders as they "
                "are, or leave teacher_cache out"
            )
        self._is_checked = True

    def _open(self, trainer: L.Trainer, batch: Batch, logits: Tensor) -> bool:
        """Make the memory that all processes fill in this epoch; False if there is no room for it."""
        views = len(logits) // len(batch.target) * batch.views
        example = torch.zeros(1, views, logits.shape[1])
        rows, like = len(_images(trainer)), self.storage.pack(example)
        file, reason = "", "several machines train; let one of them fill the files first"
        if trainer.is_global_zero and trainer.num_nodes == 1:
            try:
                file = SharedRows.reserve(self._path(0).parent, SharedRows.size(rows, like))
            except OSError as error:
                reason = f"{error}; set teacher_cache.folder to a folder with room"
        file = trainer.strategy.broadcast(file)
        if not file:
            rank_zero_warn(
                f"the teacher's answers cannot be kept in {self._path(0).parent}, so it is asked each time: {reason}"
            )
            self._keeps = False
            trainer.lightning_module.recall = None  # type: ignore[assignment]
            return False
        self._shared = SharedRows(rows, like, file)
        self._answers = self._table(trainer, self._shared.stored, logits.shape[1])
        trainer.strategy.barrier("the teacher's answers are open")
        if trainer.is_global_zero:
            Path(file).unlink()  # the memory stays while it is mapped, and nothing is left if a process is killed
        return True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep what this epoch has filled."""
        if self._shared is None or self._answers is None:
            return
        answers, shared = self._answers, self._shared
        own = answers.seen.cpu()
        for memory, part in zip(shared.stored, answers.stored, strict=True):
            if part.device.type != "cpu":
                memory[own] = part[answers.seen].cpu()
        shared.seen[own] = True
        trainer.strategy.barrier("the teacher's answers are written")
        kept = False
        if trainer.is_global_zero:
            try:
                kept = self._finish(trainer, pl_module, answers, shared)
            except Exception as error:  # whatever it is, the other processes wait
                rank_zero_warn(f"the teacher's answers to version {self._version(trainer)} could not be kept: {error}")
        if trainer.strategy.broadcast(kept):
            self._trusted.add(self._version(trainer))
        self._answers = self._shared = None

    def _finish(self, trainer: L.Trainer, module: Any, answers: Answers, shared: SharedRows) -> bool:
        """Ask for the few images that the epoch left out, as they fill no batch, and save; whether that was done."""
        images, version = _images(trainer), self._version(trainer)
        batch_size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        missing = (~shared.seen).nonzero().squeeze(1)
        if len(missing) > batch_size * trainer.world_size:
            rank_zero_warn(
                f"the teacher's answers to version {version} were not kept: the epoch showed "
                f"{len(images) - len(missing):,} of {len(images):,} images"
            )
            return False
        host = Answers(self.storage, shared.stored, images.index, answers.num_classes, torch.device("cpu"))
        for index in torch.split(images.index[missing], batch_size) if len(missing) else ():
            host.write(index, self._ask(trainer, module, version, index))
            self._rest += len(index)
        named = dict(zip(("logits", "classes"), shared.stored, strict=False))
        example = torch.empty(answers.num_classes, 0)  # tells how many classes there are
        save_tensors(self._path(version), {**named, "example": example}, self._of(version))
        return True

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Say what was saved."""
        if self._keeps:
            pl_module.print(
                f"The teacher was asked for {self._asked * trainer.world_size + self._rest:,} images in training; "
                f"{self._read * trainer.world_size:,} forward passes were saved by its kept answers"
            )

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Let the module ask its teacher again, and the data make new versions."""
        if self._keeps or getattr(pl_module, "recall", None) is not None:
            pl_module.recall = None
        self._answers = self._shared = self._on_device = None
        self._replay(trainer, None)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """The same, if the run fails."""
        self.teardown(trainer, pl_module, "fit")

    def _replay(self, trainer: L.Trainer, versions: int | None) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ImageDataModule) and "train" in data.datasets:
            data.datasets["train"].replay = versions


class _Recall:
    """What `DistillModule.recall` is while logits are cached."""

    def __init__(self, cache: TeacherCache, trainer: L.Trainer) -> None:
        self._cache, self._trainer = cache, trainer

    def __call__(self, batch: Batch, ask: Callable[[Batch], Outputs]) -> Outputs:
        return self._cache.recall(self._trainer, batch, ask)

    @property
    def state(self) -> tuple[str, int]:
        """As `TeacherCache.state`."""
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
    reason = getattr(module, "not_to_be_kept", f"{type(module).__name__} is no DistillModule")
    if not isinstance(data, ImageDataModule):
        reason = "only lkd's data modules can show the same images again (WebDatasetDataModule, a stream, cannot)"
    elif trainer.overfit_batches:  # type: ignore[attr-defined]
        reason = "with overfit_batches every epoch shows the same few images"
    if reason:
        raise ValueError(f"teacher_cache cannot keep the teacher's answers: {reason}; leave teacher_cache.versions out")
