"""Signals that stop a run once its state can be saved."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

_WAIT = b"\nlkd: saving a checkpoint and stopping after this step; press Ctrl-C again to stop immediately\n"


class StopSignal:
    """Defers SIGTERM, Ctrl-C and SLURM's signal before a time limit, which Lightning would handle immediately.

    Attributes:
        received: Number of the received signal; `None` if there is none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._requeue: int | None = None
        self._before: dict[int, Any] = {}

    def watch(self, trainer: L.Trainer) -> None:
        """Install the signal handlers. Outside of the main thread, where Python does not allow this, do nothing."""
        self.received = None
        if threading.current_thread() is not threading.main_thread():
            return
        slurm = getattr(trainer.strategy, "cluster_environment", None)
        if slurm is None and SLURMEnvironment.detect():
            slurm = SLURMEnvironment()
        self._requeue = slurm.requeue_signal if isinstance(slurm, SLURMEnvironment) and slurm.auto_requeue else None
        for number in (signal.SIGTERM, signal.SIGINT, self._requeue):
            if number is not None and number not in self._before:
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.received is not None:
                raise KeyboardInterrupt
            os.write(2, _WAIT)  # the signal may have interrupted a print, which is not reentrant
        if self._requeue is None or self.received != self._requeue:  # SLURM sends both before the time limit
            self.received = number

    def release(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def obey(self, trainer: L.Trainer) -> None:
        """Stop the run, and requeue its job after SLURM's signal.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            SIGTERMException: After any other signal, or if another process received the signal.
        """
        if self.received is not None and self.received == self._requeue and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", _slurm_job()], check=False)
        raise KeyboardInterrupt if self.received == signal.SIGINT else SIGTERMException


def _slurm_job() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
