"""What the processes of benchmarks/gpu.py run: checks of lkd on a GPU, and loops that are timed there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pty
import re
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.fx.experimental.optimization import fuse
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.loops import BATCH, MEAN, STD, kd, networks
from benchmarks.pacing import Pace
from lkd import CIFAR10DataModule, DistillModule
from lkd.models import resnet56

Checks = dict[str, Callable[[], str]]
"""Title of each check to the function that does it: it returns a remark, or raises."""

RANDOM = {
    "mgd": "the masks are random",
    "vitkd": "the masks are random",
    "crd": "the negatives are random",
    "dkd_crd_at": "CRD's negatives are random",
}
"""Overlays whose criterion draws from the device's generator: CPU and GPU draw other numbers from the same seed."""
BEFORE = {
    "takd": ["assistant"],
    "multi_teacher": ["assistant"],
    "born_again_ensemble": ["born_again", "born_again"],
}
"""Complete configs that need runs of others."""
PAIRS = {"deit": "resnet56_deit_tiny_100", "vitkd": "deit_small_deit_tiny_100"}
SHORT = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]
EXACT = ["--trainer.precision=32-true", "--trainer.deterministic=warn"]


class LeftOut(Exception):  # noqa: N818  # no error
    """A check that does not apply, and why."""


# ----- processes -----


def serve_checks(pipe: Connection, folder: str, threads: int) -> None:
    """Do one check after the other, in a folder of its own each, until the pipe is closed.

    Args:
        pipe: Brings `(number, module:function, arguments)`; takes the titles, then each result, then None.
        folder: Where the folders are made.
        threads: Threads on the CPU.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    while True:
        try:
            number, function, arguments = pipe.recv()
        except EOFError:
            return
        place = Path(folder, f"check_{number}")
        place.mkdir()
        os.chdir(place)
        os.environ["LKD_CACHE"] = str(place / "cache")
        with open("log.txt", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
        checks: Checks = {}
        try:
            checks = _found(function)(**arguments)
        except BaseException:
            checks = {"start": _raising(traceback.format_exc())}
        pipe.send(list(checks))
        for check in checks.values():
            pipe.send(_result(check))
        pipe.send(None)
