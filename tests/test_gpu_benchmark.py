"""The reduced form of benchmarks/gpu.py on the CPU, including failed checks and processes that hang or end early."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import gpu, gpu_checks, gpu_report, gpu_runs, gpu_speed, gpu_workers
from benchmarks.pacing import Pace

ROOT = Path(__file__).parent.parent
HERE = "tests.test_gpu_benchmark"
FORK = multiprocessing.get_context("fork")
ABOUT = {"device": "cpu", "gpu": "no GPU", "machine": "this one", "peak": 1.0, "number": 1}
ABOUT["flops"] = {"student": 1, "teacher": 1}
CHECKS = {
    **{f"commands: {name}": "ok" for name in ("fit with a teacher", "predict")},
    "resume, kd: the resumed run equals the uninterrupted one": "ok",
    "teacher cache: a run that finds cached logits equals the one that computed them": "ok",
    "synchronization, kd: none within a step": "skipped",
    "methods/kd: trains": "ok",
    "methods/kd: equal losses on GPU and CPU": "ok",
    "methods/kd: equal results with and without a graph": "ok",
}
TIMED = ("bare loop, fp32", "lkd fit, graph, cached logits")


def _rows(out: Path) -> list[dict]:
    lines = out.with_name(f"{out.name}.rows.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_reduced_form(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    command = [sys.executable, "-m", "benchmarks.gpu", "--reduced", "--device=cpu", "--jobs=2", "--check", "--speed"]
    command += [f"--out={out}", f"--failures={tmp_path / 'failures'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "failures").exists()
    rows, text = _rows(out), out.read_text()
    assert {row["name"]: row["outcome"] for row in rows if row["part"] == "check"} == CHECKS
    timed = {row["name"]: row for row in rows if row["part"] == "speed"}
    missing = timed.pop("bare loop, bf16, CUDA graph")
    assert (missing["outcome"], missing["remark"]) == ("skipped", "needs CUDA")
    assert sorted(timed) == sorted(TIMED)
    for row in timed.values():
        assert len(row["speeds"]) == len(row["ratios"]) == 2
        assert min(*row["speeds"], *row["ratios"], row["memory"], row["start_up"], row["flops"]) > 0
    assert timed["bare loop, fp32"]["ratios"] == [1, 1]
    assert timed["lkd fit, graph, cached logits"]["flops"] < timed["bare loop, fp32"]["flops"]
    assert "optimizer fused" in timed["lkd fit, graph, cached logits"]["remark"]
    for name in (*CHECKS, *timed, missing["name"]):
        assert f"\n| {name} | " in text
        assert f"{name}: " in done.stdout
    assert "1 skipped, 7 ok" in text
    skipped = "skipped (needs CUDA): synchronization, kd: none within a step"
    last = [skipped, "Steps: 1 without (not on this device)", "1 skipped, 7 ok"]
    assert done.stdout.splitlines()[-4:] == ["", *last]


def _main(jobs: list[gpu_workers.Job], *argv: str, prepared: Callable | None = None) -> int:
    """Run `python -m benchmarks.gpu --check` with the given checks, in processes forked from this one."""
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", ["gpu", "--check", "--jobs=1", *argv]),
        mock.patch.object(gpu, "prepared", prepared or (lambda *_: (FORK, ABOUT))),
        mock.patch.object(gpu, "check_jobs", return_value=jobs),
    ):
        return gpu.main()


def planted(kind: str) -> gpu_runs.Checks:
    """Return checks that pass, do not apply, fail, exit, hang, or end their process."""

    def broken() -> str:
        print("said before")
        raise ValueError("a planted\nmistake")

    def leaving() -> str:
        raise SystemExit(3)

    def dying() -> str:
        os._exit(7)

    def hanging() -> str:
        time.sleep(60)
        return ""

    def useless() -> str:
        raise gpu_runs.NotApplicable("needs something")

    if kind == "unprepared":
        raise KeyError("nothing there")
    return {"fine": lambda: "well", kind: locals().get(kind, lambda: "whole step as a CUDA graph"), "after": lambda: ""}


def _jobs(*kinds: str, seconds: float = 60.0) -> list[gpu_workers.Job]:
    return [gpu_workers.Job(f"job {kind}", f"{HERE}:planted", {"kind": kind}, seconds=seconds) for kind in kinds]


def test_failures_are_reported(tmp_path: Path, capfd) -> None:
    kinds = ("trains", "broken", "trains again", "leaving", "dying", "useless", "unprepared", "fine")
    out, failures = tmp_path / "gpu.md", tmp_path / "failures.txt"
    earlier = gpu_report.Report(out, None)
    earlier.add("check", "of an earlier run", "ok")
    earlier.add("check", "job trains", "skipped", "out of time")
    assert _main(_jobs(*kinds), f"--out={out}", f"--failures={failures}") == 1
    rows = {row["name"]: (row["outcome"], row["remark"]) for row in _rows(out)}
    for kind in ("trains", "trains again", "useless", "fine", "broken", "leaving"):
        assert rows[f"job {kind}: after"] == ("ok", "")
    assert rows["job broken: broken"] == ("FAILED", "ValueError: a planted mistake")
    assert rows["job leaving: leaving"] == ("FAILED", "SystemExit: 3")
    assert rows["job dying: dying"] == ("FAILED", "the process ended with exit code 7")
    assert rows["job dying: after"] == ("FAILED", "not run, as an earlier check ended the process")
    assert rows["job useless: useless"] == ("skipped", "needs something")
    assert rows["job unprepared: preparation"] == ("FAILED", "KeyError: 'nothing there'")
    assert len(rows) == 3 * (len(kinds) - 1) - 1 + 1 + 3
    report = failures.read_text()
    assert "===== job broken: broken\nTraceback" in report
    assert "said before" in report
    assert report.count("=====") == 4
    table = out.read_text()
    assert "| of an earlier run | ok |" in table
    assert "| job trains: trains | ok |" in table
    assert "| job trains | skipped" not in table
    assert table.index("| job unprepared: preparation | FAILED") < table.index("| skipped |") < table.index("| ok |")
    printed = capfd.readouterr().out
    assert "\njob broken: broken: FAILED (ValueError: a planted mistake)\n" in printed
    *_, summary = printed.split("\n\n")
    assert summary.startswith("FAILED: job broken: broken: ValueError: a planted mistake\nFAILED: job leaving: ")
    assert summary.splitlines()[-3:] == [
        "skipped (needs something): job useless: useless",
        "Steps: 1 with a CUDA graph",
        "5 FAILED, 1 skipped, 16 ok",
    ]


def _in_a_process(*arguments: object, **options: object) -> multiprocessing.Process:
    """Run `_main` in a separate process group."""

    def target() -> None:
        os.setpgrp()
        os._exit(_main(*arguments, **options))

    process = FORK.Process(target=target)
    process.start()
    return process


def test_interrupted_run_keeps_its_rows(tmp_path: Path) -> None:
    out, end = tmp_path / "gpu.md", time.monotonic() + 60
    process = _in_a_process(_jobs("fine", "hanging"), f"--out={out}")
    try:
        while not (out.is_file() and "job hanging: fine" in out.read_text()):
            assert process.is_alive()
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    names = {row["name"] for row in _rows(out)}
    assert {"job fine: fine", "job fine: after", "job hanging: fine"} < names
    assert not {"job hanging: hanging", "job hanging: after"} & names
    assert "| job fine: fine | ok |" in out.read_text()
    assert ("check", "job hanging: fine") in gpu_report.Report(out, None).rows


def test_hanging_program_ends_at_its_time_limit(capfd) -> None:
    process = _in_a_process([], "--minutes=0.005", prepared=lambda *_: time.sleep(60))
    process.join(20)
    assert process.exitcode == 1
    assert "given up at the time limit" in capfd.readouterr().out


def silent(pace: Pace) -> None:
    """A loop that hangs during warm-up."""
    pace.wait()
    pace.step(1)
    time.sleep(60)


def steady(pace: Pace) -> None:
    """A loop that runs."""
    pace.wait()
    while True:
        time.sleep(0.001)
        pace.step(1)


def stopping(pace: Pace) -> None:
    """A loop that hangs in the first round, after the start, the warm-up and the choice of the number of steps."""
    pace.wait()
    for _ in range(3):
        pace.step(1)
    time.sleep(60)


@pytest.mark.parametrize(
    ("limit", "seconds", "outcome", "failure"),
    [(0.3, 60.0, "FAILED", "no answer within the time limit"), (60.0, 1.0, "skipped", "out of time")],
)
def test_hanging_rows(monkeypatch, tmp_path: Path, limit: float, seconds: float, outcome: str, failure: str) -> None:
    monkeypatch.setattr(gpu_speed, "START_SECONDS", limit)
    monkeypatch.setattr(gpu_speed, "ROUND_SECONDS", limit)
    kinds = [("first", "steady", 0), ("stopping", "stopping", 0), ("silent", "silent", 0), ("late", "silent", 1)]
    rows = [gpu_speed.GpuRow(name, f"{HERE}:{loop}", {}, 1, batch=1, group=group) for name, loop, group in kinds]
    options = Namespace(rounds=2, round=0.02, jobs=1)
    report = gpu_report.Report(None, None)
    bench = gpu_speed.Bench(options, FORK, tmp_path, ABOUT, report)
    monkeypatch.setattr(bench, "wanted", lambda: rows)
    begin = time.monotonic()
    assert bench.run(begin + seconds) is (outcome != "FAILED")
    assert time.monotonic() - begin < 3
    found = {name: (row["outcome"], row["remark"]) for (_, name), row in report.rows.items()}
    assert found["first"] == ("ok", "")
    assert found["stopping"] == found["silent"] == found["late"] == (outcome, failure)


@pytest.mark.parametrize(
    ("text", "step", "has_graph"),
    [
        ("Optimizations: bf16-mixed, whole step as a CUDA graph\n", "bf16-mixed, whole step as a CUDA graph", True),
        ("\x1b[2KOptimizations: 32-true, no CUDA graph (off)\r\n", "32-true, no CUDA graph (off)", False),
        (
            "Optimizations: whole step as a CUDA graph\n"
            "lkd: warning: the training step runs without a graph: it waits; --speed",
            "whole step as a CUDA graph; no CUDA graph (it waits)",
            False,
        ),
        ("nothing", "", False),
    ],
)
def test_optimizations_are_parsed(text: str, step: str, has_graph: bool) -> None:
    assert gpu_runs.step_of(text) == step
    assert gpu_runs.has_graph(step) is has_graph
    rows = [{"name": "a: trains", "outcome": "ok", "remark": step}]
    for lines in (gpu_report.check_table(rows, {}), gpu_report.check_summary(rows)):
        assert ("1 with a CUDA graph" in "\n".join(lines)) is has_graph


def test_summary_is_short() -> None:
    rows = [{"name": f"ok {number}", "outcome": "ok", "remark": ""} for number in range(100)]
    rows += [{"name": f"late {number}", "outcome": "skipped", "remark": "out of time"} for number in range(400)]
    rows += [{"name": f"wrong {number}", "outcome": "FAILED", "remark": "no " * 30} for number in range(30)]
    lines = gpu_report.check_summary(rows)
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 160
    assert all(line.startswith(f"FAILED: wrong {number}: no") for number, line in enumerate(lines[:30]))
    assert lines[30].startswith("skipped (out of time): late 0; late 1;")
    assert lines[-1] == "30 FAILED, 400 skipped, 100 ok"
    lines = gpu_report.check_summary([*rows, *rows[-30:]])
    assert len(lines) == 60
    assert "more lines" in lines[-3]


def test_rows_are_compared_with_the_bare_loop() -> None:
    shared = {"outcome": "ok", "remark": "", "batch": 100, "memory": 5.0, "start_up": 1.0, "busy": None}
    rows = [
        {"name": "bare", "speeds": [1e3, 1e3], "ratios": [1.0, 1.0], "bare": "", "flops": 1e9, **shared},
        {"name": "lkd", "speeds": [8e2, 2e3], "ratios": [0.5, 2.5], "bare": "bare", "flops": 1e9, **shared},
    ]
    lines = list(gpu_report.speed_table(rows, {"peak": 1e13}))
    assert lines[3] == "| lkd | 1,400 | 71.43 | 1.50 | 0.50 to 2.50 | 1.50 | 1.40 | 14.00% | 5 |"


def test_differences() -> None:
    assert gpu_checks.apart([1.0, 2.0], [1.0, 2.002]) == pytest.approx(0.001, rel=0.01)
    assert gpu_checks.apart([float("nan")], [float("nan")]) == float("inf")
    assert gpu_checks.apart([], []) == float("inf")
    with pytest.raises(ValueError, match=r"losses differ by 2\.0e-03, more than 1e-03"):
        gpu_checks.within(0.002, 0.001, "losses differ by")
