"""The reduced form of benchmarks/gpu.py, on the CPU; checks that fail, processes that die, a run that is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import gpu, gpu_loops

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
REDUCED = [sys.executable, "-m", "benchmarks.gpu", "--reduced", "--device=cpu", "--jobs=2"]
COMMANDS = ("fit with a teacher", "fit without", "validate", "test", "predict")
CHECKS = {
    **{f"commands: {name}": "ok" for name in COMMANDS},
    "resume, kd: the resumed run equals the whole one": "ok",
    "teacher cache: a run that finds cached logits equals the one that computed them": "ok",
    "waiting, kd: nothing in a step waits for the GPU": "left out",
    "methods/kd: trains": "ok",
    "methods/kd: the GPU's losses are the CPU's": "ok",
    "methods/kd: with a graph as without": "ok",
}
TIMED = ("bare loop, fp32", "lkd fit, eager", "lkd fit, graph, cached logits")


def _rows(out: Path) -> list[dict]:
    lines = out.with_name(f"{out.name}.rows.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_reduced_form(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    command = [*REDUCED, "--check", "--speed", f"--out={out}", f"--failures={tmp_path / 'failures'}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "failures").exists()
    rows, text = _rows(out), out.read_text()
    assert {row["name"]: row["outcome"] for row in rows if row["part"] == "check"} == CHECKS
    timed = {row["name"]: row for row in rows if row["part"] == "speed"}
    missing = timed.pop("bare loop, bf16, CUDA graph")
    assert (missing["outcome"], missing["remark"]) == ("left out", "needs CUDA")
    assert sorted(timed) == sorted(TIMED)
    for row in timed.values():
        assert len(row["speeds"]) == len(row["ratios"]) == 2
        assert min(*row["speeds"], *row["ratios"], row["memory"], row["start_up"], row["flops"]) > 0
    assert timed["bare loop, fp32"]["ratios"] == [1, 1]
    assert timed["lkd fit, graph, cached logits"]["flops"] < timed["lkd fit, eager"]["flops"]
    assert "optimizer fused" in timed["lkd fit, eager"]["remark"]
    assert "10 ok" in text
    assert "Steps: 1 without" in text
    for name in (*CHECKS, *timed, missing["name"]):
        assert f"\n| {name} | " in text
        assert f"{name}: " in done.stdout


def test_an_interrupted_run_keeps_its_rows(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    command = [*REDUCED, "--check", "--only", "waiting", "resume", "commands", f"--out={out}"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 200
    try:
        while not (out.is_file() and "commands: fit with a teacher" in out.read_text()):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    names = {row["name"] for row in _rows(out)}
    assert "commands: fit with a teacher" in names
    assert len(names) < 8
    assert "| commands: fit with a teacher | ok |" in gpu.Report(out, None).out.read_text()
    assert ("check", "commands: fit with a teacher") in gpu.Report(out, None).rows


def planted(kind: str) -> gpu_loops.Checks:
    """Checks that pass, do not apply, fail, exit, or end their process."""

    def broken() -> str:
        print("said before")
        raise ValueError("a planted\nmistake")

    def leaving() -> str:
        raise SystemExit(3)

    def dying() -> str:
        os._exit(7)

    def useless() -> str:
        raise gpu_loops.NotApplicable("needs something")

    if kind == "unprepared":
        raise KeyError("nothing there")
    return {"fine": lambda: "well", kind: locals().get(kind, lambda: "whole step as a CUDA graph"), "after": lambda: ""}


def test_failures_are_told(tmp_path: Path, capfd) -> None:
    kinds = ("trains", "broken", "trains again", "leaving", "dying", "useless", "unprepared", "fine")
    jobs = [gpu.Job(f"job {kind}", "tests.test_gpu_benchmark:planted", {"kind": kind}) for kind in kinds]
    out, failures = tmp_path / "gpu.md", tmp_path / "failures.txt"
    gpu.Report(out, None).add("check", "of an earlier run", "ok")
    about = {"device": "cpu", "gpu": "no GPU", "machine": "this one", "peak": 1.0}
    argv = ["gpu", "--check", "--jobs=1", f"--out={out}", f"--failures={failures}"]
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(gpu, "prepared", return_value=(multiprocessing.get_context("fork"), about)),
        mock.patch.object(gpu, "check_jobs", return_value=jobs),
    ):
        assert gpu.main() == 1
    rows = {row["name"]: (row["outcome"], row["remark"]) for row in _rows(out)}
    for kind in ("trains", "trains again", "useless", "fine", "broken", "leaving"):
        assert rows[f"job {kind}: after"] == ("ok", "")
    assert rows["job broken: broken"] == ("FAILED", "ValueError: a planted mistake")
    assert rows["job leaving: leaving"] == ("FAILED", "SystemExit: 3")
    assert rows["job dying: dying"] == ("FAILED", "the process ended with exit code 7")
    assert rows["job dying: after"] == ("FAILED", "not run, as an earlier check ended the process")
    assert rows["job useless: useless"] == ("left out", "needs something")
    assert rows["job unprepared: preparation"] == ("FAILED", "KeyError: 'nothing there'")
    assert len(rows) == 3 * (len(kinds) - 1) - 1 + 1 + 2
    told = failures.read_text()
    assert "===== job broken: broken\nTraceback" in told
    assert "said before" in told
    assert told.count("=====") == 4
    assert "| of an earlier run | ok |" in out.read_text()
    assert "FAILED: ValueError: a planted mistake" in capfd.readouterr().out


def test_a_silent_process_is_given_up(tmp_path: Path) -> None:
    jobs = [gpu.Job("slow", "tests.test_gpu_benchmark:sleeping", {}, patience=0.5)]
    report = gpu.Report(None, tmp_path / "failures")
    assert not gpu.Workers(multiprocessing.get_context("fork"), str(tmp_path), 1, report).run(jobs)
    assert report.rows["check", "slow: sleeps"]["remark"] == "no answer in 0 s"
    late = gpu.Workers(multiprocessing.get_context("fork"), str(tmp_path), 1, report, deadline=0.0)
    assert late.run(jobs)
    assert report.rows["check", "slow"]["remark"] == "the time was up"


def sleeping() -> gpu_loops.Checks:
    return {"sleeps": lambda: time.sleep(60)}


@pytest.mark.parametrize(
    ("text", "step", "has_graph"),
    [
        ("Step: bf16-mixed, whole step as a CUDA graph\n", "bf16-mixed, whole step as a CUDA graph", True),
        ("\x1b[2KStep: 32-true, no CUDA graph (off)\r\n", "32-true, no CUDA graph (off)", False),
        (
            "Step: whole step as a CUDA graph\nlkd: warning: the training step runs without a graph: it waits; --speed",
            "whole step as a CUDA graph; no CUDA graph (it waits)",
            False,
        ),
        ("nothing", "", False),
    ],
)
def test_the_line_of_optimizations(text: str, step: str, has_graph: bool) -> None:
    assert gpu_loops.step_of(text) == step
    assert gpu_loops.has_graph(step) is has_graph
    reasons = "\n".join(gpu.check_table([{"name": "a: trains", "outcome": "ok", "remark": step}], {}))
    assert ("1 with a CUDA graph" in reasons) is has_graph


def test_rows_are_compared_with_the_bare_loop() -> None:
    shared = {"outcome": "ok", "remark": "", "batch": 100, "memory": 5.0, "start_up": 1.0, "busy": None}
    rows = [
        {"name": "bare", "speeds": [1e3, 1e3], "ratios": [1.0, 1.0], "bare": "", "flops": 1e9, **shared},
        {"name": "lkd", "speeds": [8e2, 2e3], "ratios": [0.5, 2.5], "bare": "bare", "flops": 1e9, **shared},
    ]
    lines = list(gpu.speed_table(rows, {"peak": 1e13}))
    assert lines[3] == "| lkd | 1,400 | 71.43 | 1.50 | 0.50 to 2.50 | 1.50 | 1.40 | 14.00% | 5 |"


def test_differences() -> None:
    assert gpu_loops.apart([1.0, 2.0], [1.0, 2.002]) == pytest.approx(0.001, rel=0.01)
    assert gpu_loops.apart([float("nan")], [float("nan")]) == float("inf")
    assert gpu_loops.apart([], []) == float("inf")
    with pytest.raises(ValueError, match=r"losses differ by 2\.0e-03, more than 1e-03"):
        gpu_loops.within(0.002, 0.001, "losses differ by")
