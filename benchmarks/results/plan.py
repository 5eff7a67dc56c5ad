"""Plans: YAML files that define experiments, and the cells that they consist of."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lkd.cli.config_files import find_config, read_config
from lkd.io.yaml import load_yaml

HERE = Path(__file__).parent
TEACHER, STUDENT = "teacher", "student alone"
LITERATURE = 240
"""Number of epochs to which the schedules of the overlays in configs/methods/ refer."""

Config = dict[str, Any]


def _published() -> Config:
    return dict(load_yaml((HERE / "published.yaml").read_text()))


@dataclass(frozen=True)
class Cell:
    """One training run, with everything that determines its results.

    Attributes:
        pair: Pair of networks; for a network without a teacher, the network's name.
        recipe: Name of the recipe.
        method: Name of the method.
        seed: Seed of the run.
        label: Name of the data, reported with every result.
        network: `class_path` and `init_args` of the trained network.
        configs: Settings of `lkd fit`; later configs take precedence.
        teacher: ID of the cell that trains the teacher; empty without a teacher.
    """

    pair: str
    recipe: str
    method: str
    seed: int
    label: str
    network: Config
    configs: tuple[Config, ...]
    teacher: str = ""

    @cached_property
    def id(self) -> str:
        """Readable name with a hash of the settings, the label of the data and the ID of the teacher."""
        content = json.dumps([self.label, self.configs, self.teacher], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        names = "-".join((self.pair, self.recipe, self.method)).replace(" ", "_").replace("/", "_")
        return f"{names}-{self.seed}-{digest}"


@dataclass(frozen=True)
class Row:
    """Row of the table: one setting, trained with one or more seeds.

    Attributes:
        pair: Pair of networks.
        recipe: Name of the recipe.
        method: Name of the method.
        cells: One cell per seed.
        published: Accuracy in the literature, in percent.
    """

    pair: str
    recipe: str
    method: str
    cells: tuple[Cell, ...]
    published: float | None


@dataclass(frozen=True)
class Method:
    """Settings of a method in a plan.

    Attributes:
        config: Settings that override the method's overlay.
        seeds: Seeds, if they differ from those of the plan.
        space: Settings that `--tune` searches, in the format of `lkd sweep --space`.
    """

    config: Config = field(default_factory=dict)
    seeds: list[int] | None = None
    space: Config = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Contents of a plan file.

    Attributes:
        label: Name of the data, reported with every result.
        data: Config of the images.
        recipes: Names of recipes, each with its config.
        pairs: Names of pairs in configs/pairs/, each with settings of its students (dotted names), such as a learning
            rate.
        methods: Names of overlays in configs/methods/, each with its settings.
        seeds: Seeds of the students; teachers use the first one.
        config: Settings of all cells, which override those of data, networks and recipe.
        complete: Complete configs, instead of data, recipes, pairs and methods: for each pair of networks, its name and
            the configs of its `teacher`, its `student alone` and its methods.
    """

    label: str
    seeds: list[int]
    data: str = ""
    recipes: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, Config] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    config: Config = field(default_factory=dict)
    complete: dict[str, dict[str, str]] = field(default_factory=dict)


def read_plan(name: str) -> Plan:
    """Read a plan.

    Args:
        name: A file, or the name of a plan in `plans/`.

    Raises:
        FileNotFoundError: If there is no such plan.
        ValueError: If a key is unknown or missing, or seeds are not different integers.
    """
    path = next((path for path in (Path(name), HERE / "plans" / f"{name}.yaml") if path.is_file()), None)
    if path is None:
        known = ", ".join(sorted(path.stem for path in (HERE / "plans").glob("*.yaml")))
        raise FileNotFoundError(f"no plan {name!r}; expected a YAML file or one of {known}")
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("it is empty or not a mapping")
        content["methods"] = {key: Method(**(value or {})) for key, value in content.get("methods", {}).items()}
        content["pairs"] = {key: value or {} for key, value in content.get("pairs", {}).items()}
        for pair, configs in content.get("complete", {}).items():
            if missing := [method for method in (TEACHER, STUDENT) if method not in configs]:
                raise KeyError(f"{pair} has no config for {missing[0]!r}")
        plan = Plan(**content)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        keys = ", ".join(part.name for part in fields(Plan))
        raise ValueError(f"{path} is not a plan with the keys {keys}: {error}") from error
    _check_types(plan, path)
    for seeds in (plan.seeds, *(method.seeds for method in plan.methods.values() if method.seeds is not None)):
        if not (isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)):
            raise ValueError(f"seeds in {path} must be a list of integers, such as [0, 1, 2], got {seeds!r}")
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds in {path} must differ, got {seeds}; repeated seeds would be counted twice")
    return plan


def _check_types(plan: Plan, path: Path) -> None:
    mappings: Config = {name: getattr(plan, name) for name in ("recipes", "pairs", "config", "complete")}
    mappings |= {f"methods.{name}.config": method.config for name, method in plan.methods.items()}
    for outer in ("pairs", "complete"):
        if isinstance(mappings[outer], dict):
            mappings |= {f"{outer}.{name}": value for name, value in mappings[outer].items()}
    for name, value in mappings.items():
        if not isinstance(value, dict):
            raise ValueError(f"{name} in {path} must be a mapping, got {value!r}")
    for name, recipe in plan.recipes.items():
        if not isinstance(recipe, str):
            raise ValueError(f"recipes.{name} in {path} must be the name of a config, got {recipe!r}")
    if not plan.complete and not (plan.data and plan.recipes and plan.pairs):
        raise ValueError(f"{path} must contain data, recipes and pairs, or complete configs")


