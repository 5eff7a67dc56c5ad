"""Record of a run's environment, for reproducibility."""

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
"""File name of the record, next to the config of the run."""

_PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "safetensors", "numpy", "PIL")
_PATIENCE = 10.0  # timeout of git in seconds, for repositories on a slow disk
_UNKNOWN = "unknown"


def run_folder(trainer: L.Trainer) -> str:
    """Return the folder of a run, the parent of its `checkpoints`, regardless of the loggers.

    Args:
        trainer: Trainer of the run, in `fit`. The function must be called in all processes.
    """
    for callback in trainer.checkpoint_callbacks:
        folder, _, name = str(getattr(callback, "dirpath", None) or "").rpartition(os.sep)
        if folder and name == "checkpoints":
            return folder
    return trainer.log_dir or trainer.default_root_dir


class RunRecord(L.Callback):
    """Record the versions, source code revision, devices, seeds, images, command and start time of a run.

    The record is written to `run.yaml` in the run's folder, next to `config.yaml`, after the first successful step. A
    resumed run appends another record. A warning is issued if a run is resumed, or repeated from its own config, with
    other versions, devices or training images. Environment variables are not recorded.

    Args:
        command: Arguments of the `lkd` command. If `None`, the arguments of the process.
        configs: Config files that were read. If one of them is the `config.yaml` of another run, this run repeats it
            and is compared with its record.
    """

    def __init__(self, command: Sequence[str] | None = None, configs: Iterable[Path] = ()) -> None:
        self.command = shlex.join(sys.argv if command is None else ["lkd", *command])
        self.configs = list(configs)
        self._record: tuple[Path, dict[str, Any]] | None = None  # not written yet

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compare the environment with that of the run that is resumed or repeated."""
        folder = run_folder(trainer)  # called in all processes, as it is broadcast
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        begun, now = _begun(self._places(trainer.ckpt_path)), self._now(trainer)
        if differing := list(_differences(begun, now)):
            rank_zero_warn(f"this run was started with {' and '.join(differing)}; results may not be bitwise identical")
        if "://" not in folder:  # a local folder
            self._record = Path(folder), now

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Write the record after the first step."""
        if self._record is None:
            return
        folder, record = self._record
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / RECORD).open("a") as file:
            file.write(yaml.safe_dump([record], sort_keys=False, width=120, allow_unicode=True))
        self._record = None

    def _places(self, ckpt_path: Any) -> Iterator[Path]:
        """Yield the possible paths of the record of the run that is resumed or repeated."""
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
    """Return the versions of Python, lkd and the packages that may affect results, by name."""
    found = {name: str(importlib.import_module(name).__version__) for name in _PACKAGES}
    if torch.cuda.is_available():
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(cudnn)}
    return {"lkd": lkd.__version__, "python": platform.python_version(), **found}


def _repositories() -> dict[str, Path]:
    """Return the folders of source code: the current folder, and lkd if it is a git checkout."""
    checkout = Path(lkd.__file__).parent.parent
    return {"folder": Path.cwd(), **({"lkd": checkout} if (checkout / ".git").exists() else {})}


def _revision(folder: Path) -> str | None:
    """Return the commit of a folder, with the suffix `-dirty` if tracked files are modified; `None` without git."""
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
    """Return the numbers of images and a fingerprint of the training images."""
    if not _is_ours(data):
        return {"contents": _UNKNOWN}
    numbers = {split: len(data.datasets[split]) for split in ("train", "val") if split in data.datasets}
    return {**numbers, "contents": data.datasets["train"].contents() or _UNKNOWN}


def _begun(places: Iterable[Path]) -> Mapping[str, Any] | None:
    """Return the first record of a run from the first file that can be read."""
    for place in places:
        try:
            first = yaml.safe_load(place.read_text())[0]
        except (OSError, yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError):
            continue
        if isinstance(first, Mapping):
            return first
    return None


def _differences(begun: Mapping[str, Any] | None, now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences as text, such as `torch 2.13.0 (now 2.14.1)` and `different training images`."""
    if begun is None:
        return
    for part in ("versions", "devices"):
        before = begun.get(part, {})
        for name, value in now[part].items():
            if before.get(name, value) != value:
                yield f"{name} {before[name]} (now {value})"
    contents = {record.get("images", {}).get("contents", _UNKNOWN) for record in (begun, now)}
    if _UNKNOWN not in contents and len(contents) > 1:
        yield "different training images"
