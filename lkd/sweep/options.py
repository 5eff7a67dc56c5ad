"""Options of `lkd sweep`, separated from those of `lkd fit`."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from lkd._compat import options_of
from lkd.cli.arguments import check_option

SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("none", "median", "halving", "hyperband")

_FIT = ("seed_everything", "config", "print_config", "model", "data", "trainer")


class Options(NamedTuple):
    """Options of a sweep.

    Attributes:
        space_files: Values of `--space`.
        space: Search space from `--space.KEY VALUE`: YAML text by the name of the setting.
        trials: Total number of trials; None for the default.
        sampler: One of `SAMPLERS`.
        seed: Seed of the sampler.
        pruner: One of `PRUNERS`.
        storage: File or URL of the storage; None for a file in the folder of the study.
        study: Name of the study.
        take_over: Numbers of trials to resume although they were started elsewhere.
        give_up: Numbers of interrupted trials to mark as failed.
        fit: Arguments of `lkd fit`.
    """

    space_files: list[str]
    space: dict[str, str]
    trials: int | None
    sampler: str
    seed: int
    pruner: str
    storage: str | None
    study: str
    take_over: list[int]
    give_up: list[int]
    fit: list[str]


def read_options(args: Sequence[str]) -> Options:
    """Parse the arguments of `lkd sweep`.

    Args:
        args: Arguments after `lkd sweep`.

    Raises:
        ValueError: If an option is unknown or its value is invalid.
    """
    if not args:
        raise ValueError("lkd sweep requires --config FILE and --space FILE; see 'lkd sweep --help'")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--space", action="append", default=[])
    for name, default in (("sampler", "tpe"), ("sampler_seed", "0"), ("pruner", "none"), ("study", "sweep")):
        parser.add_argument(f"--{name}", default=default)
    for name in ("trials", "storage", "monitor"):
        parser.add_argument(f"--{name}")
    for name in ("take_over", "give_up"):
        parser.add_argument(f"--{name}", nargs="+", default=[])
    try:
        given, rest = parser.parse_known_args(list(args))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    space, fit = _separated(rest, options_of(parser))
    _one_of("--sampler", given.sampler, SAMPLERS)
    _one_of("--pruner", given.pruner, PRUNERS)
    if not re.fullmatch(r"\w[\w.-]*", given.study) or given.study.startswith("version_"):
        raise ValueError(
            "--study must be a folder name of letters, digits, _, - and ., and must not start with 'version_', got "
            f"{given.study!r}"
        )
    return Options(
        given.space,
        space,
        None if given.trials is None else _number("--trials", given.trials, 1),
        given.sampler,
        _number("--sampler_seed", given.sampler_seed),
        given.pruner,
        given.storage,
        given.study,
        [_number("--take_over", number) for number in given.take_over],
        [_number("--give_up", number) for number in given.give_up],
        fit + ([f"--checkpoint.monitor={given.monitor}"] if given.monitor else []),
    )


def _separated(args: Sequence[str], own: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the settings of the search space, and the remaining arguments."""
    space: dict[str, str] = {}
    left: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        if name.startswith("--space."):
            if not equals and not rest:
                raise ValueError(f"{name} requires choices or a range, as in {name} '[0.1, 0.5]'")
            space[name.removeprefix("--space.")] = value if equals else rest.pop(0)
            continue
        if name in ("--resume", "--ckpt_path"):
            raise ValueError(f"lkd sweep does not accept {name}; repeat the same command to resume its study")
        if name[2:] not in _FIT:
            check_option("sweep", arg, own)
        left.append(arg)
    return space, left


def _one_of(option: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        near = difflib.get_close_matches(given, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{option} must be one of {', '.join(known)}, got {given!r}{hint}")


def _number(option: str, text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{option} must be an integer of at least {least}, got {text!r}")
    return int(text)
