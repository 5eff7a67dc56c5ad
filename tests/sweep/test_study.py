"""A study's trials, whatever they train: what they try, where they are kept, and what must not be mixed."""

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
    """Goes on with a study until it has so many trials, whose value is their weight."""

    def run(total: int, *args: str, **settings) -> Study:
        study = _study(*args, **settings)
        while claim := study.claim(total):
            study.finish(claim, Outcome(TrialState.COMPLETE, float(claim.settings["model.weight"])))
        write(study, with_page=False)
        return study

    return run


@pytest.mark.parametrize(("sampler", "trials"), [("tpe", 14), ("random", 5)])  # tpe draws its first ten at random
def test_in_parts_as_in_one_go(search, sampler: str, trials: int) -> None:
    args = [f"--sampler={sampler}"]
    for part in (1, 3, trials - 1, trials):
        search(part, *args)
    search(trials, *args, "--study=whole")
    rows = table()
    assert rows == table(FOLDER.with_name("whole"))
    assert len({row["model.weight"] for row in rows}) == trials
    search(1, *args, "--study=other", "--sampler_seed=1")
    assert table(FOLDER.with_name("other"))[0]["model.weight"] != rows[0]["model.weight"]


def test_tpe_tries_more_of_what_did_well(search) -> None:
    search(40)
    weights = [float(row["model.weight"]) for row in table()]
    assert sum(weights[20:]) / 20 > sum(weights[:10]) / 10 + 0.2


def test_a_grid_has_each_cell_once(search) -> None:
    for part in (2, 6):
        search(part, "--sampler=grid", space=GRID)
    cells = [(row["model.weight"], row["model.rate"]) for row in table()]
    assert len(cells) == 6
    assert set(cells) == {(weight, rate) for weight in ("0.0", "0.5", "1.0") for rate in ("0.1", "0.2")}


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best(search, mode: str) -> None:
    study = search(5, mode=mode)
    best = study.best
    assert study.optuna.best_value == best.value  # what samplers and pruners go by
    values = [float(row["value"]) for row in table()]
    assert best.value == {"min": min, "max": max}[mode](values)


@pytest.mark.parametrize(
    ("args", "settings", "said"),
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
def test_another_search_of_the_same_name_is_refused(search, args: list[str], settings, said: str) -> None:
    search(1)
    with pytest.raises(ValueError, match=said):
        _study(*args, **settings)
    _study(config={**CONFIG, "trainer": {"log_every_n_steps": 50}})  # changes no value
    _study(config={**CONFIG, "model": {"weight": 0.9, "rate": 0.1}})  # is searched


def test_trials_without_their_study_are_not_taken_for_a_new_ones(search) -> None:
    search(1)
    (FOLDER / "study.db").unlink()
    with pytest.raises(ValueError, match="belongs to a study that is not in this storage"):
        _study()


@pytest.mark.parametrize("storage", ["kept/study.log", "kept/study.db", "sqlite:///other.db"])
def test_kept_elsewhere(search, storage: str) -> None:
    for total in (1, 2):
        search(total, f"--storage={storage}")
    assert Path(storage.removeprefix("sqlite:///")).is_file()
    assert not (FOLDER / "study.db").exists()
    assert len(table()) == 2


def test_the_page_has_its_figures_and_no_markup_of_others(search) -> None:
    word = "<script>alert(1)</script>"
    space = {
        **SPACE,
        "model.name": CategoricalDistribution([word, None]),
        "model.rate": FloatDistribution(1, 9, log=True),
    }
    study = search(12, monitor=word, space=space)
    text = page(study, study.trials)
    assert text.count("<svg") == 4
    assert word not in text
    assert "&lt;script&gt;" in text
    empty = _study("--study=empty")
    assert "No trial is complete" in page(empty, empty.trials)
