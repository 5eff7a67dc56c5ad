"""Folder of a run, `runs/NAME/version_N`: reserved during setup, and removed if no step was trained."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from lkd.callbacks.checkpoint import locked
from lkd.checkpoints.find import read_checkpoint


class RunFolder:
    """Context manager that locks the folder of a resumed run, or reserves a folder for a new run.

    The folder of a new run is created as soon as its number is chosen, so runs that start simultaneously get different
    folders. On exit, the folder is removed unless it contains a config, which is saved after the first step.
    """

    def __init__(self) -> None:
        self._lock: int | None = None
        self._created: list[Path] = []  # parents first

    def lock(self, folder: Path) -> None:
        """Lock the folder of a resumed run.

        Raises:
            ValueError: If another process is training this run.
        """
        self._lock = locked(folder)

    def reserve(self, runs: Path) -> int:
        """Create the folder of a new run.

        Args:
            runs: Folder of all runs with this name.

        Returns:
            Number of the run.
        """
        for folder in reversed([runs, *runs.parents]):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                self._created.append(folder)
        names = [path.name.removeprefix("version_") for path in runs.iterdir()]
        number = max((int(name) for name in names if name.isdigit()), default=-1) + 1
        while True:
            try:
                (runs / f"version_{number}").mkdir()
                break
            except FileExistsError:  # another run has started simultaneously
                number += 1
        self._created.append(runs / f"version_{number}")
        return number

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
        if not self._created or (self._created[-1] / "config.yaml").exists():
            return
        shutil.rmtree(self._created[-1], ignore_errors=True)
        with suppress(OSError):  # not empty
            for folder in reversed(self._created[:-1]):
                folder.rmdir()


def described(checkpoint: Path) -> str:
    """Return the path of a checkpoint and, for the best checkpoint, the monitored value."""
    for state in read_checkpoint(checkpoint).get("callbacks", {}).values():
        score = state.get("current_score")
        if state.get("monitor") and score is not None and checkpoint.stem.startswith("best"):
            return f"{checkpoint}, {state['monitor']} {float(score):.4f}"
    return str(checkpoint)
