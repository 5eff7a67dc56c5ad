"""Checkpoints that are whole: written at one stroke, and checked before they are read."""

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
    """Lightning's way to write checkpoints, but for this: a file is there whole or not at all.

    Lightning's own takes the file's place by a copy from another folder, and does not wait for the disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What to write.
            path: The file; one that is there stays as it is until the new one is whole.
            storage_options: Not for local files.

        Raises:
            OSError: If it cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing(Path(path)) as written, written.open("wb") as file:
                torch.save(_on_cpu(checkpoint), file)
        except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's
            kept = "the one that was there is whole" if Path(path).is_file() else "nothing was written"
            reason = " ".join(str(error.__context__ if isinstance(error.__context__, OSError) else error).split())
            raise OSError(
                f"the checkpoint {path} cannot be written ({reason}), and {kept}; make room or take another folder "
                "(--trainer.default_root_dir), and go on with --resume"
            ) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **settings: Any) -> dict[str, Any]:
        """Read a checkpoint, after a look whether it is whole.

        Raises:
            ValueError: If it is not.
        """
        if Path(path).is_file() and (damage := damage_of(Path(path))):
            raise ValueError(f"{shown(path)} is damaged ({damage}); give another checkpoint")
        content: dict[str, Any] = super().load_checkpoint(path, *args, **settings)
        return content


def _on_cpu(value: Any) -> Any:
    """A checkpoint's content with all tensors on the CPU, so that a machine without the run's device can read it."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        moved = copy(value)  # of the same kind: a state dict has attributes of its own
        for name, part in value.items():
            moved[name] = _on_cpu(part)
        return moved
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


def damage_of(path: Path) -> str:
    """What is wrong with a file that `torch.save` wrote; empty if nothing is.

    Args:
        path: The file. One whose objects need code to be read is no less whole for that.
    """
    try:
        read_torch(path)
    except Exception as error:  # damaged bytes can raise anything
        if isinstance(error, pickle.UnpicklingError) and is_zip(path):  # its checksums are right
            return ""
        return said(error) or type(error).__name__
    return ""
