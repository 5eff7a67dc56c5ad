"""Check lkd on a GPU, and time `lkd fit` and bare PyTorch loops there.

    python -m benchmarks.gpu --check [--jobs 8] [--minutes 4] [--only PATTERN ...] [--out FILE]
    python -m benchmarks.gpu --speed [--images FOLDER] [--teacher FILE] [--minutes 5] [--only PATTERN ...] [--out FILE]
    python -m benchmarks.gpu --full --images FOLDER --teacher FILE [--epochs 240] [--seconds 480] [-- FLAGS OF LKD FIT]

`--check` trains with every overlay of configs/methods and compares the GPU with the CPU, runs with and without a CUDA
graph, resumed and uninterrupted runs, and cached and computed logits. It also runs all commands, and strategies for
several processes. `--speed` times the distillation of ResNet-56 into ResNet-20 as benchmarks/speed.py does: each row is
a process, the rows take turns, and the result is the ratio to the first row within a round. FOLDER contains
train/<class>/ and test/<class>/ of CIFAR-10, and FILE the weights of a ResNet-56 (shortcut A); by default, images are
synthetic and the weights are untrained. `--full` is one complete run.

The program ends within `--minutes` of its start: running processes are killed, and everything without a result is left
out (out of time). Results are appended to OUT.rows.jsonl immediately; OUT, in Markdown, shows the latest result of each
name. A summary of the checks is printed last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import date
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import Report, check_summary
from benchmarks.gpu_speed import Bench, matches
from benchmarks.gpu_workers import Job, Workers

ROOT = Path(__file__).parent.parent
PRELOADED = [
    *("benchmarks.gpu_checks", "benchmarks.gpu_loops", "benchmarks.gpu_prepare"),
    *("lkd.cli.lightning_cli", "lkd.losses", "lkd.datamodules", "lkd.modules", "sklearn.datasets", "timm"),
]
"""Modules that the fork server imports once for all processes; this file does not import torch."""
MINUTES = {"check": 4.0, "speed": 5.0}
PATIENCE = 120.0
"""Time limit of the preparation, in seconds; a complete run has the same margin beyond `--seconds`."""


def check_jobs(device: str, reduced: bool) -> list[Job]:
    """Return all checks.

    Args:
        device: `cuda` or `cpu`.
        reduced: Whether to return only a few.
    """

    def job(title: str, function: str, alone: bool = False, seconds: float = 60.0, **arguments: Any) -> Job:
        path = f"benchmarks.gpu_checks:{function}"
        return Job(title, path, {"device": device, **arguments}, alone, seconds=seconds)

    few = [
        job("commands", "commands", seconds=120.0, reduced=reduced),
        job("resume, kd", "resumed", True, name="kd"),
        job("teacher cache", "cached", True),
        job("synchronization, kd", "unsynchronized", True, name="kd"),
        job("methods/kd", "overlay", name="kd"),
    ]
    if reduced:
        return few
    strategies = {"DDP, one process": "ddp", "FSDP2, one process": None}
    complete = sorted(path.stem for path in (ROOT / "configs/digits").glob("*.yaml"))
    overlays = sorted({path.stem for path in (ROOT / "configs/methods").glob("*.yaml")} - {"kd"})
    return [
        *few,
        *(job(name, "parallel", True, strategy=strategy) for name, strategy in strategies.items()),
        *(job(f"resume, {name}", "resumed", True, name=name) for name in ("crd", "dkd_crd_at")),
        job("synchronization, kd, no graph", "unsynchronized", True, name="kd", graph="off"),
        *(job(f"synchronization, {name}", "unsynchronized", True, name=name) for name in ("at", "crd", "mgd")),
        *(job(f"digits/{name}", "complete", name=name) for name in complete),
        *(job(f"methods/{name}", "overlay", name=name) for name in overlays),
    ]


def full_job(options: argparse.Namespace, folder: Path) -> Job:
    """Return the job of a complete run, with the learning rate divided after 150, 180 and 210 of 240 epochs."""
    images = f"--data.init_args.root={Path(options.images).resolve()}" if options.images else None
    settings = [
        "--config=cifar10/kd_resnet56_resnet20",
        images or f"--config={folder}/images.yaml",
        f"--model.init_args.teacher_ckpt={folder}/teacher.pth",
        f"--trainer.max_epochs={options.epochs}",
        "--model.init_args.lr_scheduler.init_args.milestones=[0.625, 0.75, 0.875]",
        *options.flags,
    ]
    name = f"{options.epochs} epochs {shlex.join(options.flags)}".strip()
    arguments = {"device": options.device, "settings": settings, "seconds": options.seconds}
    return Job(name, "benchmarks.gpu_checks:full", arguments, True, "full", options.seconds + PATIENCE)


def pattern(text: str) -> str:
    """Return a regular expression, for `argparse`, which reports an invalid one."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from error
    return text


