"""Runs resume exactly after kills, signals, corrupt files and disk errors.

`python -m benchmarks.faults` covers all settings, including two processes, with many more kills.
"""

from __future__ import annotations

import fcntl
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.faults import ARGS, Bench, Row, cut, empty, flip, images, run_of, table
from benchmarks.lives import curves, differences, live, until_done


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), seed=1, twice=False)


def _assert_nothing_lost(row: Row) -> None:
    assert row.times >= 1
    assert not row.differs, row


@pytest.mark.parametrize(
    "settings",
    [
        "cached teacher logits",
        "memory bank (CRD)",
        "weight averaging (EMA)",
        "segmentation, files read by 2 workers",  # like image files
    ],
)
def test_killed_within_an_epoch(bench, settings: str) -> None:
    row = bench.failed("SIGKILL after the second checkpoint", "benchmarks.faults:die_at_save,2,after", settings)
    _assert_nothing_lost(row)


def test_resumed_from_the_checkpoint_alone(bench) -> None:
    resume = ["fit", "--ckpt_path=runs/shapes/kd/version_0/checkpoints/last.ckpt"]
    settings = "segmentation, files read by 2 workers"
    _assert_nothing_lost(bench.failed("", "benchmarks.faults:die_at_save,3,after", settings, resume=resume))


def test_killed_at_random_moments(bench) -> None:
    row = bench.killed("digits")
    while not row.times:  # the kill came after the end of the run
        row = bench.killed("digits")
    _assert_nothing_lost(row)


def test_killed_while_writing_a_checkpoint(bench) -> None:
    _assert_nothing_lost(bench.failed("", "benchmarks.faults:die_at_save,3,half"))


def test_killed_while_linking_the_previous_checkpoint(bench) -> None:
    _assert_nothing_lost(bench.failed("", "benchmarks.faults:die_at_link"))


def test_corrupt_checkpoint(bench) -> None:
    _assert_nothing_lost(bench.corrupted("", flip))


def test_file_size_limit(bench) -> None:
    row = bench.failed("", "benchmarks.faults:small_files,60000", wanted="cannot be written")
    _assert_nothing_lost(row)
    assert "continue with --resume" in row.outcome


def test_folder_without_write_permission(bench) -> None:
    row = bench.failed("", "benchmarks.faults:nobody", wanted="ermission denied")
    _assert_nothing_lost(row)
    assert "\n" not in row.outcome


@pytest.mark.parametrize(
    ("number", "code", "be"),
    [(signal.SIGTERM, 143, "anyone"), (signal.SIGINT, 1, "anyone"), (signal.SIGUSR1, 143, "slurm")],
)
def test_signals_stop_the_run(bench, number: int, code: int, be: str) -> None:
    _assert_nothing_lost(bench.signalled("", int(number), code, be))


def test_all_checkpoints_corrupt_except_the_best(bench, tmp_path: Path) -> None:
    whole, _ = bench.whole("digits")
    images(tmp_path)
    live(ARGS, tmp_path, fault="benchmarks.faults:die_at_save,7,after")
    folder = run_of(tmp_path) / "checkpoints"
    for name in ("last", "previous"):
        empty(folder / f"{name}.ckpt")
    lives = until_done(partial(live, ARGS, tmp_path))
    assert f"resuming from {(folder / 'best.ckpt').relative_to(tmp_path)}" in lives[0].text
    (ours, theirs) = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (run_of(tmp_path), whole))
    for name, tensor in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], tensor), name


def test_all_checkpoints_corrupt(bench, tmp_path: Path) -> None:
    live(ARGS, tmp_path, fault="benchmarks.faults:die_at_save,2,after")
    for path in (run_of(tmp_path) / "checkpoints").glob("*.ckpt"):
        cut(path)
    life = live(ARGS, tmp_path)
    assert life.code == 2
    assert "this run has no intact checkpoint and must be restarted" in life.text


def test_completed_run_is_not_continued(bench) -> None:
    whole, _ = bench.whole("digits")
    before = curves(whole)
    folder = whole.parents[3]
    life = live(ARGS, folder)
    assert life.code == 0
    assert "nothing left to train" in life.text
    assert curves(whole) == before


def test_differences_are_detected(bench, tmp_path: Path) -> None:
    whole, _ = bench.whole("digits")
    other = [arg.replace("max_epochs=3", "max_epochs=2") for arg in ARGS]
    live(other, tmp_path)
    found = differences(run_of(tmp_path), whole)
    assert any(name.startswith("last.ckpt/state_dict/") for name in found)
    assert "curve val/acc" in found
    assert "1 of 1 runs, with 0 kills at random moments, ended " in table([Row("a", "b", 1, 2, "", found)], 0)


def test_two_processes_cannot_train_the_same_run(bench, tmp_path: Path) -> None:
    live(ARGS, tmp_path, fault="benchmarks.faults:die_at_save,2,after")
    with (run_of(tmp_path) / "checkpoints/.lock").open("wb") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        life = live(ARGS, tmp_path)
        assert life.code == 2
        assert "another process is training the run in runs/digits/kd/version_0" in life.text
    assert live(ARGS, tmp_path).code == 0
