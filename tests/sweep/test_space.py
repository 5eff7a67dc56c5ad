"""Search spaces: ranges, choices and errors in them."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lkd.cli.config_files import configs_folder, find_config
from lkd.sweep.fitting import Settings
from lkd.sweep.space import as_arguments, corners, grid, read_space, short_names, suggest

CRITERION = "model.init_args.criterion"
CONFIG = {
    "seed_everything": 0,
    "model": {"class_path": "a.B", "init_args": {"weight": 0.5, "layers": 3, "criterion": None, "deep": True}},
    "data": {"init_args": {"weight": 1}},
}


def _read(text: str, **options: str):
    Path("read.yaml").write_text(text)
    return read_space([Path("read.yaml")], options, CONFIG)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("model.init_args.weight: {low: 1, high: 2}", FloatDistribution(1, 2)),  # the setting is a float
        ("model.init_args.layers: {low: 1, high: 9, step: 2}", IntDistribution(1, 9, step=2)),
        ("model.init_args.layers: {low: 1, high: 9, log: true}", IntDistribution(1, 9, log=True)),
        ("model.init_args.layers: {low: 1.0, high: 9}", FloatDistribution(1, 9)),
        ("model.init_args.criterion: {low: 1, high: 9}", IntDistribution(1, 9)),  # the setting has no type
        ("model.init_args.weight: {low: 1e-4, high: 1e-1, log: true}", FloatDistribution(1e-4, 1e-1, log=True)),
        ("model: {init_args: {weight: [0.1, 0.2]}}", CategoricalDistribution([0.1, 0.2])),
        ("model.init_args.criterion: [null, {class_path: x.Y}]", CategoricalDistribution([None, "{class_path: x.Y}"])),
    ],
)
def test_settings_are_read_as_distributions(text: str, found: object) -> None:
    assert list(_read(text).values()) == [found]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.init_args.wieght: [1, 2]", "did you mean 'model.init_args.weight'?"),
        ("init_args.layers: [1, 2]", "did you mean 'model.init_args.layers'?"),
        ("model.init_args.weight: 3", "write a list of choices, or a range"),
        ("model.init_args.weight: {lo: 1, high: 2}", "has an unknown key 'lo'"),
        ("model.init_args.weight: {low: 1}", "has no low or no high"),
        ("model.init_args.weight: {low: 2, high: 1}", "must have low < high"),
        ("model.init_args.weight: {low: 0, high: 1, log: true}", "with log, low must be positive"),
        ("model.init_args.weight: {low: 1, high: 2, log: true, step: 0.5}", "and step is not allowed"),
        ("model.init_args.weight: {low: 1, high: 2, log: yes please}", "log of model.init_args.weight must be true"),
        ("model.init_args.weight: {low: a, high: 2}", "must be a finite number, got 'a'"),
        ("model.init_args.weight: {low: .nan, high: 2}", "must be a finite number, got nan"),
        ("model.init_args.weight: []", "must be a non-empty list of distinct values"),
        ("model.init_args.weight: [1, 1]", "must be a non-empty list of distinct values"),
        ("model.init_args.weight: [1, 1.0]", "must be a non-empty list of distinct values"),
        ("model.init_args.weight: [0, 1, true]", "must be a non-empty list of distinct values"),
        ("{}", "requires settings to search"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        _read(text)


def test_later_settings_override_earlier_ones() -> None:
    found = _read("model.init_args.weight: [1, 2]", **{"model.init_args.weight": "[3]"})
    assert found == {"model.init_args.weight": CategoricalDistribution([3])}
    with pytest.raises(ValueError, match=r"--space\.model\.init_args\.weight is not valid YAML"):
        _read("{}", **{"model.init_args.weight": "[3"})


def test_grid_and_corners() -> None:
    space = _read("{model.init_args.weight: {low: 0, high: 0.3, step: 0.1}, model.init_args.layers: [2, 3, 5]}")
    assert grid(space) == {"model.init_args.weight": [0.0, 0.1, 0.2, 0.3], "model.init_args.layers": [2, 3, 5]}
    assert [list(row.values()) for row in corners(space)] == [[0.0, 2], [0.3, 3], [0.0, 5]]
    whole = _read("model.init_args.layers: {low: 2, high: 8, step: 3}")
    assert list(grid(whole).values()) == [[2, 5, 8]]
    with pytest.raises(ValueError, match="a grid requires a finite number of values"):
        grid(_read("model.init_args.weight: {low: 0, high: 1}"))


def test_suggested_values_are_in_the_space() -> None:
    space = _read("{model.init_args.weight: {low: 1, high: 8, log: true}, model.init_args.layers: {low: 2, high: 3}}")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [suggest(study.ask(), space) for _ in range(20)]
    assert {values["model.init_args.layers"] for values in drawn} == {2, 3}
    assert all(1 <= values["model.init_args.weight"] <= 8 for values in drawn)


@pytest.mark.parametrize(("low", "high"), [("1", "10000"), ("1.0", "10000.0")])
def test_log_range_is_sampled_uniformly_in_the_logarithm(low: str, high: str) -> None:
    space = _read(f"model.init_args.layers: {{low: {low}, high: {high}, log: true}}")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [suggest(study.ask(), space)["model.init_args.layers"] for _ in range(40)]
    assert 10 <= sum(value < 100 for value in drawn) <= 30


def test_values_are_applied_to_the_config() -> None:
    settings = Settings(["--config=small.yaml"])
    settings.change(as_arguments({CRITERION: "{class_path: lkd.losses.DKD, init_args: {beta: 8.0}}"}))
    assert settings.resolved()["model"]["init_args"]["criterion"]["init_args"]["beta"] == 8.0
    plain = {"trainer.gradient_clip_val": 1e-05, "trainer.deterministic": True, "trainer.logger": None}
    settings.change(as_arguments(plain))
    found = settings.resolved()["trainer"]
    assert {f"trainer.{name}": found[name] for name in ("gradient_clip_val", "deterministic", "logger")} == plain
    assert settings.resolved()["model"]["init_args"]["criterion"]["class_path"] == "lkd.losses.KD"  # is reset


def test_short_names() -> None:
    names = ["a.init_args.weight", "b.init_args.weight", "c.lr", "seed", "x.seed"]
    short = ["a.init_args.weight", "b.init_args.weight", "lr", "seed", "x.seed"]
    assert list(short_names(names).values()) == short


@pytest.mark.parametrize("path", sorted((configs_folder() / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_included_spaces_apply_to_included_configs(path: Path) -> None:
    settings = Settings(["--config=shapes/kd" if path.stem.endswith("_segmentation") else "--config=digits/kd"])
    space = read_space([find_config(f"sweep/{path.stem}")], {}, settings.resolved())
    assert "model.init_args.distill_weight" in space
    if "grid" in path.stem:
        assert [len(values) for values in grid(space).values()] == [5, 5]
    for corner in corners(space):
        settings.change(as_arguments(corner))
        assert settings.resolved()["model"]["init_args"]["distill_weight"] == corner["model.init_args.distill_weight"]
