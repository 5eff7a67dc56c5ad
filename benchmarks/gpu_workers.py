"""Processes that run the jobs of benchmarks/gpu.py, within time limits. This file does not import torch."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import OUT_OF_TIME, Report


class LostError(RuntimeError):
    """Raised when a process has ended or does not respond in time."""


def function_at(path: str) -> Callable[..., Any]:
    """Import a function.

    Args:
        path: `module:function`.
    """
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _call(path: str, *arguments: Any) -> None:
    function_at(path)(*arguments)


def start_process(context: Any, path: str, *arguments: Any) -> tuple[Any, Any]:
    """Start a process that calls a function with one end of a pipe.

    Args:
        context: A context of `multiprocessing`.
        path: `module:function`.
        arguments: Further arguments, after the pipe.

    Returns:
        The other end of the pipe and the process.
    """
    pipe, theirs = context.Pipe()
    process = context.Process(target=_call, args=(path, theirs, *arguments))
    process.start()
    theirs.close()
    return pipe, process


def receive(pipe: Any, process: Any, end: float) -> Any:
    """Receive the next message of a process.

    Args:
        pipe: The pipe to it.
        process: The process.
        end: Deadline, as a `time.monotonic()` value.

    Raises:
        LostError: If no message comes in time, or the process ends.
    """
    if not pipe.poll(max(0.0, end - time.monotonic())):
        raise LostError("no answer within the time limit")
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        process.join(1)
        raise LostError(f"the process ended with exit code {process.exitcode}") from None


def end_process(pipe: Any, process: Any) -> None:
    """Kill a process, without waiting long for one that the driver keeps alive."""
    pipe.close()
    process.kill()
    process.join(1)


@dataclass(frozen=True)
class Job:
    """Function that returns checks, which one process runs.

    Args:
        name: Prefix of the titles of its checks.
        function: `module:function` that returns the checks.
        arguments: Its keyword arguments.
        alone: Whether the job needs its own process, because it changes the state of the process.
        part: Table of its results.
        seconds: Time limit for all its checks together.
    """

    name: str
    function: str
    arguments: dict[str, Any]
    alone: bool = False
    part: str = "check"
    seconds: float = 60.0

    def title(self, check: str) -> str:
        """Return the name of a check's row; the name of the job if `check` is empty."""
        return f"{self.name}: {check}" if check else self.name


class Worker:
    """Process that runs jobs, one after the other.

    Args:
        context: A context of `multiprocessing`.
        folder: Parent of the folders of jobs.
        threads: Number of CPU threads.

    Attributes:
        pending: Titles of the current job's checks without a result; one empty title until they are known.
    """

    def __init__(self, context: Any, folder: str, threads: int) -> None:
        self.pending: list[str] = []
        self._pipe, self._process = start_process(context, "benchmarks.gpu_runs:serve_checks", folder, threads)

    def run(self, number: int, job: Job, end: float) -> Iterator[tuple[str, str, str, str]]:
        """Run a job and yield the title, outcome, remark and traceback of each check.

        Args:
            number: Number of the job, which names its folder.
            job: The job.
            end: Deadline of the results, as a `time.monotonic()` value.

        Raises:
            LostError: If the process ends, or a result does not come in time.
        """
        self.pending = [""]
        try:
            self._pipe.send((number, job.function, job.arguments))
        except OSError:
            raise LostError("the process had already ended") from None
        self.pending = receive(self._pipe, self._process, end)
        while self.pending:
            result = receive(self._pipe, self._process, end)
            yield self.pending.pop(0), *result

    def close(self) -> None:
        """Kill the process."""
        end_process(self._pipe, self._process)


class Workers:
    """Run jobs in several processes; a process in which a check failed is not reused.

    Args:
        context: A context of `multiprocessing`.
        folder: Parent of the working directories.
        jobs: Number of parallel processes.
        report: Report to which results are added.
        deadline: Time at which processes are killed and remaining jobs are skipped, as a `time.monotonic()` value.
    """

    def __init__(self, context: Any, folder: str, jobs: int, report: Report, deadline: float) -> None:
        self.context, self.folder, self.jobs, self.report, self.deadline = context, folder, jobs, report, deadline
        self._idle: list[Worker] = []
        self._all: list[Worker] = []
        self._numbers = count()

    def run(self, jobs: Sequence[Job]) -> bool:
        """Run jobs and return whether all passed."""
        pool = ThreadPoolExecutor(self.jobs)
        try:
            return all([*pool.map(self._run, jobs)])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in self._all:
                worker.close()

    def _run(self, job: Job) -> bool:
        if time.monotonic() >= self.deadline:
            self.report.add(job.part, job.name, "skipped", OUT_OF_TIME)
            return True
        try:
            worker = self._worker(job)
        except (OSError, EOFError) as error:
            self.report.add(job.part, job.name, "FAILED", f"no process could be started: {error}")
            return False
        number, has_passed = next(self._numbers), True
        try:
            for check, outcome, remark, trace in worker.run(number, job, self._end(job)):
                has_passed = has_passed and outcome != "FAILED"
                self.report.add(job.part, job.title(check), outcome, remark, trace)
        except LostError as error:
            worker.close()
            return self._report_lost(job, worker.pending, number, str(error)) and has_passed
        if has_passed and not job.alone:
            self._idle.append(worker)
        else:
            worker.close()
        return has_passed

    def _end(self, job: Job) -> float:
        return min(time.monotonic() + job.seconds, self.deadline)

    def _report_lost(self, job: Job, pending: list[str], number: int, remark: str) -> bool:
        """Report the checks of a lost process without a result; return whether none of them counts as failed."""
        if time.monotonic() >= self.deadline:
            for check in pending:
                self.report.add(job.part, job.title(check), "skipped", OUT_OF_TIME)
            return True
        log = Path(self.folder, f"check_{number}", "log.txt")
        trace = f"{remark}; end of the log:\n{log.read_text(errors='replace')[-4000:] if log.is_file() else ''}"
        for check in pending:
            self.report.add(job.part, job.title(check), "FAILED", remark, trace)
            remark, trace = "not run, as an earlier check ended the process", ""
        return False

    def _worker(self, job: Job) -> Worker:
        with suppress(IndexError):
            if not job.alone:
                return self._idle.pop()
        worker = Worker(self.context, self.folder, max(1, (os.cpu_count() or 1) // self.jobs))
        self._all.append(worker)
        return worker
