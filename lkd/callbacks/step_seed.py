"""Random numbers that do not depend on what happened before."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import torch

from lkd import devices
from lkd.io.tensor_cache import fingerprint


class StepSeed(L.Callback):
    """Before each training step, seed the global random numbers from (seed, epoch, batch, process).

    Dropout, and criteria that draw, then do in a step what they would have done in a run that had not been
    interrupted. The seed is that of `seed_everything`, or else what torch's generator began with.
    """

    def __init__(self) -> None:
        self._seed = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the seed."""
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed torch's generators: the CPU's, and the device's."""
        name = fingerprint(self._seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        seed = int(name[:15], 16)  # 60 bits
        devices.seed(pl_module.device, seed)
