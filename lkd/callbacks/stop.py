"""Signals that ask a run to stop: they wait until its state can be saved."""

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

_WAIT = b"\nlkd: stopping at the end of this step, with all saved; Ctrl-C once more stops at once\n"


class StopSignal:
    """Notes SIGTERM, Ctrl-C, or SLURM's signal before a time limit, in place of what Lightning does at once.

    Attributes:
        received: The signal that has come; None: none has.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._requeue: int | None = None
        self._before: dict[int, Any] = {}

    def watch(self, trainer: L.Trainer) -> None:
        """From here on, signals are noted; elsewhere than in the main thread, Python does not allow it."""
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
            os.write(2, _WAIT)  # print could be in the middle of another print
        if self._requeue is None or self.received != self._requeue:  # before its time limit SLURM sends both
            self.received = number

    def release(self) -> None:
        """From here on, signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def obey(self, trainer: L.Trainer) -> None:
        """Stop the run; under SLURM, see that the job comes again.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            SIGTERMException: After another signal, or one that another process has got.
        """
        if self.received is not None and self.received == self._requeue and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", _slurm_job()], check=False)
        raise KeyboardInterrupt if self.received == signal.SIGINT else SIGTERMException


def _slurm_job() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
