"""Short runs of the command line on the CPU and on the pretended device, and what they end with."""

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
    "--speed.channels_last=false",  # with it the CPU takes other kernels
]


def overlay(name: str) -> list[str]:
    """Arguments of a run with a method's overlay, on small data.

    Args:
        name: The file in `configs/methods`, without its ending.
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
    """Train, and return the last checkpoint.

    Args:
        folder: The folder for the run.
        accelerator: `cpu` or `pretended`.
        args: More arguments.
    """
    place = [f"--trainer.default_root_dir={folder}", f"--trainer.accelerator={accelerator}"]
    with _disable_current_modes() if accelerator == "cpu" else nullcontext():  # dispatch in Python slows the CPU down
        assert main(["fit", *SHORT, *args, *place]) == 0
    (path,) = Path(folder).rglob("last.ckpt")
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Where two checkpoints differ: names of tensors that are not equal, bit by bit, and of other values."""
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
"""What of a checkpoint tells how training went: weights and memories, momenta, schedules, means of curves."""


def trained(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What is to be equal however a run was made."""
    return {name: checkpoint[name] for name in TRAINED}
