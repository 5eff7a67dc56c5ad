"""Seeding of the random number generators before each step."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import torch

from lkd import devices
from lkd.io.tensor_cache import fingerprint


class StepSeed(L.Callback):
    """Seed the global random number generators before each training step from (seed, epoch, batch, process).

    Dropout and criteria that use random numbers then give the same results in a resumed run as in an uninterrupted one.
    The seed is that of `seed_everything`, or otherwise the initial seed of PyTorch.
    """

    def __init__(self) -> None:
        self._seed = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look up the seed."""
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed PyTorch's generators of the CPU and of the device."""
        name = fingerprint(self._seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        seed = int(name[:15], 16)  # 60 bits
        devices.seed(pl_module.device, seed)
