"""Checkpoint I/O with atomic writes and integrity checks."""

from __future__ import annotations

import pickle
from copy import copy
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from lkd.io.refused import said, shown
from lkd.io.safe_load import is_zip, read_torch
from lkd.io.tensor_cache import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes files atomically and checks them before loading.

    Lightning's default plugin copies the file from another folder to its destination, without flushing it to disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: Content of the checkpoint.
            path: Path of the file. An existing file is replaced only after the new one has been written completely.
            storage_options: Not used for local files.

        Raises:
            OSError: If the file cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing(Path(path)) as written, written.open("wb") as file:
                torch.save(_on_cpu(checkpoint), file)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
            kept = "the previous file is intact" if Path(path).is_file() else "no file was created"
            reason = " ".join(str(error.__context__ if isinstance(error.__context__, OSError) else error).split())
            raise OSError(
                f"the checkpoint {path} cannot be written ({reason}); {kept}; free some disk space or choose another "
                "folder (--trainer.default_root_dir), then continue with --resume"
            ) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **settings: Any) -> dict[str, Any]:
        """Load a checkpoint, after checking that it is not corrupt.

        Raises:
            ValueError: If it is corrupt.
        """
        if Path(path).is_file() and (damage := damage_of(Path(path))):
            raise ValueError(f"{shown(path)} is corrupt ({damage}); use another checkpoint")
        content: dict[str, Any] = super().load_checkpoint(path, *args, **settings)
        return content


def _on_cpu(value: Any) -> Any:
    """Move all tensors of a checkpoint to the CPU, so that it can be read without the device of the run."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        moved = copy(value)  # keeps the type and attributes, such as those of a state dict
        for name, part in value.items():
            moved[name] = _on_cpu(part)
        return moved
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


def damage_of(path: Path) -> str:
    """Describe the corruption of a file saved by `torch.save`; empty if the file is intact.

    Args:
        path: Path of the file. A file that requires code to be loaded is not considered corrupt.
    """
    try:
        read_torch(path)
    except Exception as error:  # corrupt bytes can raise anything
        if isinstance(error, pickle.UnpicklingError) and is_zip(path):  # its checksums are valid
            return ""
        return said(error) or type(error).__name__
    return ""
