"""Search space of a sweep: settings, each with a range or a list of choices."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from lkd.io.yaml import load_yaml

_RANGE = ("low", "high", "step", "log")
_HOW = "write a list of choices, or a range such as {low: 1, high: 16, log: true}"

Space = dict[str, BaseDistribution]
"""Distribution of each setting, by its dotted name."""


def read_space(files: Sequence[Path], options: Mapping[str, str], config: Mapping[str, Any]) -> Space:
    """Read a search space, and check it against the config.

    Args:
        files: YAML files with settings by their dotted names, or nested as in a config; later files override earlier
            ones.
        options: Settings from the command line: YAML text by dotted name.
        config: Resolved config of `lkd fit`.

    Returns:
        Settings in the given order.

    Raises:
        ValueError: If the space is empty, or a setting is neither a range nor a list of choices, or the config does not
            have it.
    """
    known = dict(_settings(config))
    given: dict[str, Any] = {}
    for path in files:
        given |= _flat(load_yaml(path.read_text(encoding="utf-8")), known)
    for key, text in options.items():
        given |= _flat({key: _read(key, text)}, known)
    if not given:
        raise ValueError(
            "lkd sweep requires settings to search: give --space FILE, or for example "
            "--space.model.init_args.distill_weight '{low: 0.1, high: 0.9}'"
        )
    return {key: _distribution(key, wanted, _current(key, known)) for key, wanted in given.items()}


def _read(key: str, text: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--space.{key} is not valid YAML: {' '.join(str(error).split())}") from error


def _flat(space: Mapping[str, Any], known: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names."""
    flat: dict[str, Any] = {}
    for key, value in space.items():
        name = f"{above}{key}"
        is_single = name in known and not isinstance(known[name], Mapping)
        if isinstance(value, Mapping) and not (is_single or set(value) & {"low", "high"}):
            flat |= _flat(value, known, f"{name}.")
        else:
            flat[name] = value
    return flat


def _settings(config: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items() if isinstance(config, Mapping) else ():
        yield f"{above}{key}", value
        yield from _settings(value, f"{above}{key}.")


def _current(key: str, known: Mapping[str, Any]) -> Any:
    """Return the value of a setting in the config.

    Raises:
        ValueError: If the config does not have this setting.
    """
    if key in known:
        return known[key]
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    same = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    hint = f"; did you mean {(same or nearest)[0]!r}?" if same or nearest else "; --print_config shows all settings"
    raise ValueError(f"the config has no setting {key!r}, which the search space contains{hint}")


def _distribution(key: str, wanted: Any, current: Any) -> BaseDistribution:
    if isinstance(wanted, list):
        choices = [_stored(choice) for choice in wanted]
        if not choices or len(set(choices)) < len(choices):  # Optuna does not distinguish 1, 1.0 and true
            raise ValueError(f"the choices of {key} must be a non-empty list of distinct values, got {wanted}")
        return CategoricalDistribution(choices)
    if not isinstance(wanted, Mapping):
        raise ValueError(
            f"the search space has a single value for {key}, {wanted}; {_HOW}; fixed values are set in --config or "
            "with --KEY VALUE"
        )
    if (unknown := set(map(str, wanted)) - set(_RANGE)) or not {"low", "high"} <= set(wanted):
        what = f"an unknown key {sorted(unknown)[0]!r}" if unknown else "no low or no high"
        raise ValueError(f"the range of {key} has {what}; {_HOW}")
    log = wanted.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"log of {key} must be true or false, got {log!r}")
    low, high = (_number(key, name, wanted[name]) for name in ("low", "high"))
    step = None if wanted.get("step") is None else _number(key, "step", wanted["step"])
    if not low < high or (log and not low > 0) or (step is not None and (log or not 0 < step <= high - low)):
        raise ValueError(
            f"the range of {key} must have low < high; with log, low must be positive and step is not allowed; "
            f"otherwise a step must be positive and at most high - low, got {dict(wanted)}"
        )
    whole = all(isinstance(number, int) for number in (low, high, step or 1))
    if whole and (current is None or (isinstance(current, int) and not isinstance(current, bool))):
        return IntDistribution(int(low), int(high), log=log, step=int(step or 1))
    return FloatDistribution(low, high, log=log, step=step)


def _stored(choice: Any) -> Any:
    """Return a choice for Optuna: plain values unchanged, others (a class with its settings, a list) as YAML."""
    if isinstance(choice, (bool, int, float, str, type(None))):
        return choice
    return yaml.safe_dump(choice, default_flow_style=True, width=math.inf, sort_keys=False).strip()


def _number(key: str, name: str, value: Any) -> int | float:
    number = value
    if isinstance(value, str):  # YAML reads 1e-3 as a string
        with suppress(ValueError):
            number = float(value)
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not math.isfinite(number):
        raise ValueError(f"{name} of {key} must be a finite number, got {value!r}")
    return number


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """Suggest the settings of a trial. A resumed trial keeps its settings.

    Args:
        trial: The trial.
        space: Search space.
    """
    return {key: _suggested(trial, key, distribution) for key, distribution in space.items()}


def _suggested(trial: Trial, key: str, of: BaseDistribution) -> Any:
    if isinstance(of, IntDistribution):
        return trial.suggest_int(key, of.low, of.high, step=of.step, log=of.log)
    if isinstance(of, FloatDistribution):
        return trial.suggest_float(key, of.low, of.high, step=of.step, log=of.log)
    return trial.suggest_categorical(key, of.choices)  # type: ignore[attr-defined]


def grid(space: Space) -> dict[str, list[Any]]:
    """Return all values of each setting.

    Raises:
        ValueError: If a setting does not have a finite list of values.
    """
    return {key: list(_values(key, distribution)) for key, distribution in space.items()}


def _values(key: str, distribution: BaseDistribution) -> Sequence[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return range(distribution.low, distribution.high + 1, distribution.step)
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        steps = round((distribution.high - distribution.low) / distribution.step)  # Optuna adjusts high
        return [float(f"{distribution.low + number * distribution.step:.12g}") for number in range(steps + 1)]
    raise ValueError(f"a grid requires a finite number of values of {key}; give a list of choices or a range with step")


def corners(space: Space) -> list[dict[str, Any]]:
    """Return the fewest combinations that contain every choice and both ends of every range."""
    ends = [
        distribution.choices
        if isinstance(distribution, CategoricalDistribution)
        else (distribution.low, distribution.high)  # type: ignore[attr-defined]
        for distribution in space.values()
    ]
    rows = itertools.islice(zip(*map(itertools.cycle, ends), strict=False), max(map(len, ends)))
    return [dict(zip(space, row, strict=True)) for row in rows]


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as command-line arguments of `lkd fit`."""
    return [f"--{key}={_text(value)}" for key, value in settings.items()]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest unique suffix of each dotted name."""
    ends = {key: [".".join(key.split(".")[-length:]) for length in range(1, key.count(".") + 2)] for key in keys}
    return {
        key: next((end for end in own if not any(end in ends[other] for other in keys if other != key)), key)
        for key, own in ends.items()
    }
