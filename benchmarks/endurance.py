"""Measure whether a process leaks memory, over thousands of epochs and over repeated calls of `fit`.

    python -m benchmarks.endurance [--epochs 2000] [--worker_epochs 400] [--cycles 20] [--out FILE]

Runs `lkd fit` on the digits, with augmentation, mixing, validation, TensorBoard and two checkpoints in every epoch.
Each run has its own process and measures itself. RSS is the resident set size, and peak RSS the largest one so far;
both include the current worker processes, and so does private memory. Tensors, modules and objects are those tracked by
Python's garbage collector, after a collection. Each call of `fit` adds six objects of torch.fx, which keeps the source
of traced code (the folded teacher) for tracebacks.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from benchmarks.speed import machine

HEAD = (
    "# Memory use of long runs",
    "",
    "`python -m benchmarks.endurance` measures whether a process leaks memory, over thousands of epochs and over",
    "repeated calls of `fit`. RSS is the resident set size, and peak RSS the largest one so far; both include the",
    "worker processes, and so does private memory. Tensors, modules and objects are those tracked by Python's garbage",
    "collector. Each call of `fit` adds six objects of torch.fx, which keeps the source of traced code for",
    "tracebacks.",
    "",
)
"""Title and introduction of the report."""

SETTINGS = """
data:
  init_args:
    augment:
      - {class_path: lkd.datamodules.RandomCrop, init_args: {padding: 1}}
    mix: {class_path: lkd.datamodules.Mixup, init_args: {alpha: 0.2}}
