"""Time training loops in separate processes, which take turns.

Only one process runs at a time, and the turns repeat, so other load on the machine affects all loops alike.
"""

from __future__ import annotations

import importlib
import multiprocessing
import resource
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

START_METHOD = "spawn"
"""How processes start. The time that a new one takes is part of the result; tests fork from a warm one instead."""


class Pace:
    """Let a loop take the requested number of steps, and report their duration.

    Args:
        pipe: Connection to a `Row`.
    """

    current: Pace

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._left, self._images = 0, 0
        self._since = 0.0

    def wait(self) -> None:
        """Wait for the next request."""
        self._left, self._images = self._pipe.recv(), 0
        self._since = time.perf_counter()

    def step(self, images: int) -> None:
        """Count one step.

        Args:
            images: Number of images of the step.
        """
        self._left -= 1
        self._images += images
        if self._left == 0:
            seconds = time.perf_counter() - self._since
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            self._pipe.send(("done", self._images, seconds, peak))
            self.wait()


def _serve(pipe: Connection, loop: str, arguments: dict[str, Any]) -> None:
    module, _, name = loop.partition(":")
    try:
        pace = Pace.current = Pace(pipe)
        getattr(importlib.import_module(module), name)(pace, **arguments)
        pipe.send(("failed", "the loop ended"))
    except EOFError:  # no more requests
        return
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


@dataclass
class Row:
    """One loop of a benchmark.

    Args:
        name: Name of the row.
        loop: `module:function`, called with a `Pace` and the arguments; it trains indefinitely.
        arguments: Keyword arguments of the loop.
        warm_up: Number of untimed steps after the first one.

    Attributes:
        speeds: Images per second of each round.
        first: Images per second during warm-up.
        start_up: Seconds from the start of the process to the end of its first step.
        peak: Peak resident memory so far, in bytes.
    """

    name: str
    loop: str
    arguments: dict[str, Any]
    warm_up: int = 10
    speeds: list[float] = field(default_factory=list)
    first: float = 0.0
    start_up: float = 0.0
    peak: int = 0

    def __post_init__(self) -> None:
        start = time.perf_counter()
        context = multiprocessing.get_context(START_METHOD)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.loop, self.arguments))
        self._process.start()
        theirs.close()
        self._take(1)
        self.start_up = time.perf_counter() - start
        self.first = self._take(self.warm_up)

    def _take(self, steps: int) -> float:
        self._pipe.send(steps)
        state, *rest = self._pipe.recv()
        if state != "done":
            raise RuntimeError(f"{self.name}: {rest[0]}")
        images, seconds, self.peak = rest
        return float(images / seconds)

    def run(self, steps: int) -> None:
        """Take some steps and record the images per second."""
        self.speeds.append(self._take(steps))

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.kill()
        self._process.join()

    @property
    def speed(self) -> float:
        """Median of the images per second over the rounds."""
        return statistics.median(self.speeds)


def in_turn(rows: list[Row], rounds: int, steps: int, say: Callable[[str], None]) -> None:
    """Let the rows take turns, round after round."""
    for number in range(rounds):
        for row in rows:
            row.run(steps)
        say(f"round {number + 1} of {rounds}")
