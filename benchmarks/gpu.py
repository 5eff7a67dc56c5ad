"""Checks of lkd on a GPU, and images per second there, of `lkd fit` and of bare PyTorch loops.

    python -m benchmarks.gpu --check [--jobs 8] [--minutes 4] [--only WORD ...] [--out FILE]
    python -m benchmarks.gpu --speed [--images FOLDER] [--teacher FILE] [--minutes 5] [--only WORD ...] [--out FILE]
    python -m benchmarks.gpu --full --images FOLDER --teacher FILE [--epochs 240] [--seconds 480] [-- FLAGS OF LKD FIT]

`--check` trains with every overlay of configs/methods and compares the GPU with the CPU, a CUDA graph with none, a
resumed run with a whole one, and cached logits with computed ones; it runs all commands, and strategies for several
processes. `--speed` times ResNet-56 teaching ResNet-20 as benchmarks/speed.py does: each row is a process, the rows
take their steps in turn, and the result is the ratio to the first row within a round. FOLDER has train/<class>/ and
test/<class>/ of CIFAR-10, FILE the weights of a ResNet-56 (shortcut A); by default, images are generated and the
weights are initial ones. `--full` is one complete run. What has not started after `--minutes` is left out and listed.

Results are appended to OUT.rows.jsonl as soon as they exist; OUT, in Markdown, shows the latest of each name.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pty
import re
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from itertools import count
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

from benchmarks.pacing import Row

ROOT = Path(__file__).parent.parent
WORK = "benchmarks.gpu_loops"
"""What the processes run: it imports torch, this file does not."""
PRELOADED = [WORK, "lkd.cli", "lkd.losses", "lkd.datamodules", "lkd.modules", "sklearn.datasets", "timm"]
PATIENCE = 200.0
"""Seconds until a process that does not answer is given up."""
METHODS = ("at", "dkd", "crd", "reviewkd", "rkd", "sp", "fitnet", "mgd", "dist", "nkd")
FASTEST = "bare loop, bf16, CUDA graph, compiled, teacher folded"
GRAPHED = "bare loop, bf16, CUDA graph, teacher folded"


class LostError(RuntimeError):
    """A process has ended, or does not answer."""


class Report:
    """Results: printed, appended to a file at once, and shown as Markdown.

    Args:
        out: The Markdown file; `None`: results are only printed.
        failures: File for tracebacks; `None`: they are printed.
    """

    def __init__(self, out: Path | None, failures: Path | None) -> None:
        self.out, self.failures = out, failures
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._side = out.with_name(f"{out.name}.rows.jsonl") if out else None
        if self._side and self._side.is_file():
            for line in self._side.read_text().splitlines():
                row = json.loads(line)
                self.rows[row["part"], row["name"]] = row

    def add(self, part: str, name: str, outcome: str, remark: str = "", trace: str = "", **rest: Any) -> None:
        """Add a result.

        Args:
            part: Which table it belongs to: `check`, `speed`, `full`, or `machine`.
            name: Its name there; an earlier result of that name is replaced.
            outcome: `ok`, `FAILED` or `left out`.
            remark: One sentence.
            trace: The traceback of a failure.
            rest: Measurements.
        """
        row = {"part": part, "name": name, "outcome": outcome, "remark": remark, **rest}
        with self._lock:
            self.rows[part, name] = row
            print(f"{name}: {outcome}{f': {remark}' if remark else ''}", flush=True)
            if self.out and self._side:
                with self._side.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                self.out.write_text("\n".join(self.lines()) + "\n")
            if trace and self.failures:
                with self.failures.open("a") as file:
                    file.write(f"===== {name}\n{trace}\n")
            elif trace:
                print(trace, file=sys.stderr)

    def part(self, part: str) -> list[dict[str, Any]]:
        """All results of a table."""
        return [row for (name, _), row in self.rows.items() if name == part]

    def lines(self) -> Iterator[str]:
        """The Markdown."""
        for part, table in (("check", check_table), ("speed", speed_table), ("full", full_table)):
            if rows := self.part(part):
                about = self.rows.get(("machine", part), {})
                yield from (f"## {part}", "", about.get("remark", ""), "", *table(rows, about), "")


def check_table(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> Iterator[str]:
    """The checks, and how many steps are CUDA graphs."""
    counts = Counter(row["outcome"] for row in rows)
    yield ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
    steps = [row["remark"] for row in rows if row["name"].endswith(": trains") and row["outcome"] == "ok"]
    reasons = Counter(_reason(step) for step in steps)
    yield "\nSteps: " + "; ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    yield "\n| check | result | remark |\n|---|---|---|"
    for row in rows:
        yield f"| {row['name']} | {row['outcome']} | {row['remark'].replace('|', '/')} |"


def _reason(step: str) -> str:
    """`with a CUDA graph`, or why a step is without."""
    found = re.search(r"no CUDA graph \((.*)\)", step)
    has_graph = "CUDA graph" in step and not found
    return "with a CUDA graph" if has_graph else f"without ({found[1] if found else 'not on this device'})"


def speed_table(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> Iterator[str]:
    """The timed rows."""
    ratios = {row["name"]: statistics.median(row["ratios"]) for row in rows if row.get("ratios")}
    yield "| | images/s | ms/step | ratio | its range | to the bare loop | TFLOP/s | of the peak | GPU memory, MB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        if row["outcome"] != "ok":
            yield f"| {row['name']} | {row['outcome']}: {row['remark']} |" + " |" * 7
            continue
        speed, peak = statistics.median(row["speeds"]), about.get("peak", float("inf"))
        ratio, spread = "", ""
        if row["ratios"]:
            ratio = f"{ratios[row['name']]:.2f}"
            spread = f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
        bare = f"{ratios[row['name']] / ratios[row['bare']]:.2f}" if ratio and row["bare"] in ratios else ""
        done = speed * row["flops"]
        cells = [row["name"], f"{speed:,.0f}", f"{1e3 * row['batch'] / speed:.2f}", ratio, spread, bare]
        cells += [f"{done / 1e12:.2f}", f"{done / peak:.2%}", f"{row['memory']:,.0f}"]
        yield f"| {' | '.join(cells)} |"
    yield "\n| | GPU busy | s to the first step | optimizations |\n|---|---|---|---|"
    for row in rows:
        if row["outcome"] == "ok":
            busy = "" if row["busy"] is None else f"{row['busy']:.0f} %"
            yield f"| {row['name']} | {busy} | {row['start_up']:.1f} | {row['remark']} |"


def full_table(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> Iterator[str]:
    """The complete runs."""
    for row in rows:
        yield f"- `{row['name']}`: {row['outcome']}: {row['remark']}"


def serve(name: str, *arguments: Any) -> None:
    """Call a function of `WORK`, in a process of its own."""
    getattr(importlib.import_module(WORK), name)(*arguments)


def answer(pipe: Any, process: Any, seconds: float) -> Any:
    """What a process sends next.

    Raises:
        LostError: If it ends instead, or sends nothing.
    """
    if not pipe.poll(seconds):
        raise LostError(f"no answer in {seconds:.0f} s")
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        process.join(10)
        raise LostError(f"the process ended with exit code {process.exitcode}") from None


@dataclass(frozen=True)
class Job:
    """Some checks.

    Args:
        name: What the titles of its checks begin with.
        function: `module:function` that returns the checks.
        arguments: What it is called with.
        alone: Whether it gets a process of its own, as it changes what the process's other jobs would see.
        part: Which table its results belong to.
        patience: Seconds for each check.
    """

    name: str
    function: str
    arguments: dict[str, Any]
    alone: bool = False
    part: str = "check"
    patience: float = PATIENCE


class Worker:
    """A process that runs jobs, one after the other."""

    def __init__(self, context: Any, folder: str, threads: int) -> None:
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=("serve_checks", theirs, folder, threads))
        self.process.start()
        theirs.close()
        self.pending: list[str] = []

    def run(self, number: int | str, job: Job) -> Iterator[tuple[str, str, str, str]]:
        """Run a job: title, outcome, remark and traceback of each check."""
        self.pending = ["preparation"]
        try:
            self._pipe.send((number, job.function, job.arguments))
        except OSError:
            raise LostError("the process had ended before") from None
        self.pending = answer(self._pipe, self.process, job.patience)
        while self.pending:
            result = answer(self._pipe, self.process, job.patience)
            yield self.pending.pop(0), *result

    def close(self) -> None:
        """End the process: an idle one ends by itself, any other is killed."""
        self._pipe.close()
        self.process.join(0.0 if self.pending else 1.0)
        self.process.kill()
        self.process.join()


class Workers:
    """Processes for jobs; one in which something failed is not used again.

    Args:
        context: Starts processes.
        folder: Where they work.
        jobs: How many there are at a time.
        report: Takes the results.
        deadline: When no further job is started.
    """

    def __init__(self, context: Any, folder: str, jobs: int, report: Report, deadline: float = float("inf")) -> None:
        self.context, self.folder, self.jobs, self.report, self.deadline = context, folder, jobs, report, deadline
        self._idle: list[Worker] = []
        self._all: list[Worker] = []
        self._numbers = count()

    def run(self, jobs: Sequence[Job]) -> bool:
        """Run jobs; whether none failed."""
        pool = ThreadPoolExecutor(self.jobs)
        try:
            return all([*pool.map(self._do, jobs)])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in self._all:
                worker.close()

    def _do(self, job: Job) -> bool:
        if time.monotonic() > self.deadline:
            self.report.add(job.part, job.name, "left out", "the time was up")
            return True
        worker, well = self._worker(job), True
        number = next(self._numbers)
        try:
            for title, outcome, remark, trace in worker.run(number, job):
                well = well and outcome != "FAILED"
                self.report.add(job.part, f"{job.name}: {title}", outcome, remark, trace)
        except LostError as error:
            well, remark = False, str(error)
            log = Path(self.folder, f"check_{number}", "log.txt")
            trace = f"{remark}; end of the log:\n{log.read_text(errors='replace')[-4000:] if log.is_file() else ''}"
            for title in worker.pending:
                self.report.add(job.part, f"{job.name}: {title}", "FAILED", remark, trace)
                remark, trace = "not run, as an earlier check ended the process", ""
        if well and not job.alone:
            self._idle.append(worker)
        else:
            worker.close()
        return well

    def _worker(self, job: Job) -> Worker:
        with suppress(IndexError):
            if not job.alone:
                return self._idle.pop()
        worker = Worker(self.context, self.folder, max(1, (os.cpu_count() or 1) // self.jobs))
        self._all.append(worker)
        return worker


def check_jobs(device: str, reduced: bool) -> list[Job]:
    """All checks; a few if `reduced`."""
    on = {"device": device}

    def job(title: str, function: str, alone: bool = False, **arguments: Any) -> Job:
        return Job(title, f"{WORK}:{function}", {**on, **arguments}, alone)

    def overlay(name: str) -> list[str]:
        return [f"--config={config}" for config in ("data/digits", "pairs/digits", f"methods/{name}")]

    few = [
        job("commands", "commands", few=reduced),
        job("resume, kd", "resumed", alone=True, settings=["--config=digits/kd"]),
        job("teacher cache", "cached", alone=True),
        job("waiting, kd", "unsynchronized", alone=True, settings=["--config=digits/kd"]),
        job("methods/kd", "overlay", name="kd"),
    ]
    if reduced:
        return few
    strategies = {"DDP, one process": "ddp", "FSDP2, one process": None}
    complete = sorted(path.stem for path in (ROOT / "configs/digits").glob("*.yaml"))
    overlays = sorted({path.stem for path in (ROOT / "configs/methods").glob("*.yaml")} - {"kd"})
    return [
        *few,
        *(job(name, "parallel", alone=True, strategy=strategy) for name, strategy in strategies.items()),
        *(job(f"resume, {name}", "resumed", alone=True, settings=overlay(name)) for name in ("crd", "dkd_crd_at")),
        job("waiting, kd, no graph", "unsynchronized", True, settings=["--config=digits/kd", "--speed.graph=off"]),
        *(job(f"waiting, {name}", "unsynchronized", True, settings=overlay(name)) for name in ("at", "crd", "mgd")),
        *(job(f"digits/{name}", "complete", name=name) for name in complete),
        *(job(f"methods/{name}", "overlay", name=name) for name in overlays),
    ]


@dataclass
class GpuRow(Row):
    """One loop that is timed; see `Row`.

    Args:
        batch: Images in a batch.
        bare: The bare loop with the same optimizations.
        flops: Operations for each image.
        group: Rows of one group are started together.
        reduced: Whether the row is timed in the reduced form.

    Attributes:
        steps: Steps in a round.
        busy: Utilization of the GPU in each sample, in percent.
        step: The optimizations of a run of `lkd fit`.
        outcome: `ok`, `FAILED` or `left out`.
        failure: Why it has failed, or was left out.
    """

    batch: int = 128
    bare: str = ""
    flops: float = 0.0
    group: int = 0
    reduced: bool = False
    steps: int = 0
    busy: list[float] = field(default_factory=list)
    step: str = ""
    outcome: str = "ok"
    failure: str = ""

    def fail(self, error: Exception) -> None:
        """Note that the row cannot go on."""
        self.outcome = "FAILED" if self.outcome == "ok" else self.outcome
        self.failure, self.steps = str(error), 0
        self.close()

    def __post_init__(self) -> None:
        """Nothing is started yet."""

    def start(self, context: Any, seconds: float) -> None:
        """Start the process, warm up, and choose the number of steps that take some seconds."""
        begin = time.perf_counter()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=("serve_loop", theirs, self.loop, self.arguments))
        self._process.start()
        theirs.close()
        self._take(1)
        self.start_up = time.perf_counter() - begin
        self.first = self._take(self.warm_up)
        self.steps = 1
        self.steps = max(1, round(seconds * self._take(10 if seconds > 0.1 else 1) / self.batch))

    def _take(self, steps: int) -> float:
        self._pipe.send(steps)
        state, *rest = answer(self._pipe, self._process, PATIENCE)
        if state != "done":
            self.outcome = state
            raise RuntimeError(rest[0])
        images, seconds, self.peak, self.step = rest
        return float(images / seconds)

    def turn(self) -> None:
        """Take the steps of a round, unless it has not started, or has failed."""
        try:
            if self.steps:
                self.run(self.steps)
        except (RuntimeError, OSError) as error:
            self.fail(error)

    def close(self) -> None:
        """End the process, if there is one."""
        if hasattr(self, "_process"):
            super().close()


class Utilization:
    """What nvidia-smi says of the GPU, ten times a second: `(time, percent)`; nothing where it is missing."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
        self._process = None
        ours, theirs = pty.openpty()  # to a pipe, lines would come late
        with suppress(OSError):
            self._process = Popen(command, stdout=theirs, stderr=DEVNULL)
            threading.Thread(target=self._read, args=(ours,), daemon=True).start()
        os.close(theirs)

    def _read(self, terminal: int) -> None:
        with suppress(OSError), os.fdopen(terminal) as lines:  # reading ends with an error
            for line in lines:
                if line.strip().isdecimal():
                    self.samples.append((time.monotonic(), float(line)))

    def since(self, begin: float) -> list[float]:
        """The samples from some time on."""
        return [percent for moment, percent in self.samples if moment >= begin]

    def close(self) -> None:
        """End nvidia-smi."""
        if self._process:
            self._process.kill()
            self._process.wait()


