"""Several processes that train together: when one ends the others do, and say why."""

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
"""Seconds between two looks at the process that has started this one."""

_GRACE = 10.0
"""Seconds for what remains to be done, as after a run that has ended well in both."""

_PATIENCE = 2.0
"""Seconds to find out which process has ended: less than Lightning's own observer gives them."""

_BROKEN = re.compile(r"gloo|NCCL|[Cc]onnection (was )?(closed|reset|refused|lost)|Broken pipe")


class LostProcessError(RuntimeError):
    """Another process has ended, so this one cannot go on."""


def rank() -> int | None:
    """This process's number among several; None if it is alone."""
    number = int(getattr(rank_zero_only, "rank", 0) or 0)
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return number if several or number else None


def speaker() -> str:
    """What a message begins with, where several processes may speak."""
    number = rank()
    return "" if number is None else f"rank {number}: "


@contextmanager
def bound_to_parent() -> Iterator[None]:
    """End this process when the one that has started it is gone: it would wait half an hour for an answer."""
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
        os._exit(1)  # the main thread waits inside of a library


def lost(error: RuntimeError, trainer: Any) -> str:
    """Which process has ended, if that is what an error comes from; otherwise empty.

    Args:
        error: What training ended with.
        trainer: Its trainer.
    """
    broken = isinstance(error, distributed.DistError) or _BROKEN.search(str(error))
    own = rank()
    if own is None or not broken:
        return ""
    started = getattr(trainer.strategy.launcher, "procs", [])  # by the first process alone
    end = time.monotonic() + _PATIENCE
    while started and time.monotonic() < end:
        for number, process in enumerate(started, start=1):
            if code := process.poll():
                return f"rank {number} has ended{_how(code)}"
        time.sleep(0.05)
    return f"rank {1 - own} has ended" if trainer.world_size == 2 else "another process has ended"


def _how(code: int) -> str:
    return f", killed by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