trainer: {accelerator: cpu, enable_progress_bar: false}
"""


class Look(NamedTuple):
    """Resources of a process and its workers.

    Args:
        at: Number of the epoch or of the call of `fit`.
        peak: Peak RSS so far, in bytes.
        resident: RSS, in bytes.
        own: Private memory (not shared with other processes), in bytes.
        files: Number of open files.
        threads: Number of threads, including those not created by Python.
        tensors: Number of tensors tracked by the garbage collector.
        modules: Number of modules tracked by the garbage collector.
        objects: Number of objects tracked by the garbage collector.
        workers: Number of child processes.
    """

    at: int
    peak: int
    resident: int
    own: int
    files: int
    threads: int
    tensors: int
    modules: int
    objects: int
    workers: int


def look(at: int) -> Look:
    """Measure this process and its children."""
    processes = ["self", *_children()]
    every = [_memory(process) for process in processes]
    peak, resident, own = (sum(part) for part in zip(*every, strict=True))
    files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))  # noqa: PTH208
    gc.collect()
    kinds = [type(thing) for thing in gc.get_objects()]
    tensors, modules = (sum(issubclass(kind, wanted) for kind in kinds) for wanted in (torch.Tensor, torch.nn.Module))
    return Look(at, peak, resident, own, files, threads, tensors, modules, len(kinds), len(processes) - 1)


def _children() -> list[str]:
    return Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()


def _memory(process: str) -> tuple[int, int, int]:
    """Return peak RSS, RSS and private memory of a process, in bytes."""
    status = _numbers(Path(f"/proc/{process}/status"))
    smaps = _numbers(Path(f"/proc/{process}/smaps_rollup"))
    return status["VmHWM"], status["VmRSS"], smaps["Private_Clean"] + smaps["Private_Dirty"]


def _numbers(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(number) for name, number, _ in lines}


class Watch(L.Callback):
    """Measure the process at regular intervals during training.

    Args:
        file: File to which measurements are appended, one line of JSON each.
        every: Number of epochs between measurements.
    """

    def __init__(self, file: str, every: int) -> None:
        self.file, self.every = file, every

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure, after the previous epoch is complete."""
        if trainer.current_epoch and trainer.current_epoch % self.every == 0:
            _write(self.file, look(trainer.current_epoch))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure for the last time."""
        _write(self.file, look(trainer.current_epoch))


def _write(file: str, seen: Look) -> None:
    with Path(file).open("a") as out:
        out.write(json.dumps(seen) + "\n")


def fits(settings: Sequence[str], number: int, file: str) -> None:
    """Run `lkd fit` repeatedly in this process; if more than once, measure after each run."""
    from lkd.__main__ import main as lkd

    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        for done in range(1, number + 1):
            code = lkd(["fit", *settings])
            if code:
                raise RuntimeError(f"lkd fit ended with exit code {code}")
            if number > 1:
                _write(file, look(done))


class Variant(NamedTuple):
    """A run to measure.

    Args:
        name: Heading of its table.
        settings: Arguments of `lkd fit`, in addition to the config of the digits and `SETTINGS`.
        epochs: Number of epochs.
        every: Number of epochs between measurements.
        fits: Number of runs in the same process; if more than one, measurements follow each run instead.
    """

    name: str
    settings: tuple[str, ...]
    epochs: int
    every: int
    fits: int = 1


def watched(variant: Variant, folder: str) -> list[Look]:
    """Run a variant in a new process and return its measurements.

    Raises:
        RuntimeError: If the run fails.
    """
    config, file = Path(folder, "settings.yaml"), Path(folder, "looks.jsonl")
    config.write_text(SETTINGS)
    file.unlink(missing_ok=True)
    settings = ["--config=digits/kd", f"--config={config}", f"--trainer.max_epochs={variant.epochs}"]
    settings += [f"--trainer.default_root_dir={folder}", *variant.settings]
    if variant.fits == 1:
        settings += ["--trainer.callbacks+=benchmarks.endurance.Watch"]
        settings += [f"--trainer.callbacks.file={file}", f"--trainer.callbacks.every={variant.every}"]
    process = multiprocessing.get_context("spawn").Process(target=fits, args=(settings, variant.fits, str(file)))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{variant.name} ended with exit code {process.exitcode}")
    return [Look(*json.loads(line)) for line in file.read_text().splitlines()]


def table(variant: Variant, seen: Sequence[Look]) -> Iterator[str]:
    """Yield the lines of a run's table, in Markdown, and the growth of its peak memory."""
    yield f"## {variant.name}"
    yield ""
    unit = "epoch" if variant.fits == 1 else "fit"
    yield f"| {unit} | peak RSS, MB | RSS, MB | private, MB | files | threads | tensors | modules | objects |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for one in seen:
        sizes = " | ".join(f"{size / 1e6:,.1f}" for size in (one.peak, one.resident, one.own))
        counts = " | ".join(f"{count:,}" for count in (one.files, one.threads, one.tensors, one.modules, one.objects))
        yield f"| {one.at:,} | {sizes} | {counts} |"
    first, last = seen[0], seen[-1]
    yield ""
    growth = round(last.peak / first.peak - 1, 4) + 0.0  # avoids -0.00 %: the kernel's peak is approximate
    yield f"Peak memory from {unit} {first.at:,} to {last.at:,}: {growth:+.2%}."
    yield ""


def variants(epochs: int, worker_epochs: int, cycles: int) -> list[Variant]:
    """Return the runs to measure."""
    kept, workers = "--teacher_cache.versions=4", "--data.init_args.num_workers=2"
    return [
        Variant("Teacher run in every step", (), epochs, max(1, epochs // 20)),
        Variant("Cached teacher logits", (kept,), epochs, max(1, epochs // 20)),
        Variant("Two persistent workers", (workers,), worker_epochs, max(1, worker_epochs // 4)),
        Variant(f"{cycles} runs of 3 epochs in one process", (kept,), 3, 1, cycles),
        Variant(f"{cycles} runs of 3 epochs in one process, two workers", (workers,), 3, 1, cycles),
    ]


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--worker_epochs", type=int, default=400)
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[""], help="runs whose name contains one of these words")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = list(HEAD)
    for variant in variants(options.epochs, options.worker_epochs, options.cycles):
        if any(word in variant.name for word in options.only):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["LKD_CACHE"] = folder  # no cached files of an earlier run
                lines += table(variant, watched(variant, folder))
            print(lines[-2], flush=True)
    lines += [machine()]
    print(lines[-1])
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
