"""Train the cells of a plan one after another, each in its own process."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results.cell import check, train
from benchmarks.results.plan import Cell
from benchmarks.results.store import Store, sha256

GRACE = 60.0
"""Time in seconds for a cell to write its checkpoint after SIGTERM, before it is killed."""
_POLL = 2.0
"""Interval in seconds between checks for cells finished by other processes."""


class Clock:
    """Time limit.

    Args:
        minutes: The limit, counted from now; `None` disables it.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self.grace = GRACE if minutes is None else min(GRACE, 60 * minutes / 5)

    @property
    def left(self) -> float | None:
        """Seconds until the cells have to stop; `None` without a limit."""
        return None if self._end is None else max(0.0, self._end - self.grace - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether the cells have to stop."""
        return self.left is not None and self.left <= 0


def work(cells: Sequence[Cell], store: Store, data: Path | None, clock: Clock) -> int:
    """Train all unfinished cells in order, until the time limit is reached.

    Cells that another process trains are skipped; cells whose teacher it trains are trained later.

    Args:
        cells: The cells.
        store: The store.
        data: Folder of the images; `None` uses that of the configs.
        clock: The time limit.

    Returns:
        The exit code: 0, also if the time limit is reached, or 1 if a cell failed.

    Raises:
        ValueError: If the weights of a finished teacher are missing or changed, or if a setting is invalid.
    """
    for cell in {(cell.pair, cell.recipe, cell.method): cell for cell in cells}.values():
        if not store.run(cell.id).exists() and store.result(cell.id) is None:
            check(cell)
    for teacher in {cell.teacher for cell in cells if cell.teacher and store.finished(cell) is None}:
        result, weights = store.result(teacher), store.weights(teacher)
        if result is not None and not (weights.is_file() and sha256(weights) == result["best"]["weights"]):
            raise ValueError(
                f"{weights} is missing or changed, although this teacher is finished; restore it, or delete "
                f"{store.folder}/results/{teacher}.json to train the teacher and its students again"
            )
    failed: set[str] = set()
    while not clock.is_over:
        hopeless = {cell.id for cell in cells if cell.teacher in failed} | failed
        left = [cell for cell in cells if cell.id not in hopeless and store.finished(cell) is None]
        if not left:
            break
        if not any(_tried(cell, store, data, clock, failed) for cell in left if store.is_ready(cell)):
            time.sleep(_POLL)  # other processes are training the remaining cells
    done = sum(store.finished(cell) is not None for cell in cells)
    print(f"{done} of {len(cells)} cells are finished", flush=True)
    return 1 if failed else 0


def _tried(cell: Cell, store: Store, data: Path | None, clock: Clock, failed: set[str]) -> bool:
    """Train a cell unless another process does; return whether the lock was acquired."""
    with store.claimed(cell.id) as is_free:
        if not is_free:
            return False
        if store.finished(cell) is not None:  # finished by another process in the meantime
            return True
        print(f"{cell.id} ...", flush=True)
        code = in_process(train, (cell, store, data), clock)
    result = store.finished(cell)
    if result is not None:
        best, last = result["best"], result["last"]
        print(
            f"  test {best.get('metric', 'accuracy')} {best['test']:.2f} % (best), {last['test']:.2f} % (last)",
            flush=True,
        )
    elif code in (-signal.SIGTERM, 128 + signal.SIGTERM) or clock.is_over:
        print("  interrupted; the same command continues it", flush=True)
    else:
        failed.add(cell.id)
        log = store.run(cell.id) / "log.txt"
        reason = log.read_text().splitlines()[-1:] if log.is_file() else []
        print(f"  failed with exit code {code}: see {log}", *reason, sep="\n  ", flush=True)
    return True


def in_process(function: Callable[..., None], arguments: tuple[Any, ...], clock: Clock) -> int | None:
    """Call a function in a forked process, which receives SIGTERM at the time limit or if this process stops.

    Args:
        function: The function.
        arguments: Arguments of the function.
        clock: The time limit.

    Returns:
        The exit code; a negative value is the signal that ended the process.
    """
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    try:
        process.join(clock.left)
    finally:
        if process.is_alive():
            process.terminate()
            process.join(clock.grace)
            process.kill()  # no effect if the process has ended
            process.join()
    return process.exitcode
