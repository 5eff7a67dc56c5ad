"""Rows of `python -m benchmarks.gpu --speed`: each row is a process, and the rows take turns."""

from __future__ import annotations

import argparse
import os
import pty
import re
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

from benchmarks import speed
from benchmarks.gpu_report import OUT_OF_TIME, Report
from benchmarks.gpu_workers import end_process, receive, start_process
from benchmarks.pacing import Row

START_SECONDS = 100.0
"""Time limit for starting a row, in seconds: imports, compilation, capture, warm-up."""
ROUND_SECONDS = 20.0
"""Time limit for the steps of one row in one round, in seconds."""
METHODS = ("at", "dkd", "crd", "reviewkd", "rkd", "sp", "fitnet", "mgd", "dist", "nkd")
EAGER = "bare loop, bf16"
COMPILED = f"{EAGER}, compiled"
GRAPHED = f"{EAGER}, CUDA graph, teacher folded"
FASTEST = f"{EAGER}, CUDA graph, compiled, teacher folded"
CACHE = "--teacher_cache.versions=1"


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether one of the regular expressions is found in a name."""
    return any(re.search(pattern, name) for pattern in patterns)


@dataclass
class GpuRow(Row):
    """Timed loop on a GPU; see `Row`.

    Args:
        batch: Batch size.
        bare: Name of the bare loop with the same optimizations.
        flops: FLOPs per image.
        group: Rows of one group are started together.
        reduced: Whether the row is part of the reduced form.
        outcome: `ok`, `FAILED` or `skipped`.
        failure: The reason for an outcome that is not `ok`.

    Attributes:
        steps: Number of steps per round; 0 if the row does not run.
        ratios: Speed divided by the speed of the first row, for each round.
        busy: Samples of the GPU's utilization, in percent.
        optimizations: List of optimizations printed by `lkd fit`.
    """

    batch: int = 128
    bare: str = ""
    flops: float = 0.0
    group: int = 0
    reduced: bool = False
    outcome: str = "ok"
    failure: str = ""
    steps: int = 0
    ratios: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    optimizations: str = ""

    def __post_init__(self) -> None:
        """Defer the start of the process to `start`."""

    def start(self, context: Any, seconds: float, deadline: float) -> None:
        """Start the process, warm up, and choose the number of steps per round, unless the row is skipped.

        Args:
            context: A context of `multiprocessing`.
            seconds: Desired duration of a round.
            deadline: Time at which the row is skipped if it is not ready, as a `time.monotonic()` value.
        """
        begin = time.monotonic()
        if self.failure or begin >= deadline:
            self._stop(OUT_OF_TIME, True)
            return
        self._end = min(begin + START_SECONDS, deadline)
        try:
            self._pipe, self._process = start_process(
                context, "benchmarks.gpu_loops:serve_loop", self.loop, self.arguments
            )
            self._take(1)
            self.start_up = time.monotonic() - begin
            self._take(self.warm_up)
            self.steps = max(1, round(seconds * self._take(10 if seconds > 0.1 else 1) / self.batch))
        except (RuntimeError, OSError, EOFError) as error:
            self._stop(str(error), time.monotonic() >= deadline)

    def turn(self, first: GpuRow, deadline: float) -> None:
        """Take the steps of a round, unless the row does not run.

        Args:
            first: The reference row, after its own turn.
            deadline: Time at which the row is stopped, as a `time.monotonic()` value.
        """
        begin = time.monotonic()
        if not self.steps or begin >= deadline:
            return
        self._end = min(begin + ROUND_SECONDS, deadline)
        try:
            self.run(self.steps)
        except (RuntimeError, OSError) as error:
            self._stop(str(error), time.monotonic() >= deadline)
        else:
            self.ratios += [self.speeds[-1] / first.speeds[-1]] if first.steps else []

    def _take(self, steps: int) -> float:
        self._pipe.send(steps)
        state, *rest = receive(self._pipe, self._process, self._end)
        if state != "done":
            raise RuntimeError(rest[0])
        images, seconds, resident = rest
        memory, self.optimizations = receive(self._pipe, self._process, self._end)
        self.peak = resident if memory is None else memory
        return float(images / seconds)

    def _stop(self, reason: str, is_late: bool) -> None:
        """End a row that cannot continue; after the deadline, its completed rounds count."""
        self.steps = 0
        self.close()
        if not (self.failure or (is_late and self.speeds)):
            self.outcome, self.failure = ("skipped", OUT_OF_TIME) if is_late else ("FAILED", reason)

    def close(self) -> None:
        """Kill the process, if it was started."""
        if hasattr(self, "_process"):
            end_process(self._pipe, self._process)


class Utilization:
    """GPU utilization reported by nvidia-smi ten times per second: `(time, percent)`."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
        self._process = None
        ours, theirs = pty.openpty()  # a pipe would be buffered
        with suppress(OSError):
            self._process = Popen(command, stdout=theirs, stderr=DEVNULL)
            threading.Thread(target=self._read, args=(ours,), daemon=True).start()
        os.close(theirs)

    def _read(self, terminal: int) -> None:
        with suppress(OSError), os.fdopen(terminal) as lines:  # reading from a closed terminal raises an error
            for line in lines:
                if line.strip().isdecimal():
                    self.samples.append((time.monotonic(), float(line)))

    def since(self, begin: float) -> list[float]:
        """Return the samples since a time."""
        return [percent for moment, percent in self.samples if moment >= begin]

    def close(self) -> None:
        """Stop nvidia-smi."""
        if self._process:
            self._process.kill()


