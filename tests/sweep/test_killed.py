"""A search that is killed, told to stop, shared or left: no trial is lost, none is made twice."""

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
    """The trials of a search that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    assert _live(folder, THREE).code == 0
    return table(folder / FOLDER)


@pytest.mark.parametrize(
    ("fault", "code", "begun"),
    [
        ("benchmarks.faults:die_at_save,6,after", -signal.SIGKILL, ["COMPLETE", "RUNNING"]),  # between two epochs
        ("benchmarks.faults:die_at_save,1,half", -signal.SIGKILL, ["RUNNING"]),  # nothing was saved yet
        ("benchmarks.faults:told_at,2,15,none", 128 + signal.SIGTERM, ["RUNNING"]),
    ],
)
def test_a_killed_search_goes_on_as_one_left_alone(tmp_path, whole, fault: str, code: int, begun: list[str]) -> None:
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


def test_a_killed_grid_has_each_cell_once(tmp_path) -> None:
    assert _live(tmp_path, CELLS, "benchmarks.faults:die_at_save,6,after").code == -signal.SIGKILL
    assert _states(tmp_path) == ["COMPLETE", "RUNNING"]
    assert _live(tmp_path, CELLS).code == 0
    rows = table(tmp_path / FOLDER)
    assert sorted(row["model.init_args.distill_weight"] for row in rows) == ["0.1", "0.5", "0.9"]
    assert {row["state"] for row in rows} == {"complete"}


def test_two_processes_share_the_work(tmp_path) -> None:
    args = [*SWEEP, "--trials=6", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    with ThreadPoolExecutor(2) as pool:
        lives = list(pool.map(lambda name: _live(tmp_path / name, args), ("one", "two")))
    assert [life.code for life in lives] == [0, 0], lives
    made = [re.findall(r"^trial (\d+): ", life.text, re.MULTILINE) for life in lives]
    assert all(made)
    assert sorted(made[0] + made[1]) == list("012345")
    assert [row["state"] for row in table(tmp_path / FOLDER)] == ["complete"] * 6


@pytest.fixture
def left(sweep, monkeypatch):
    """Trial 0 of another machine, which has not come to its end."""

    def train(*_: object) -> fitting.Outcome:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "train", train)
        patch.setattr("platform.node", lambda: "elsewhere")
        with pytest.raises(SystemExit, match="1"):
            main(THREE)


def _done(*_: object) -> fitting.Outcome:
    return fitting.Outcome(optuna.trial.TrialState.COMPLETE, 0.5)


def test_what_another_machine_has_left(left, sweep, capsys, monkeypatch) -> None:
    assert (
        "interrupted; resume with: lkd sweep --config=small.yaml --space=space.yaml --trials=3"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(fitting, "train", _done)
    code, said = sweep("--trials=3")
    assert code == 0
    assert "3 trials: 1 running, 2 complete" in said
    assert "trial 0 is assigned to another process at elsewhere:" in said
    assert "if that process has ended, use --take_over 0" in said
    code, said = sweep("--trials=3", "--take_over=0")
    assert "trial 0 was interrupted; restarting from the beginning" in said
    assert "3 trials: 3 complete" in said


def test_what_ends_its_process_each_time_can_be_given_up(left, sweep, monkeypatch) -> None:
    monkeypatch.setattr(fitting, "train", _done)
    assert "3 trials: 1 failed, 2 complete" in sweep("--trials=3", "--give_up=0")[1]
    assert [row["reason"] for row in table()] == ["marked as failed by --give_up", "", ""]


def test_a_trial_that_somebody_else_has_finished_meanwhile(sweep, monkeypatch) -> None:
    def train(*_: object) -> fitting.Outcome:
        url = f"sqlite:///{FOLDER / 'study.db'}"
        optuna.load_study(study_name="small/sweep", storage=url).tell(0, 0.25)
        return _done()

    monkeypatch.setattr(fitting, "train", train)
    code, said = sweep("--trials=1")
    assert code == 0
    assert "trial 0 was already finished by another process" in said
    assert [row["value"] for row in table()] == ["0.25"]
