"""Runs of lkd in a worker process of benchmarks/gpu.py, and the main loop of a worker."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from benchmarks.gpu_workers import function_at

Checks = dict[str, Callable[[], str]]
"""Titles of checks, each with a function that returns a remark or raises an exception if the check fails."""

ON_CPU = ["--trainer.accelerator=cpu", "--speed.channels_last=false"]
"""With only AVX2, torch 2.14 computes wrong gradients of channels-last convolutions with 1x1 kernels and strides."""


class NotApplicable(Exception):  # noqa: N818  # not an error
    """The reason why a check does not apply."""


def serve_checks(pipe: Connection, folder: str, threads: int) -> None:
    """Run checks until the pipe is closed, each job in its own folder.

    Args:
        pipe: Receives `(number, module:function, arguments)`; sends the titles, then each result.
        folder: Parent of the folders.
        threads: Number of CPU threads.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    warnings.simplefilter("always")  # in each run of a process, not only in the first one
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    while True:
        try:
            number, function, arguments = pipe.recv()
        except EOFError:
            return
        _enter(Path(folder, f"check_{number}"))
        try:
            checks = function_at(function)(**arguments)
        except Exception as error:
            checks = {"preparation": partial(_raise, error)}
        pipe.send(list(checks))
        for check in checks.values():
            pipe.send(_result(check))


def _enter(place: Path) -> None:
    """Create a folder, make it the working directory, and redirect output to its `log.txt`."""
    place.mkdir(parents=True)
    os.chdir(place)
    os.environ["LKD_CACHE"] = str(place / "cache")
    with Path("log.txt").open("w") as log:
        _print_to(log.fileno())


def _print_to(file: int) -> None:
    """Redirect the output of this process to an open file."""
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))


def print_to_terminal(log: str) -> None:
    """Redirect the output of this process to a pseudo-terminal, whose contents are appended to a file."""
    ours, theirs = pty.openpty()
    with Path(log).open("a") as file:
        subprocess.Popen(["cat"], stdin=ours, stdout=file, stderr=subprocess.DEVNULL)
    _print_to(theirs)


def _raise(error: Exception) -> str:
    raise error


def _result(check: Callable[[], str]) -> tuple[str, str, str]:
    """Run a check and return its outcome, remark and traceback."""
    try:
        return "ok", check(), ""
    except NotApplicable as reason:
        return "skipped", str(reason), ""
    except BaseException as error:  # SystemExit, too
        sentence = " ".join(f"{type(error).__name__}: {error}".split())
        log = Path("log.txt").read_text(errors="replace")[-4000:]
        return "FAILED", sentence[:250], f"{traceback.format_exc()}\nend of the log:\n{log}\n"


def command(*args: str) -> str:
    """Run one command of lkd in this process and return its output.

    Args:
        args: The arguments after `lkd`.

    Raises:
        RuntimeError: If its exit code is not 0.
    """
    from lkd.__main__ import main

    log = Path("log.txt")
    before = log.stat().st_size
    code = main([*args, "--debug"])
    sys.stdout.flush()
    text = log.read_bytes()[before:].decode(errors="replace")
    if code:
        raise RuntimeError(f"lkd {args[0]} ended with exit code {code}: {text.strip().splitlines()[-1:]}")
    return text


def trained_on(device: str) -> list[str]:
    """Return the arguments of `lkd fit` that select a device.

    Args:
        device: `cuda` or `cpu`.
    """
    there = ["--trainer.accelerator=gpu"] if device == "cuda" else ON_CPU
    return [*there, "--trainer.devices=1", "--trainer.num_sanity_val_steps=0"]


class Fit(NamedTuple):
    """A run of `lkd fit`: its optimizations, its losses, the student's final weights, and its output."""

    step: str
    losses: list[float]
    weights: dict[str, Tensor]
    text: str


def fit(folder: str, device: str, *settings: str, bar: bool = False) -> Fit:
    """Train with `lkd fit`.

    Args:
        folder: Folder of the run.
        device: `cuda` or `cpu`.
        settings: Arguments of `lkd fit`.
        bar: Whether to show the progress bar.
    """
    losses = {"class_path": f"{__name__}.Losses", "init_args": {"path": f"{folder}.json"}}
    always = [f"--trainer.default_root_dir={folder}", f"--trainer.enable_progress_bar={bar}".lower()]
    text = command("fit", *settings, *trained_on(device), *always, f"--trainer.callbacks+={json.dumps(losses)}")
    last = max(Path(folder).rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    state = torch.load(last, map_location="cpu", weights_only=True)["state_dict"]
    weights = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
    return Fit(step_of(text), json.loads(Path(f"{folder}.json").read_text()), weights, text)


def step_of(text: str) -> str:
    """Extract the list of optimizations from a run's output, and the reason if its CUDA graph was disabled.

    Args:
        text: Output of the run.
    """
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    found = re.search(r"^\s*(?:Step|Optimizations): (.*?)\s*$", plain, re.MULTILINE)
    failed = re.search(r"step runs without a graph: (.*?)(?:; --speed|$)", plain, re.MULTILINE)
    return (found[1] if found else "") + (f"; no CUDA graph ({failed[1]})" if failed else "")


def has_graph(step: str) -> bool:
    """Return whether a list of optimizations includes a CUDA graph of the step."""
    return "CUDA graph" in step and "no CUDA graph" not in step


class Losses(L.Callback):
    """Write the loss of every training step to a JSON file.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: str) -> None:
        self.path, self.losses = Path(path), list[float]()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the loss, unless synchronization with the GPU is an error."""
        if not (torch.cuda.is_available() and torch.cuda.get_sync_debug_mode()):
            self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the file."""
        self.path.write_text(json.dumps(self.losses))