@dataclass
class Bench:
    """Create the rows, time them and report them.

    Args:
        options: Options of the command line.
        context: A context of `multiprocessing`.
        folder: Folder of the images, the teacher and the runs of `lkd fit`.
        about: Description of the machine from `benchmarks.gpu_prepare:prepare`.
        report: Report to which results are added.
    """

    options: argparse.Namespace
    context: Any
    folder: Path
    about: dict[str, Any]
    report: Report

    def bare(self, name: str, *how: str, size: int = 128, **rest: Any) -> GpuRow:
        """Create a row with a bare loop; see `benchmarks.gpu_loops:Bare`."""
        size = 4 if self.options.reduced else size
        if "graph" in how and self.options.device != "cuda":
            rest |= {"outcome": "skipped", "failure": "needs CUDA"}
        arguments = {**self._plain(), "device": self.options.device, "how": how, "size": size}
        flops = self._flops("kept" in how)
        loop = "benchmarks.gpu_loops:bare"
        return GpuRow(f"bare loop, {name}", loop, arguments, self._warm_up(), batch=size, flops=flops, **rest)

    def lkd(self, name: str, *settings: str, bare: str = GRAPHED, size: int = 128, **rest: Any) -> GpuRow:
        """Create a row with a run of `lkd fit`; with cached logits, the warm-up fills the cache."""
        size, kept = 4 if self.options.reduced else size, CACHE in settings
        data = [f"--config={self.folder}/images.yaml", f"--data.init_args.batch_size={size}"]
        place = self.folder / re.sub(r"\W+", "_", name)
        arguments = speed.lkd(str(self.folder), self._plain()["teacher"], *data, *settings)
        arguments |= {"folder": str(place), "device": self.options.device}
        warm_up = self._warm_up() + kept * (self.about["number"] * 9 // 10 // size)
        rest |= {"batch": size, "bare": bare, "flops": self._flops(kept)}
        return GpuRow(f"lkd fit, {name}", "benchmarks.gpu_loops:lkd_fit", arguments, warm_up, **rest)

    def _plain(self) -> dict[str, str]:
        return {"images": f"{self.folder}/images.npy", "teacher": f"{self.folder}/teacher.pth"}

    def _flops(self, kept: bool) -> float:
        """Return the FLOPs per image: forward and backward pass of the student, forward pass of the teacher."""
        flops = self.about["flops"]
        return float(3 * flops["student"] + flops["teacher"] * (not kept))

    def _warm_up(self) -> int:
        return 1 if self.options.reduced else 20

    def rows(self) -> Iterator[GpuRow]:
        """Yield all rows; the first one is the reference."""
        bare, lkd = self.bare, self.lkd
        yield bare("fp32", reduced=True)
        yield bare("bf16", "bf16")
        for name, how in (("", []), (", teacher folded", ["folded"]), (", precomputed logits", ["kept"])):
            yield bare(f"bf16, CUDA graph{name}", "bf16", "graph", *how, reduced=not how)
            yield bare(f"bf16, CUDA graph, compiled{name}", "bf16", "graph", "compiled", *how, group=1)
        yield bare("bf16, compiled", "bf16", "compiled", group=1)
        no_graph, no_compile, compiled = "--speed.graph=off", "--speed.compile=off", "--speed.compile=default"
        yield lkd("eager", no_graph, no_compile, bare=EAGER)
        yield lkd("graph", no_compile)
        precomputed = f"{EAGER}, CUDA graph, precomputed logits"
        yield lkd("graph, cached logits", no_compile, CACHE, bare=precomputed, reduced=True)
        precomputed = f"{EAGER}, CUDA graph, compiled, precomputed logits"
        yield lkd("graph, compiled, cached logits", compiled, CACHE, bare=precomputed, group=1)
        yield lkd("reduce-overhead, graph off", no_graph, "--speed.compile=reduce-overhead", bare=FASTEST, group=1)
        yield lkd("graph, compiled", compiled, bare=FASTEST, group=1)
        yield lkd("compiled, graph off", no_graph, compiled, bare=COMPILED, group=1)
        for name in METHODS:
            yield lkd(f"graph, {name}", f"--config=methods/{name}", no_compile, group=2)
        for size in (64, 512):
            name = f"bf16, CUDA graph, compiled, teacher folded, batch size {size}"
            yield bare(name, "bf16", "graph", "folded", "compiled", size=size, group=3)
            yield lkd(f"graph, compiled, batch size {size}", compiled, size=size, bare=f"bare loop, {name}", group=3)

    def wanted(self) -> list[GpuRow]:
        """Return the first row and the selected rows."""
        first, *others = self.rows()
        chosen = [row for row in others if row.reduced or not self.options.reduced]
        chosen = [row for row in chosen if matches(row.name, self.options.only)]
        if self.options.trainer:
            arguments = {"adapter": str(Path(self.options.trainer).resolve()), **self._plain()}
            chosen.append(GpuRow(self.options.trainer, "benchmarks.loops:own", arguments, flops=first.flops))
        return [first, *chosen]

    def run(self, deadline: float) -> bool:
        """Time the rows, group by group, and return whether none failed.

        Args:
            deadline: Time at which the remaining rows are skipped, as a `time.monotonic()` value.
        """
        rows, utilization = self.wanted(), Utilization()
        try:
            for group in sorted({row.group for row in rows}):
                self._time(rows[0], [row for row in rows if row.group == group], utilization, deadline)
        finally:
            utilization.close()
            for row in rows:
                row.close()
        return not any(row.outcome == "FAILED" for row in rows)

    def _time(self, first: GpuRow, rows: Sequence[GpuRow], utilization: Utilization, deadline: float) -> None:
        """Start the rows of a group in parallel; then let them and the first row take turns."""
        rounds, seconds = self.options.rounds, self.options.round
        ready = deadline - 1.5 * rounds * seconds * (len(rows) + 1)
        with ThreadPoolExecutor(self.options.jobs) as pool:
            list(pool.map(lambda row: row.start(self.context, seconds, ready), rows))
        running = [row for row in rows if row.steps and row is not first]
        for _ in range(rounds if any(row.steps for row in rows) else 0):
            for row in (first, *running):
                begin = time.monotonic()
                row.turn(first, deadline)
                row.busy += utilization.since(begin)
        for row in rows:
            self._report(row)
            if row is not first:
                row.close()

    def _report(self, row: GpuRow) -> None:
        if row.failure:
            last = row.failure.strip().splitlines()[-1][:250]
            self.report.add("speed", row.name, row.outcome, last, row.failure if row.outcome == "FAILED" else "")
        elif not row.speeds:
            self.report.add("speed", row.name, "skipped", OUT_OF_TIME)
        else:
            measured: dict[str, Any] = {name: getattr(row, name) for name in ("speeds", "ratios", "batch", "flops")}
            measured |= {"memory": row.peak / 1e6, "start_up": row.start_up, "bare": row.bare}
            measured["busy"] = statistics.mean(row.busy) if row.busy else None
            self.report.add("speed", row.name, "ok", row.optimizations, **measured)
            ratio = f", {statistics.median(row.ratios):.2f} times the first row" if row.ratios else ""
            print(f"    {row.speed:,.0f} images/s{ratio}", flush=True)