@dataclass
class Bench:
    """What the rows of `--speed` share.

    Args:
        options: The command line's.
        context: Starts processes.
        folder: Holds images, teacher, and the folders in which `lkd fit` runs.
        about: What `prepare` in benchmarks/gpu_loops.py has found.
        report: Takes the results.
    """

    options: argparse.Namespace
    context: Any
    folder: Path
    about: dict[str, Any]
    report: Report

    def bare(self, name: str, *how: str, size: int = 128, **rest: Any) -> GpuRow:
        """A bare loop."""
        flops, size = self.about["flops"], 4 if self.options.reduced else size
        each = 3 * flops["student"] + flops["teacher"] * ("kept" not in how)
        plain = {"images": f"{self.folder}/images.npy", "teacher": f"{self.folder}/teacher.pth"}
        arguments = {**plain, "device": self.options.device, "how": how, "size": size}
        return GpuRow(f"bare loop, {name}", f"{WORK}:bare", arguments, self._warm(20), batch=size, flops=each, **rest)

    def lkd(self, name: str, *settings: str, bare: str = GRAPHED, size: int = 128, **rest: Any) -> GpuRow:
        """A run of `lkd fit`."""
        size = 4 if self.options.reduced else size
        flops, kept = self.about["flops"], "--teacher_cache.versions=1" in settings
        first = [] if any("--config" in one for one in settings) else ["--config=cifar10/kd_resnet56_resnet20"]
        always = [
            f"--config={self.folder}/images.yaml",
            f"--data.init_args.batch_size={size}",
            f"--model.init_args.teacher_ckpt={self.folder}/teacher.pth",
            *("--trainer.max_epochs=10000", "--trainer.check_val_every_n_epoch=10000"),
        ]
        place = self.folder / re.sub(r"\W+", "_", name)
        arguments = {"settings": [*first, *settings, *always], "folder": str(place), "device": self.options.device}
        warm_up = self._warm(20) + kept * (self.about["number"] * 9 // 10 // size)
        flops = 3 * flops["student"] + flops["teacher"] * (not kept)
        return GpuRow(
            f"lkd fit, {name}", f"{WORK}:lkd_fit", arguments, warm_up, batch=size, bare=bare, flops=flops, **rest
        )

    def _warm(self, steps: int) -> int:
        return 1 if self.options.reduced else steps

    def rows(self) -> Iterator[GpuRow]:
        """All rows; the others are compared with the first."""
        bare, lkd, kept = self.bare, self.lkd, "--teacher_cache.versions=1"
        yield bare("fp32", reduced=True)
        yield bare("bf16", "bf16")
        for name, how in (("", []), (", teacher folded", ["folded"]), (", logits at hand", ["kept"])):
            yield bare(f"bf16, CUDA graph{name}", "bf16", "graph", *how, reduced=not how)
            yield bare(f"bf16, CUDA graph, compiled{name}", "bf16", "graph", "compiled", *how, group=1)
        yield bare("bf16, compiled", "bf16", "compiled", group=1)
        eager, compiled = "bare loop, bf16", "bare loop, bf16, compiled"
        yield lkd("eager", "--speed.graph=off", "--speed.compile=off", bare=eager, reduced=True)
        yield lkd("graph", "--speed.compile=off")
        at_hand = f"{eager}, CUDA graph, logits at hand"
        yield lkd("graph, cached logits", "--speed.compile=off", kept, bare=at_hand, reduced=True)
        yield lkd("defaults", bare=FASTEST, group=1)
        at_hand = f"{eager}, CUDA graph, compiled, logits at hand"
        yield lkd("graph, compiled, cached logits", "--speed.compile=default", kept, bare=at_hand, group=1)
        yield lkd("graph off", "--speed.graph=off", bare=compiled, group=1)
        reduce = ["--speed.graph=off", "--speed.compile=reduce-overhead"]
        yield lkd("reduce-overhead, graph off", *reduce, bare=FASTEST, group=1)
        yield lkd("graph, compiled", "--speed.compile=default", bare=FASTEST, group=1)
        yield lkd("compiled, graph off", "--speed.graph=off", "--speed.compile=default", bare=compiled, group=1)
        yield from self._methods()
        for size in (64, 512):
            name = f"bf16, CUDA graph, compiled, teacher folded, batch size {size}"
            yield bare(name, "bf16", "graph", "folded", "compiled", size=size, group=3)
            name = f"bare loop, {name}"
            yield lkd(f"graph, compiled, batch size {size}", "--speed.compile=default", size=size, bare=name, group=3)

    def _methods(self) -> Iterator[GpuRow]:
        overlays = ["--config=data/cifar10", "--config=pairs/resnet56_resnet20_10"]
        recipe = ["--config=trainer/cifar240", "--model.init_args.teacher.init_args.shortcut=A", "--speed.compile=off"]
        for name in METHODS:
            yield self.lkd(f"graph, {name}", *overlays, f"--config=methods/{name}", *recipe, group=2)

    def wanted(self) -> list[GpuRow]:
        """The first row, and those that are asked for."""
        first, *others = self.rows()
        chosen = [row for row in others if row.reduced or not self.options.reduced]
        if self.options.trainer:
            path, paths = Path(self.options.trainer).resolve(), {**first.arguments}
            arguments = {"adapter": str(path), "images": paths["images"], "teacher": paths["teacher"]}
            chosen.append(GpuRow(self.options.trainer, "benchmarks.loops:own", arguments, flops=first.flops))
        return [first, *(row for row in chosen if any(word in row.name for word in self.options.only))]

    def run(self, deadline: float) -> bool:
        """Time the rows, group by group; whether none failed."""
        first, *others = rows = self.wanted()
        utilization, groups = Utilization(), sorted({row.group for row in rows})
        try:
            for group in groups:
                chosen = [row for row in others if row.group == group]
                self._start([first, *chosen] if group == groups[0] else chosen, deadline)
                self._take_turns(first, [row for row in chosen if row.steps], utilization)
                for row in [first, *chosen] if group == groups[0] else chosen:
                    self._report(row, first)
                    if row is not first:
                        row.close()
        finally:
            utilization.close()
            for row in rows:
                row.close()
        return not any(row.outcome == "FAILED" for row in rows)

    def _start(self, rows: Sequence[GpuRow], deadline: float) -> None:
        """Start rows, some at a time."""

        def one(row: GpuRow) -> None:
            try:
                if time.monotonic() < deadline:
                    row.start(self.context, self.options.round)
            except (RuntimeError, OSError) as error:
                row.fail(error)

        with ThreadPoolExecutor(self.options.jobs) as pool:
            list(pool.map(one, rows))

    def _take_turns(self, first: GpuRow, rows: Sequence[GpuRow], utilization: Utilization) -> None:
        """Let each row take some steps, round after round."""
        for _ in range(self.options.rounds):
            for row in (first, *rows):
                begin = time.monotonic()
                row.turn()
                row.busy += utilization.since(begin)

    def _report(self, row: GpuRow, first: GpuRow) -> None:
        if row.failure:
            last = row.failure.strip().splitlines()[-1][:250]
            self.report.add("speed", row.name, row.outcome, last, row.failure if row.outcome == "FAILED" else "")
        elif not row.steps:
            self.report.add("speed", row.name, "left out", "the time was up")
        else:
            theirs = first.speeds[-len(row.speeds) :]
            ratios = [one / other for one, other in zip(row.speeds, theirs, strict=False)]
            measured: dict[str, Any] = {"speeds": row.speeds, "ratios": ratios, "batch": row.batch, "flops": row.flops}
            measured |= {"memory": row.peak / 1e6, "start_up": row.start_up, "bare": row.bare}
            measured["busy"] = statistics.mean(row.busy) if row.busy else None
            self.report.add("speed", row.name, "ok", row.step, **measured)
            print(
                f"    {row.speed:,.0f} images/s, {statistics.median(ratios or [0]):.2f} times the first row", flush=True
            )


def full_job(options: argparse.Namespace, folder: Path) -> Job:
    """A complete run, with the learning rate divided after 150, 180 and 210 of 240 epochs."""
    milestones = [round(options.epochs * number / 240) for number in (150, 180, 210)]
    images = f"--data.init_args.root={Path(options.images).resolve()}" if options.images else None
    settings = [
        "--config=cifar10/kd_resnet56_resnet20",
        images or f"--config={folder}/images.yaml",
        f"--model.init_args.teacher_ckpt={folder}/teacher.pth",
        f"--trainer.max_epochs={options.epochs}",
        f"--model.init_args.lr_scheduler.init_args.milestones={milestones}",
        *options.flags,
    ]
    name = f"{options.epochs} epochs {shlex.join(options.flags)}".strip()
    arguments = {"device": options.device, "settings": settings, "seconds": options.seconds}
    return Job(name, f"{WORK}:full", arguments, True, "full", options.seconds + PATIENCE)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("check", "speed", "full"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--images", help="folder of CIFAR-10's images")
    parser.add_argument("--teacher", help="file with the weights of a ResNet-56 with shortcut A")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="by default cuda if there is a GPU")
    parser.add_argument("--out", type=Path, help="Markdown file")
    parser.add_argument("--failures", type=Path, help="file for tracebacks; by default they are printed")
    parser.add_argument("--minutes", type=float, help="no row is started after that; 4 for checks, 5 for speed")
    parser.add_argument("--only", nargs="*", default=[""], help="checks and rows whose name has one of these words")
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)), help="at a time")
    parser.add_argument("--reduced", action="store_true", help="a few rows, a few steps: to test this program")
    parser.add_argument("--trainer", help="another trainer to time: mine.py:make, see benchmarks/speed.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round", type=float, default=0.6, help="seconds that a row trains for in a round")
    parser.add_argument("--number", type=int, default=50_000, help="generated images")
    parser.add_argument("--epochs", type=int, default=240)
    parser.add_argument("--seconds", type=int, default=480, help="when a full run is stopped")
    args, dashes = sys.argv[1:], "--" in sys.argv
    flags = args[args.index("--") + 1 :] if dashes else []
    options = parser.parse_args(args[: args.index("--")] if dashes else args)
    if not (options.check or options.speed or options.full):
        parser.error("choose --check, --speed or --full")
    options.flags = flags
    if options.reduced:
        options.rounds, options.round, options.number = 2, 0.05, 60
    return options


