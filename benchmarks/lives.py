"""Run `lkd fit` in processes that may be killed, and compare the final state of the run.

A life is one process of a run. The next process resumes the run (`--resume`). The final state is compared with that of
an uninterrupted run.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.warm import CONTEXT

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns about repeated steps in each resumed run
_OWN = re.compile(r"images_per_s|/epoch_loop\.val_loop\.")
"""Values that differ between equal runs: throughput, and the batch counter of the last validation in a process."""


class Life(NamedTuple):
    """Result of one process: its exit code (negative: the signal that killed it) and its output."""

    code: int
    text: str


def live(args: Sequence[str], folder: Path, seconds: float | None = None, fault: str = "") -> Life:
    """Run one process of `lkd`.

    Args:
        args: Arguments of the command line.
        folder: Working directory.
        seconds: Time after which the process is killed; `None` disables the limit.
        fault: `module:function,argument,...` to call in the process before the command.
    """
    log = folder / "log.txt"
    process = CONTEXT.Process(target=_work, args=(list(args), folder, log, fault))
    process.start()
    process.join(seconds)
    process.kill()  # no effect if the process has ended
    process.join()
    return Life(int(process.exitcode or 0), log.read_text() if log.is_file() else "")


def _work(args: list[str], folder: Path, log: Path, fault: str) -> None:
    os.chdir(folder)
    os.environ["LKD_CACHE"] = str(folder / "cache")
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # data-loader workers then watch this process
    torch.set_num_threads(1)
    if fault:
        import importlib

        module, _, call = fault.partition(":")
        name, *arguments = call.split(",")
        getattr(importlib.import_module(module), name)(*arguments)
    from lkd.__main__ import main

    sys.exit(main(args))


def live_in_group(args: Sequence[str], folder: Path, seconds: float | None = None) -> Life:
    """Run `lkd` with several processes, which are killed together; see `live`."""
    environment = {**os.environ, "LKD_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lkd", *args]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait(120)
    return Life(code, (folder / "log.txt").read_text())


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Read all curves of a run with TensorBoard, except throughput: name to list of (step, value)."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    names = [name for name in events.Tags()["scalars"] if not _OWN.search(name)]
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in sorted(names)}


def state(run: Path, name: str) -> dict[str, Any]:
    """Read the state of a run by name: weights, optimizer, schedules, memory banks and loop counters."""
    content = torch.load(run / "checkpoints" / name, map_location="cpu", weights_only=True)
    content.pop("pytorch-lightning_version")
    found = {key.replace(run.name, "version"): _place(value, run.name) for key, value in _flat(content)}
    return {key: value for key, value in found.items() if not _OWN.search(key)}


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, (dict, list, tuple)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, part in parts for leaf in _flat(part, f"{name}/{key}")]
    return [(name, value)]


def _place(value: Any, version: str) -> Any:
    return value.replace(version, "version") if isinstance(value, str) else value


def differences(run: Path, whole: Path) -> list[str]:
    """List the parts of a run's final state that are not bitwise equal to those of an uninterrupted run."""
    found = []
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = state(run, name), state(whole, name)
        found += [f"{name}{key}" for key in sorted({*ours, *theirs}) if not _same(ours.get(key), theirs.get(key))]
    ours, theirs = curves(run), curves(whole)
    return found + [f"curve {key}" for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def until_done(one: Callable[[], Life], limit: int = 200) -> list[Life]:
    """Run lives one after the other until the run completes.

    Raises:
        RuntimeError: If a life fails instead of being killed, or if there are more than `limit` lives.
    """
    lives = []
    while not lives or lives[-1].code != 0:
        lives.append(one())
        if lives[-1].code not in (0, -signal.SIGKILL) or len(lives) > limit:
            raise RuntimeError(f"life {len(lives)} ended with exit code {lives[-1].code}:\n{lives[-1].text}")
    return lives


def timed(args: Sequence[str], folder: Path, group: bool = False) -> tuple[Life, float]:
    """Run a life without a time limit and return it with its duration in seconds."""
    start = time.monotonic()
    return (live_in_group if group else live)(args, folder), time.monotonic() - start