def rows(plan: Plan, tuned: Mapping[str, Config] | None = None) -> list[Row]:
    """Return the rows of a plan's table: for each recipe and pair, the teacher, the student alone and the methods.

    Args:
        plan: The plan.
        tuned: Settings found by `--tune` (dotted names), by the ID of the cell that they modify.
    """
    found = []
    for recipe in plan.recipes:
        for pair in plan.pairs:
            found += _rows(plan, recipe, pair, tuned or {})
    for pair, configs in plan.complete.items():
        found += _complete_rows(plan, pair, configs)
    return found


def cells(table: Iterable[Row]) -> list[Cell]:
    """Return the cells of a table in the order of training: teachers, students alone, then methods seed by seed."""
    rank = {TEACHER: 0, STUDENT: 1}
    found = {cell.id: cell for row in table for cell in row.cells}
    return sorted(found.values(), key=lambda cell: (rank.get(cell.method, 2), cell.seed))


def nested(settings: Mapping[str, Any]) -> Config:
    """Convert settings with dotted names to a nested config.

    Example:
        >>> nested({"trainer.max_epochs": 3})
        {'trainer': {'max_epochs': 3}}
    """
    config: Config = {}
    for name, value in settings.items():
        *path, last = name.split(".")
        place = config
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return config


def weights_file(cell: str) -> str:
    """Return the path of a finished cell's weights, relative to the store."""
    return f"weights/{cell}.safetensors"


def _rows(plan: Plan, recipe: str, pair: str, tuned: Mapping[str, Config]) -> list[Row]:
    own = _config(f"pairs/{pair}")
    networks = own["model"]["init_args"]
    published = _published()
    figures, weights = published["figures"].get(pair, {}), published["weights"].get(pair, {})
    common = _config(plan.data), _config(plan.recipes[recipe])

    def cell(method: str, seed: int, network: str, *configs: Config, teacher: str = "") -> Cell:
        data, trainer = common
        model, *rest = configs
        name = pair if teacher else networks[network]["class_path"].rpartition(".")[2]
        over = (data, model, trainer, plan.config, *rest, {"seed_everything": seed})
        over += ({"model": {"init_args": {"teacher_ckpt": weights_file(teacher)}}},) if teacher else ()
        return Cell(name, recipe, method, seed, plan.label, networks[network], tuple(filter(None, over)), teacher)

    def row(method: str, *trained: Cell) -> Row:
        return Row(pair, recipe, method, trained, figures.get(method))

    settings = nested(plan.pairs[pair])
    teacher = cell(TEACHER, plan.seeds[0], "teacher", _alone(networks, "teacher"))
    alone = [cell(STUDENT, seed, "student", _alone(networks, "student"), settings) for seed in plan.seeds]
    found = [row(TEACHER, teacher), row(STUDENT, *alone)]
    for name, method in plan.methods.items():
        overlay = _scaled(_config(f"methods/{name}"), _epochs(common[1], plan.config))
        over = own, settings, overlay, nested(weights.get(name, {})), method.config
        seeds = method.seeds or plan.seeds
        trained = [cell(name, seed, "student", *over, teacher=teacher.id) for seed in seeds]
        found.append(row(name, *trained))
        if better := nested(tuned.get(trained[0].id, {})):
            name = f"{name}, tuned"
            found.append(row(name, *(cell(name, seed, "student", *over, better, teacher=teacher.id) for seed in seeds)))
    return found


def _complete_rows(plan: Plan, pair: str, configs: Mapping[str, str]) -> list[Row]:
    """Return the rows of complete configs."""
    contents = {method: _config(name) for method, name in configs.items()}
    taught_by = ""
    found = []
    for method in (TEACHER, STUDENT, *(method for method in configs if method not in (TEACHER, STUDENT))):
        networks = contents[method]["model"]["init_args"]
        over: Config = {}
        if "teacher" in networks:
            over = {"model": {"init_args": {"teacher_ckpt": weights_file(taught_by)}}}
        trained = tuple(
            Cell(
                *(pair, "own", method, seed, plan.label),
                networks.get("student", networks.get("model")),
                tuple(filter(None, (contents[method], plan.config, {"seed_everything": seed}, over))),
                taught_by if over else "",
            )
            for seed in (plan.seeds[:1] if method == TEACHER else plan.seeds)
        )
        taught_by = trained[0].id if method == TEACHER else taught_by
        found.append(Row(pair, "own", method, trained, None))
    return found


def _config(name: str) -> Config:
    return read_config(find_config(name))


def _alone(networks: Config, network: str) -> Config:
    """Return a config that trains one network of a pair without the other."""
    shared = {name: value for name, value in networks.items() if not name.startswith(("student", "teacher"))}
    return {"model": {"class_path": "lkd.ClassificationModule", "init_args": {"model": networks[network], **shared}}}


def _epochs(*configs: Config) -> int:
    """Return the number of epochs that the last config with one sets."""
    found = [epochs for config in configs if (epochs := config.get("trainer", {}).get("max_epochs"))]
    if not found:
        raise ValueError("neither the recipe nor the plan's config sets trainer.max_epochs")
    return int(found[-1])


def _scaled(overlay: Config, epochs: int) -> Config:
    """Scale the schedules of an overlay from the 240 epochs of the literature to the length of the run."""
    overlay = copy.deepcopy(overlay)
    for callback in overlay.get("trainer", {}).get("callbacks+", []):
        if "epochs" in callback["init_args"]:
            callback["init_args"]["epochs"] = max(1, round(callback["init_args"]["epochs"] * epochs / LITERATURE))
    return overlay
