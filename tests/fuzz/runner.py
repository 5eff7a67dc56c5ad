"""Read inputs in a separate process with limits, and detect crashes, hangs and executed code."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

READERS = ("config", "weights", "checkpoint", "images", "cache")
SECONDS = 60.0  # wall-clock time, which also elapses during a hang; generous for busy machines
_MEMORY = "/dev/shm"
_START = 300.0  # seconds for imports and preparation
_ADDRESS_SPACE = 6 * 2**30  # bytes in addition to those at the start of the process
_PLAIN = ("accepted", "accepted (some images skipped)", "rebuilt")


@dataclass
class Result:
    """Results of a reader's inputs."""

    kinds: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, 0)
    largest: tuple[int, int] = (0, 0)

    def add(self, index: int, kind: str, seconds: float, memory: int) -> None:
        """Count one input."""
        self.kinds[kind] += 1
        self.seconds += seconds
        self.slowest, self.largest = max(self.slowest, (seconds, index)), max(self.largest, (memory, index))


def fuzz(readers: list[str], indices: range, seed: int, processes: int = 2) -> Iterator[tuple[str, Result]]:
    """Feed inputs to each reader; an input is a function of reader, seed and index.

    Args:
        readers: Names from `READERS`.
        indices: Indices of the inputs.
        seed: Seed of the inputs.
        processes: Number of readers that run at the same time.

    Yields:
        Each reader that has finished, and its results.
    """
    with ThreadPoolExecutor(processes) as pool:
        waiting = {pool.submit(_fuzz, name, indices, seed): name for name in readers}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def _fuzz(name: str, indices: range, seed: int) -> Result:
    result, waiting = Result(), list(indices)
    context = multiprocessing.get_context("spawn")  # a forked process would wait for the threads of this one
    with tempfile.TemporaryDirectory(dir=_MEMORY if Path(_MEMORY).is_dir() else None) as folder:
        while waiting:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, name, waiting, seed, folder), daemon=True)
            process.start()
            theirs.close()
            done = _listen(ours, name, waiting, result)
            if done < len(waiting):
                process.join(0.5)
                how = f"killed by signal {-process.exitcode}" if process.exitcode else f"no end in {SECONDS:.0f} s"
                result.findings.append(f"{name} {waiting[done]}: {how}")
                result.add(waiting[done], "finding", SECONDS, 0)
                done += 1
            process.kill()
            process.join()
            waiting = waiting[done:]
    return result


def _listen(pipe: Connection, name: str, waiting: list[int], result: Result) -> int:
    """Receive the results of the process and return the number of inputs that it has read."""
    told = pipe.recv() if pipe.poll(_START) else "it takes too long"
    if told != "ready":
        raise RuntimeError(f"the fuzz of {name} cannot begin: {told}")
    for done, index in enumerate(waiting):
        try:
            if not pipe.poll(SECONDS):
                return done
            kind, message, seconds, memory = pipe.recv()
        except EOFError:
            return done
        if message:
            result.findings.append(f"{name} {index}: {message}")
        result.add(index, "finding" if message else kind, seconds, memory)
    return len(waiting)


def _work(pipe: Connection, name: str, waiting: list[int], seed: int, folder: str) -> None:
    import torch

    from tests.fuzz import canary, pickles

    torch.set_num_threads(1)
    os.environ["LKD_CACHE"] = f"{folder}/cache"
    os.chdir(folder)
    pickles.bystanders(Path(folder))
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # messages of the readers about each file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    canary.install()
    try:
        module = importlib.import_module(f"tests.fuzz.{name}")
        own = module.Fuzz()
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise
    limit = _status("VmSize") + _ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    pipe.send("ready")
    for index in waiting:
        path = own.make(random.Random(f"{name} {seed} {index}"), Path(folder))
        pipe.send(_read(own, module, path))


def _read(own: Any, module: Any, path: Path) -> tuple[str, str, float, int]:
    """Read one input and return its outcome, what is wrong with it, seconds, and bytes of memory."""
    from tests.fuzz import canary, pickles

    canary.heard.clear()
    harm = Path(pickles.HARM)
    harm.unlink(missing_ok=True)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak memory
    before, start = _status("VmRSS"), time.perf_counter()
    canary.listen(True)
    wrong = ""
    try:
        kind = own.read(path)
        wrong = "" if kind in _PLAIN else f"said {kind}"
    except module.REFUSALS as error:
        kind = type(error).__name__
        if "\n" in str(error) and module.__name__ != "tests.fuzz.config":  # `explain` joins the lines of this parser
            wrong = f"{kind} of several lines: {error}"[:300]
    except BaseException as error:
        kind, wrong = type(error).__name__, f"{type(error).__name__}: {error}"[:300]
    canary.listen(False)
    seconds, memory = time.perf_counter() - start, max(0, _status("VmHWM") - before)
    if harm.exists():
        canary.heard.append(f"the file {harm}")
    if canary.heard:
        wrong = f"something was run: {', '.join(canary.heard)}"
    elif memory > module.MEMORY:
        wrong = wrong or f"{memory / 2**20:,.0f} MiB of memory"
    return kind, " ".join(wrong.split()), seconds, memory


def _status(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {what}")
