"""Searches that are killed, interrupted, shared or abandoned: no trial is lost, and none is run twice."""

from __future__ import annotations

import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest

from benchmarks.lives import Life, live
from lkd.__main__ import main
from lkd.sweep import fitting
from tests.sweep.conftest import CONFIG, FOLDER, SPACE, table

SWEEP = ["sweep", "--config=small.yaml", "--space=space.yaml"]
THREE = [*SWEEP, "--trials=3"]
CELLS = [*SWEEP, "--sampler=grid", "--space.model.init_args.criterion.init_args.temperature=[4.0]"]


def _live(folder: Path, args: list[str], fault: str = "") -> Life:
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(CONFIG)
    (folder / "space.yaml").write_text(SPACE)
    return live(args, folder, fault=fault)


def _states(folder: Path) -> list[str]:
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / FOLDER / 'study.db'}")
    return [trial.state.name for trial in optuna.load_study(study_name="small/sweep", storage=storage).trials]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict[str, str]]:
    """Return the trials of an uninterrupted search."""
    folder = tmp_path_factory.mktemp("whole")
    assert _live(folder, THREE).code == 0
    return table(folder / FOLDER)


@pytest.mark.parametrize(
    ("fault", "code", "begun"),
    [
        ("benchmarks.faults:die_at_save,6,after", -signal.SIGKILL, ["COMPLETE", "RUNNING"]),  # between two epochs
        ("benchmarks.faults:die_at_save,1,half", -signal.SIGKILL, ["RUNNING"]),  # within the first checkpoint
        ("benchmarks.faults:told_at,2,15,none", 128 + signal.SIGTERM, ["RUNNING"]),
    ],
)
def test_killed_search_resumes_exactly(tmp_path, whole, fault: str, code: int, begun: list[str]) -> None:
    life = _live(tmp_path, THREE, fault)
    assert life.code == code, life.text
    assert _states(tmp_path) == begun
    assert ("interrupted; resume with: lkd sweep --config=small.yaml" in life.text) == (code > 0)
    life = _live(tmp_path, THREE)
    assert life.code == 0, life.text
    assert f"trial {len(begun) - 1} was interrupted; " in life.text
    assert table(tmp_path / FOLDER) == whole
    assert len(whole) == 3
    runs = sorted(str(run.relative_to(tmp_path / FOLDER)) for run in (tmp_path / FOLDER).glob("trial_*/version_*"))
    assert runs == [f"trial_000{number}/version_0" for number in range(3)]


def test_killed_grid_runs_each_cell_once(tmp_path) -> None:
    assert _live(tmp_path, CELLS, "benchmarks.faults:die_at_save,6,after").code == -signal.SIGKILL
    assert _states(tmp_path) == ["COMPLETE", "RUNNING"]
    assert _live(tmp_path, CELLS).code == 0
    rows = table(tmp_path / FOLDER)
    assert sorted(row["model.init_args.distill_weight"] for row in rows) == ["0.1", "0.5", "0.9"]
    assert {row["state"] for row in rows} == {"complete"}


def test_two_processes_share_a_search(tmp_path) -> None:
    args = [*SWEEP, "--trials=6", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    with ThreadPoolExecutor(2) as pool:
        lives = list(pool.map(lambda name: _live(tmp_path / name, args), ("one", "two")))
    assert [life.code for life in lives] == [0, 0], lives
    trials = [re.findall(r"^trial (\d+): ", life.text, re.MULTILINE) for life in lives]
    assert all(trials)
    assert sorted(trials[0] + trials[1]) == list("012345")
    assert [row["state"] for row in table(tmp_path / FOLDER)] == ["complete"] * 6


@pytest.fixture
def unfinished(sweep, monkeypatch):
    """Leave an unfinished trial 0 that belongs to another machine."""

    def train(*_: object) -> fitting.Outcome:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "train", train)
        patch.setattr("platform.node", lambda: "elsewhere")
        with pytest.raises(SystemExit, match="1"):
            main(THREE)


def _completed(*_: object) -> fitting.Outcome:
    return fitting.Outcome(optuna.trial.TrialState.COMPLETE, 0.5)


def test_unfinished_trial_of_another_machine(unfinished, sweep, capsys, monkeypatch) -> None:
    assert (
        "interrupted; resume with: lkd sweep --config=small.yaml --space=space.yaml --trials=3"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(fitting, "train", _completed)
    code, output = sweep("--trials=3")
    assert code == 0
    assert "3 trials: 1 running, 2 complete" in output
    assert "trial 0 is assigned to another process at elsewhere:" in output
    assert "if that process has ended, use --take_over 0" in output
    code, output = sweep("--trials=3", "--take_over=0")
    assert "trial 0 was interrupted; restarting from the beginning" in output
    assert "3 trials: 3 complete" in output


def test_give_up_marks_a_trial_as_failed(unfinished, sweep, monkeypatch) -> None:
    monkeypatch.setattr(fitting, "train", _completed)
    assert "3 trials: 1 failed, 2 complete" in sweep("--trials=3", "--give_up=0")[1]
    assert [row["reason"] for row in table()] == ["marked as failed by --give_up", "", ""]


def test_trial_finished_by_another_process(sweep, monkeypatch) -> None:
    def train(*_: object) -> fitting.Outcome:
        url = f"sqlite:///{FOLDER / 'study.db'}"
        optuna.load_study(study_name="small/sweep", storage=url).tell(0, 0.25)
        return _completed()

    monkeypatch.setattr(fitting, "train", train)
    code, output = sweep("--trials=1")
    assert code == 0
    assert "trial 0 was already finished by another process" in output
    assert [row["value"] for row in table()] == ["0.25"]
