"""Training loops in processes of their own, of which one at a time takes some steps and is timed.

So all of them see the same machine, however busy it is: what is compared was measured in turn, again and again.
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


class Pace:
    """Lets a loop take as many steps as it is told to, and reports how long they took.

    Args:
        pipe: The other end is a `Row`'s.
    """

    current: Pace

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._left, self._images = 0, 0
        self._since = 0.0

    def wait(self) -> None:
        """Wait for the first order."""
        self._left, self._images = self._pipe.recv(), 0
        self._since = time.perf_counter()

    def step(self, images: int) -> None:
        """One step was taken.

        Args:
            images: How many it trained on.
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
        pipe.send(("failed", "the loop has ended"))
    except EOFError:  # no more orders
        return
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


@dataclass
class Row:
    """One loop of a benchmark.

    Args:
        name: What it is called.
        loop: `module:function`, called with a `Pace` and the arguments; it trains without end.
        arguments: What else it is called with.
        warm_up: Steps before the first that counts, behind the very first.

    Attributes:
        speeds: Images per second of each round.
        first: Images per second while warming up.
        start_up: Seconds from the process's start to the end of its first step.
        peak: The largest resident memory so far, in bytes.
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
        context = multiprocessing.get_context("spawn")
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
        """Take some steps, and remember the images per second."""
        self.speeds.append(self._take(steps))

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.kill()
        self._process.join()

    @property
    def speed(self) -> float:
        """Images per second: the median of the rounds."""
        return statistics.median(self.speeds)


def in_turn(rows: list[Row], rounds: int, steps: int, say: Callable[[str], None]) -> None:
    """Let each row take some steps, round after round."""
    for number in range(rounds):
        for row in rows:
            row.run(steps)
        say(f"round {number + 1} of {rounds}")
