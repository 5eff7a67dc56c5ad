"""Distributed training: if one process ends, the others end as well and report the reason."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

_EVERY = 1.0
"""Interval between checks of the parent process, in seconds."""

_GRACE = 10.0
"""Time that a process has to finish after its parent has ended, in seconds; sufficient after a successful run."""

_PATIENCE = 2.0
"""Time to find the process that has ended, in seconds; shorter than the timeout of Lightning's own observer."""

_BROKEN = re.compile(r"gloo|NCCL|[Cc]onnection (was )?(closed|reset|refused|lost)|Broken pipe")


class LostProcessError(RuntimeError):
    """Raised if another process of the run has ended, so this one cannot continue."""


def rank() -> int | None:
    """Return the rank of this process; None if the run has a single process."""
    number = int(getattr(rank_zero_only, "rank", 0) or 0)
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return number if several or number else None


def speaker() -> str:
    """Return the prefix of error messages: the rank, if the run has several processes."""
    number = rank()
    return "" if number is None else f"rank {number}: "


@contextmanager
def bound_to_parent() -> Iterator[None]:
    """End this process after its parent has ended; collective operations would time out only after half an hour."""
    over = threading.Event()
    if rank():
        threading.Thread(target=_watch, args=(os.getppid(), over), daemon=True, name="parent-observer").start()
    try:
        yield
    finally:
        over.set()


def _watch(parent: int, over: threading.Event) -> None:
    while os.getppid() == parent:
        if over.wait(_EVERY):
            return
    if not over.wait(_GRACE):
        print(f"lkd: error: {speaker()}the process that started this one has ended", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread is blocked in a library


def lost(error: RuntimeError, trainer: Any) -> str:
    """Return which process has ended, if this caused an error; otherwise an empty string.

    Args:
        error: Exception that ended the training.
        trainer: Trainer of the run.
    """
    broken = isinstance(error, distributed.DistError) or _BROKEN.search(str(error))
    own = rank()
    if own is None or not broken:
        return ""
    started = getattr(trainer.strategy.launcher, "procs", [])  # on rank 0 only
    end = time.monotonic() + _PATIENCE
    while started and time.monotonic() < end:
        for number, process in enumerate(started, start=1):
            if code := process.poll():
                return f"rank {number} has ended{_how(code)}"
        time.sleep(0.05)
    return f"rank {1 - own} has ended" if trainer.world_size == 2 else "another process has ended"


def _how(code: int) -> str:
    return f", killed by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
