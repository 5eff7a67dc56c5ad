"""The folder of a run, `runs/NAME/version_N`: reserved when the run is set up, removed if nothing was trained."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from lkd.callbacks.checkpoint import locked
from lkd.checkpoints.find import read_checkpoint


class RunFolder:
    """Holds a run's folder, as a context: its lock, and the folders that were created for it.

    A new run's folder is created when its number is chosen, so that two runs that start at once get different ones.
    When the context is left, it is removed if no step has succeeded: after the first one, it has a config.
    """

    def __init__(self) -> None:
        self._lock: int | None = None
        self._created: list[Path] = []  # parents first

    def lock(self, folder: Path) -> None:
        """Lock the folder of a run that is resumed.

        Raises:
            ValueError: If another process trains that run.
        """
        self._lock = locked(folder)

    def reserve(self, runs: Path) -> int:
        """Create the folder of a new run.

        Args:
            runs: The folder of all runs of its name.

        Returns:
            The run's number.
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
            except FileExistsError:  # another run has started at the same moment
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
        with suppress(OSError):  # a folder that is not empty
            for folder in reversed(self._created[:-1]):
                folder.rmdir()


def described(checkpoint: Path) -> str:
    """Return a checkpoint's path, with the score for which it was kept."""
    for state in read_checkpoint(checkpoint).get("callbacks", {}).values():
        score = state.get("current_score")
        if state.get("monitor") and score is not None and checkpoint.stem.startswith("best"):
            return f"{checkpoint}, {state['monitor']} {float(score):.4f}"
    return str(checkpoint)
