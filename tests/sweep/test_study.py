"""Studies without training: sampled settings, storage, and the rejection of trials from another search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from lkd.sweep.fitting import Outcome, Plan
from lkd.sweep.options import read_options
from lkd.sweep.page import page
from lkd.sweep.results import write
from lkd.sweep.study import Study
from tests.sweep.conftest import FOLDER, table

CONFIG = {"seed_everything": 0, "model": {"weight": 0.5, "rate": 0.1}, "trainer": {"log_every_n_steps": 1}}
SPACE: dict[str, BaseDistribution] = {
    "model.weight": FloatDistribution(0, 1),
    "model.rate": CategoricalDistribution([0.1, 0.2]),
}
GRID: dict[str, BaseDistribution] = {**SPACE, "model.weight": FloatDistribution(0, 1, step=0.5)}


def _study(*args: str, space=SPACE, config=CONFIG, monitor: str = "val/acc", mode: str = "max") -> Study:
    plan = Plan(config, "small", Path("runs"), monitor, mode, 2)
    return Study(plan, space, read_options(["--config=x", *args]))


@pytest.fixture
def search() -> Callable[..., Study]:
    """Return a function that continues a study to a number of trials; a trial's value is its `model.weight`."""

    def run(total: int, *args: str, **settings) -> Study:
        study = _study(*args, **settings)
        while claim := study.claim(total):
            study.finish(claim, Outcome(TrialState.COMPLETE, float(claim.settings["model.weight"])))
        write(study, with_page=False)
        return study

    return run


@pytest.mark.parametrize(("sampler", "trials"), [("tpe", 14), ("random", 5)])  # TPE samples its first ten at random
def test_search_in_parts_equals_an_uninterrupted_one(search, sampler: str, trials: int) -> None:
    args = [f"--sampler={sampler}"]
    for part in (1, 3, trials - 1, trials):
        search(part, *args)
    search(trials, *args, "--study=whole")
    rows = table()
    assert rows == table(FOLDER.with_name("whole"))
    assert len({row["model.weight"] for row in rows}) == trials
    search(1, *args, "--study=other", "--sampler_seed=1")
    assert table(FOLDER.with_name("other"))[0]["model.weight"] != rows[0]["model.weight"]


def test_tpe_prefers_good_values(search) -> None:
    search(40)
    weights = [float(row["model.weight"]) for row in table()]
    assert sum(weights[20:]) / 20 > sum(weights[:10]) / 10 + 0.2


def test_grid_runs_each_cell_once(search) -> None:
    for part in (2, 6):
        search(part, "--sampler=grid", space=GRID)
    cells = [(row["model.weight"], row["model.rate"]) for row in table()]
    assert len(cells) == 6
    assert set(cells) == {(weight, rate) for weight in ("0.0", "0.5", "1.0") for rate in ("0.1", "0.2")}


@pytest.mark.parametrize("mode", ["min", "max"])
def test_best_trial(search, mode: str) -> None:
    study = search(5, mode=mode)
    best = study.best
    assert study.optuna.best_value == best.value  # used by samplers and pruners
    values = [float(row["value"]) for row in table()]
    assert best.value == {"min": min, "max": max}[mode](values)


@pytest.mark.parametrize(
    ("args", "settings", "message"),
    [
        (["--sampler=random"], {}, r"--sampler tpe \(now random\)"),
        (["--pruner=median"], {}, r"--pruner none \(now median\)"),
        (["--sampler_seed=3"], {}, r"--sampler_seed 0 \(now 3\)"),
        ([], {"config": {**CONFIG, "seed_everything": 7}}, r"seed_everything 0 \(now 7\)"),
        ([], {"mode": "min"}, r"checkpoint.mode max \(now min\)"),
        ([], {"space": GRID}, r"the space's model.weight Float\(.*step=None.*\) \(now Float\("),
        (
            [],
            {"space": {"model.weight": SPACE["model.weight"]}},
            r"the space's model.rate Categorical.* \(now nothing\)",
        ),
    ],
)
def test_name_of_another_search_is_rejected(search, args: list[str], settings, message: str) -> None:
    search(1)
    with pytest.raises(ValueError, match=message):
        _study(*args, **settings)
    _study(config={**CONFIG, "trainer": {"log_every_n_steps": 50}})  # does not affect results
    _study(config={**CONFIG, "model": {"weight": 0.9, "rate": 0.1}})  # the space sets this value


def test_trials_of_a_missing_study_are_rejected(search) -> None:
    search(1)
    (FOLDER / "study.db").unlink()
    with pytest.raises(ValueError, match="belongs to a study that is not in this storage"):
        _study()


@pytest.mark.parametrize("storage", ["kept/study.log", "kept/study.db", "sqlite:///other.db"])
def test_other_storage(search, storage: str) -> None:
    for total in (1, 2):
        search(total, f"--storage={storage}")
    assert Path(storage.removeprefix("sqlite:///")).is_file()
    assert not (FOLDER / "study.db").exists()
    assert len(table()) == 2


def test_page_contains_figures_and_escapes_markup(search) -> None:
    markup = "<script>alert(1)</script>"
    space = {
        **SPACE,
        "model.name": CategoricalDistribution([markup, None]),
        "model.rate": FloatDistribution(1, 9, log=True),
    }
    study = search(12, monitor=markup, space=space)
    text = page(study, study.trials)
    assert text.count("<svg") == 4
    assert markup not in text
    assert "&lt;script&gt;" in text
    empty = _study("--study=empty")
    assert "No trial is complete" in page(empty, empty.trials)
