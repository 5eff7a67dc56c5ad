"""Short runs of the command line on the CPU and on the simulated device, and the comparison of their checkpoints."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lkd.__main__ import main
from tests.method_table import is_for_segmentation
from tests.test_configs import PAIR_OF_METHOD, _synthetic_settings

SHORT = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.precision=32-true",
    "--speed.channels_last=false",  # otherwise, the CPU uses different kernels
]


def overlay(name: str) -> list[str]:
    """Return the arguments of a run that applies a method's overlay to small data.

    Args:
        name: Name of the file in `configs/methods`, without its suffix.
    """
    if is_for_segmentation(f"methods/{name}"):
        sizes = [f"--data.init_args.{size}" for size in ("batch_size=4", "train_size=40", "size=16")]
        return ["--config", "shapes/kd", "--config", f"methods/{name}", *sizes]
    pair = PAIR_OF_METHOD.get(name, "digits")
    data, settings = "digits", ["--data.init_args.batch_size=8", "--data.init_args.val_size=0.02"]
    if pair != "digits":
        data, settings = "synthetic", [*_synthetic_settings(pair), "--data.init_args.batch_size=2"]
    return ["--config", f"data/{data}", "--config", f"pairs/{pair}", "--config", f"methods/{name}", *settings]


def fit(folder: str, accelerator: str, *args: str) -> dict[str, Any]:
    """Train and return the last checkpoint.

    Args:
        folder: Folder of the run.
        accelerator: `cpu` or `pretended`.
        args: Further arguments.
    """
    place = [f"--trainer.default_root_dir={folder}", f"--trainer.accelerator={accelerator}"]
    with _disable_current_modes() if accelerator == "cpu" else nullcontext():  # dispatch in Python slows the CPU down
        assert main(["fit", *SHORT, *args, *place]) == 0
    (path,) = Path(folder).rglob("last.ckpt")
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """List the differences of two checkpoints: tensors that are not bitwise equal, and other values that differ."""
    if isinstance(one, torch.Tensor):
        equal = isinstance(other, torch.Tensor) and torch.equal(one.nan_to_num(), other.nan_to_num())
        return [] if equal else [f"{name} by {float((one.double() - other.double()).abs().max()):.2g}"]
    if isinstance(one, dict):
        if set(one) != set(other):
            return [f"{name}: {sorted(set(one) ^ set(other))}"]
        return [found for key in one for found in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, (list, tuple)):
        return [found for pair in zip(one, other, strict=True) for found in differences(*pair, name)]
    return [] if one == other else [f"{name}: {one} {other}"]


TRAINED = ("state_dict", "optimizer_states", "lr_schedulers", "lkd")
"""Entries that depend on training: weights and memory banks, optimizer states, schedules, means of metrics."""


def trained(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a checkpoint that must be equal in equivalent runs."""
    return {name: checkpoint[name] for name in TRAINED}
