"""What a run was made with, so that it can be made again."""

from __future__ import annotations

import importlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_warn

import lkd
from lkd import devices
from lkd.datamodules import ImageDataModule

RECORD = "run.yaml"
"""The file's name, beside the run's config."""

_PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "safetensors", "numpy", "PIL")
_PATIENCE = 10.0  # seconds for git, should the repository lie on a slow disk
_UNKNOWN = "unknown"


def run_folder(trainer: L.Trainer) -> str:
    """A run's folder, whatever its loggers: that in which its `checkpoints` lie, or would lie.

    Args:
        trainer: The run's, in `fit`; to be asked in all processes.
    """
    for callback in trainer.checkpoint_callbacks:
        folder, _, name = str(getattr(callback, "dirpath", None) or "").rpartition(os.sep)
        if folder and name == "checkpoints":
            return folder
    return trainer.log_dir or trainer.default_root_dir


class RunRecord(L.Callback):
    """Record versions, code, devices, seeds, images, command and time of a run.

    The record is written to `run.yaml` in the run's folder, beside `config.yaml`, when the first step has succeeded; a
    resumed run appends a record. A warning is issued if a run is resumed, or repeated from its own config, with other
    versions, devices or training images. Environment variables are not recorded.

    Args:
        command: The arguments behind `lkd`; None: what the process was started with.
        configs: Config files that were read: beside one of them may lie the record of the run that is run again.
    """

    def __init__(self, command: Sequence[str] | None = None, configs: Iterable[Path] = ()) -> None:
        self.command = shlex.join(sys.argv if command is None else ["lkd", *command])
        self.configs = list(configs)
        self._record: tuple[Path, dict[str, Any]] | None = None  # not yet written

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compare with the run that is continued or repeated."""
        folder = run_folder(trainer)  # in all processes: it is the first one's
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        begun, now = _begun(self._places(trainer.ckpt_path)), self._now(trainer)
        if differing := list(_differences(begun, now)):
            rank_zero_warn(f"this run was begun with {' and '.join(differing)}; bits may differ")
        if "://" not in folder:  # a folder on this machine
            self._record = Path(folder), now

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Write the record."""
        if self._record is None:
            return
        folder, record = self._record
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / RECORD).open("a") as file:
            file.write(yaml.safe_dump([record], sort_keys=False, width=120, allow_unicode=True))
        self._record = None

    def _places(self, ckpt_path: Any) -> Iterator[Path]:
        """Where the record of the run may lie that this one goes on with, or repeats."""
        if ckpt_path is not None:
            yield from (folder / RECORD for folder in list(Path(ckpt_path).resolve().parents)[:3])
        yield from (config.with_name(RECORD) for config in self.configs if config.name == "config.yaml")

    def _now(self, trainer: L.Trainer) -> dict[str, Any]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        return {
            "begun": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": self.command,
            "folder": str(Path.cwd()),
            "versions": _versions(),
            "revisions": {name: _revision(place) for name, place in _repositories().items()},
            "devices": _devices(trainer),
            "seeds": {
                "run": _number(os.environ.get("PL_GLOBAL_SEED")),
                "data": data.datasets["train"].seed if _is_ours(data) else _UNKNOWN,
                "split": data.split_seed if _is_ours(data) else _UNKNOWN,
            },
            "images": _images(data),
        }


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _versions() -> dict[str, str]:
    """What results may depend on, by name."""
    found = {name: str(importlib.import_module(name).__version__) for name in _PACKAGES}
    if torch.cuda.is_available():
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(cudnn)}
    return {"lkd": lkd.__version__, "python": platform.python_version(), **found}


def _repositories() -> dict[str, Path]:
    """Where code comes from: the current folder, and lkd if it is a checkout."""
    checkout = Path(lkd.__file__).parent.parent
    return {"folder": Path.cwd(), **({"lkd": checkout} if (checkout / ".git").exists() else {})}


def _revision(folder: Path) -> str | None:
    """The commit that a folder has, with `-dirty` behind it if a file that git knows has changed; None without git."""
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "--no-optional-locks", "-C", str(folder), *describe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _devices(trainer: L.Trainer) -> dict[str, Any]:
    device = trainer.strategy.root_device
    name = f"{device.type}, {devices.name_of(device)}"
    return {"processes": trainer.world_size, "device": name, "threads": torch.get_num_threads()}


def _is_ours(data: Any) -> bool:
    return isinstance(data, ImageDataModule) and "train" in data.datasets


def _images(data: Any) -> dict[str, Any]:
    """How many images there are, and a name for those of training."""
    if not _is_ours(data):
        return {"contents": _UNKNOWN}
    numbers = {split: len(data.datasets[split]) for split in ("train", "val") if split in data.datasets}
    return {**numbers, "contents": data.datasets["train"].contents() or _UNKNOWN}


def _begun(places: Iterable[Path]) -> Mapping[str, Any] | None:
    """How a run was begun, from the first of some records that can be read."""
    for place in places:
        try:
            first = yaml.safe_load(place.read_text())[0]
        except (OSError, yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError):
            continue
        if isinstance(first, Mapping):
            return first
    return None


def _differences(begun: Mapping[str, Any] | None, now: Mapping[str, Any]) -> Iterator[str]:
    """What was otherwise, for a sentence: `torch 2.13.0 (now 2.14.1)`, `other training images`."""
    if begun is None:
        return
    for part in ("versions", "devices"):
        before = begun.get(part, {})
        for name, value in now[part].items():
            if before.get(name, value) != value:
                yield f"{name} {before[name]} (now {value})"
    contents = {record.get("images", {}).get("contents", _UNKNOWN) for record in (begun, now)}
    if _UNKNOWN not in contents and len(contents) > 1:
        yield "other training images"