def prepared(options: argparse.Namespace, folder: Path, report: Report) -> tuple[Any, dict[str, Any]]:
    """How processes are started, and what `prepare` in benchmarks/gpu_loops.py has found.

    They are forked from one that has imported everything. Where CUDA does not start in such a process, each is a new
    one, which takes longer.
    """
    arguments = {"device": options.device, "folder": str(folder), "teacher": options.teacher, "images": None}
    if options.speed:
        arguments["images"] = options.images
    generated = options.speed or (options.full and not options.images)
    arguments["number"] = options.number if generated else 160
    for method in ("forkserver", "spawn"):
        context = multiprocessing.get_context(method)
        context.set_forkserver_preload(PRELOADED)
        workers = Workers(context, f"{folder}/by_{method}", 1, report)
        with suppress(OSError, EOFError):
            if workers.run([Job(f"processes by {method}", f"{WORK}:prepare", arguments, part="preparation")]):
                row = report.rows["preparation", f"processes by {method}: preparation"]
                return context, json.loads(row["remark"])
    sys.exit("the machine cannot be used")


def main() -> int:
    """Check, measure, and write what was found; the exit code."""
    options = arguments()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ |= {"PYTHONPATH": path, "COLUMNS": "400", "TERM": "xterm", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # in each of several processes
    report, well = Report(options.out, options.failures), True
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = Path(place)
        os.environ["LKD_CACHE"] = f"{folder}/cache"
        context, about = prepared(options, folder, report)
        options.device = about["device"]
        for part, minutes in (("check", 4.0), ("speed", 5.0), ("full", 0.0)):
            if not getattr(options, part):
                continue
            deadline = time.monotonic() + 60 * (options.minutes or minutes)
            remark = f"{about['gpu']}; {about['machine']}; {date.today()}; `{shlex.join(sys.argv[1:])}`"
            report.add("machine", part, "ok", remark, peak=about["peak"])
            if part == "speed":
                well &= Bench(options, context, folder, about, report).run(deadline)
                continue
            jobs = check_jobs(options.device, options.reduced) if part == "check" else [full_job(options, folder)]
            chosen = [job for job in jobs if part == "full" or any(word in job.name for word in options.only)]
            limit = deadline if part == "check" else float("inf")
            well &= Workers(context, f"{folder}/{part}", options.jobs, report, limit).run(chosen)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
