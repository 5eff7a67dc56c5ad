"""Runs that are killed, told to stop, or failed by their disk end as if nothing had happened.

All settings, two processes too, and many more kills: python -m benchmarks.faults.
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
        "image files, read by 2 workers",
        "the teacher's answers kept",
        "memories (CRD)",
        "averaged weights (EMA)",
    ],
)
def test_killed_within_an_epoch(bench, settings: str) -> None:
    row = bench.failed("SIGKILL after the second checkpoint", "benchmarks.faults:die_at_save,2,after", settings)
    _assert_nothing_lost(row)


def test_killed_at_random_moments(bench) -> None:
    row = bench.killed("the digits")
    while not row.times:  # the moment came after the run's end
        row = bench.killed("the digits")
    _assert_nothing_lost(row)


def test_killed_while_a_checkpoint_is_written(bench) -> None:
    _assert_nothing_lost(bench.failed("", "benchmarks.faults:die_at_save,3,half"))


def test_killed_while_the_previous_checkpoint_gets_its_name(bench) -> None:
    _assert_nothing_lost(bench.failed("", "benchmarks.faults:die_at_link"))


def test_damaged_checkpoint(bench) -> None:
    _assert_nothing_lost(bench.torn("", flip))


def test_file_that_may_not_grow(bench) -> None:
    row = bench.failed("", "benchmarks.faults:small_files,60000", wanted="cannot be written")
    _assert_nothing_lost(row)
    assert "continue with --resume" in row.outcome


def test_folder_that_may_not_be_written(bench) -> None:
    row = bench.failed("", "benchmarks.faults:nobody", wanted="ermission denied")
    _assert_nothing_lost(row)
    assert "\n" not in row.outcome


@pytest.mark.parametrize(
    ("number", "code", "be"),
    [(signal.SIGTERM, 143, "anyone"), (signal.SIGINT, 1, "anyone"), (signal.SIGUSR1, 143, "slurm")],
)
def test_told_to_stop(bench, number: int, code: int, be: str) -> None:
    _assert_nothing_lost(bench.told("", int(number), code, be))


def test_all_checkpoints_of_a_run_damaged_but_the_best(bench, tmp_path: Path) -> None:
    whole, _ = bench.whole("the digits")
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


def test_no_checkpoint_is_whole(bench, tmp_path: Path) -> None:
    live(ARGS, tmp_path, fault="benchmarks.faults:die_at_save,2,after")
    for path in (run_of(tmp_path) / "checkpoints").glob("*.ckpt"):
        cut(path)
    life = live(ARGS, tmp_path)
    assert life.code == 2
    assert "this run has no intact checkpoint and must be restarted" in life.text


def test_a_run_at_its_end_has_nothing_to_do(bench) -> None:
    whole, _ = bench.whole("the digits")
    before = curves(whole)
    folder = whole.parents[3]
    life = live(ARGS, folder)
    assert life.code == 0
    assert "nothing was left to train" in life.text
    assert curves(whole) == before


def test_differences_are_found(bench, tmp_path: Path) -> None:
    whole, _ = bench.whole("the digits")
    other = [arg.replace("max_epochs=3", "max_epochs=2") for arg in ARGS]
    live(other, tmp_path)
    found = differences(run_of(tmp_path), whole)
    assert any(name.startswith("last.ckpt/state_dict/") for name in found)
    assert "curve val/acc" in found
    assert "of 1 the end differs" in table([Row("a", "b", 1, 2, "", found)], 0)


def test_two_processes_do_not_train_one_run(bench, tmp_path: Path) -> None:
    live(ARGS, tmp_path, fault="benchmarks.faults:die_at_save,2,after")
    with (run_of(tmp_path) / "checkpoints/.lock").open("wb") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        life = live(ARGS, tmp_path)
        assert life.code == 2
        assert "another process is training the run in runs/digits/kd/version_0" in life.text
    assert live(ARGS, tmp_path).code == 0