def parsed(args: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `flags` are the arguments after `--`."""
    args = list(args)
    end = args.index("--") if "--" in args else len(args)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("check", "speed", "full"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--images", help="folder with the images of CIFAR-10")
    parser.add_argument("--teacher", help="file with the weights of a ResNet-56 with shortcut A")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is a GPU")
    parser.add_argument("--out", type=Path, help="Markdown file")
    parser.add_argument("--failures", type=Path, help="file for tracebacks (default: print them)")
    parser.add_argument("--minutes", type=float, help="time limit of --check (default 4) and of --speed (default 5)")
    parser.add_argument(
        "--only", nargs="*", type=pattern, default=[""], help="checks and rows whose name matches one of these patterns"
    )
    parser.add_argument(
        "--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)), help="parallel processes"
    )
    parser.add_argument("--reduced", action="store_true", help="only a few checks, rows and steps (for tests)")
    parser.add_argument("--trainer", help="another trainer to time: mine.py:make, see benchmarks/speed.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round", type=float, default=0.6, help="duration of a row in a round, in seconds")
    parser.add_argument("--number", type=int, default=50_000, help="number of synthetic images")
    parser.add_argument("--epochs", type=int, default=240)
    parser.add_argument("--seconds", type=int, default=480, help="time limit of a complete run")
    options = parser.parse_args(args[:end])
    options.flags = args[end + 1 :]
    for path in filter(None, (options.images, options.teacher)):
        if not Path(path).exists():
            parser.error(f"{path} does not exist")
    options.parts = [part for part in ("check", "speed", "full") if getattr(options, part)]
    if not options.parts:
        parser.error("choose --check, --speed or --full")
    if options.reduced:
        options.rounds, options.round, options.number = 2, 0.05, 40
    return options


def time_limit(options: argparse.Namespace, part: str) -> float:
    """Return the time limit of a part, in seconds."""
    return options.seconds + 2 * PATIENCE if part == "full" else 60 * (options.minutes or MINUTES[part])


def prepared(
    options: argparse.Namespace, folder: Path, report: Report, deadline: float
) -> tuple[Any, dict[str, Any]] | None:
    """Choose the start method of processes, and prepare what they share.

    Processes are forked from a server that has imported everything. If CUDA cannot be initialized in such a process,
    new processes are spawned instead, which takes longer.

    Returns:
        A context of `multiprocessing`, and the description of the machine by `benchmarks.gpu_prepare:prepare`; `None`
        if no process could prepare anything.
    """
    arguments = {"device": options.device, "folder": str(folder), "teacher": options.teacher}
    arguments["images"] = options.images if options.speed else None
    arguments["number"] = options.number if options.speed or (options.full and not options.images) else 160
    for method in ("forkserver", "spawn"):
        context = multiprocessing.get_context(method)
        context.set_forkserver_preload([name for name in PRELOADED if name != "timm" or not options.reduced])
        workers = Workers(context, f"{folder}/by_{method}", 1, report, deadline)
        name = f"processes by {method}"
        job = Job(name, "benchmarks.gpu_prepare:prepare", arguments, part="preparation", seconds=PATIENCE)
        has_passed = workers.run([job])
        row = report.rows.get(("preparation", f"{name}: preparation"), {})
        if has_passed and row.get("outcome") == "ok":
            return context, json.loads(row["remark"])
    return None


def run(options: argparse.Namespace, report: Report, folder: Path) -> bool:
    """Prepare, check and measure; return whether everything passed."""
    begin, has_passed = time.monotonic(), True
    limits = {part: 0.95 * time_limit(options, part) for part in options.parts}  # the rest is for ending processes
    os.environ["LKD_CACHE"] = f"{folder}/cache"
    found = prepared(options, folder, report, begin + limits[options.parts[0]])
    if found is None:
        return False
    context, about = found
    options.device = about["device"]
    for part, limit in limits.items():
        deadline = begin + limit
        remark = f"{about['gpu']}; {about['machine']}; {date.today()}; `{shlex.join(sys.argv[1:])}`"
        report.add("machine", part, "ok", remark, peak=about["peak"])
        if part == "speed":
            has_passed &= Bench(options, context, folder, about, report).run(deadline)
        else:
            jobs = check_jobs(options.device, options.reduced) if part == "check" else [full_job(options, folder)]
            chosen = [job for job in jobs if part == "full" or matches(job.name, options.only)]
            has_passed &= Workers(context, f"{folder}/{part}", options.jobs, report, deadline).run(chosen)
        begin = time.monotonic()
    return has_passed


def summarize(options: argparse.Namespace, report: Report) -> None:
    """Print the summary of the checks, if there were any."""
    if options.check:
        print("", *check_summary(report.part("check")), sep="\n", flush=True)


def _give_up(options: argparse.Namespace, report: Report) -> None:
    """End the program at its time limit, if nothing else has ended it."""
    print("given up at the time limit", flush=True)
    for process in multiprocessing.active_children():
        process.kill()
    summarize(options, report)
    os._exit(1)


def main() -> int:
    """Check, measure and report; return the exit code."""
    options = parsed(sys.argv[1:])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ |= {"PYTHONPATH": path, "COLUMNS": "400", "TERM": "xterm", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # per process
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"  # it would print after the summary
    resource_tracker.ensure_running()
    del os.environ["PYTHONWARNINGS"]
    report = Report(options.out, options.failures)
    seconds = sum(time_limit(options, part) for part in options.parts)
    alarm = threading.Timer(0.98 * seconds, _give_up, [options, report])
    alarm.daemon = True
    alarm.start()
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
            has_passed = run(options, report, Path(place))
    finally:
        alarm.cancel()
        summarize(options, report)
    return 0 if has_passed else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # does not wait for a process that cannot be killed
