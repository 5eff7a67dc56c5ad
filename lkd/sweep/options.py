"""The options of `lkd sweep`, told from those of `lkd fit`."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from lkd.cli.arguments import check_option

SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("none", "median", "halving", "hyperband")

_FIT = ("seed_everything", "config", "print_config", "model", "data", "trainer")


class Options(NamedTuple):
    """What a sweep is asked for.

    Args:
        space_files: What stands behind `--space`.
        space: Settings to search from `--space.KEY VALUE`: name to YAML.
        trials: How many there are to be; None: as many as is usual.
        sampler: One of `SAMPLERS`.
        seed: The sampler's.
        pruner: One of `PRUNERS`.
        storage: A file or a URL; None: in the study's folder.
        study: The study's name.
        take_over: Numbers of trials that are taken up though they were begun elsewhere.
        give_up: Numbers of trials that are not taken up any more.
        fit: What `lkd fit` takes.
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
    """Take the arguments apart.

    Args:
        args: The arguments behind `lkd sweep`.

    Raises:
        ValueError: If one of them is none, or has no such value.
    """
    if not args:
        raise ValueError("lkd sweep needs --config FILE and --space FILE; see 'lkd sweep --help'")
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
    space, fit = _told_apart(rest, [action.option_strings[0] for action in parser._actions])
    _one_of("--sampler", given.sampler, SAMPLERS)
    _one_of("--pruner", given.pruner, PRUNERS)
    if not re.fullmatch(r"\w[\w.-]*", given.study) or given.study.startswith("version_"):
        raise ValueError(
            f"--study names a folder by letters, digits, _, - and ., not as runs are (version_0), got {given.study!r}"
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


def _told_apart(args: Sequence[str], own: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The space's settings, and what is left."""
    space: dict[str, str] = {}
    left: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        if name.startswith("--space."):
            if not equals and not rest:
                raise ValueError(f"{name} needs choices or a range, as in {name} '[0.1, 0.5]'")
            space[name.removeprefix("--space.")] = value if equals else rest.pop(0)
            continue
        if name in ("--resume", "--ckpt_path"):
            raise ValueError(f"lkd sweep takes no {name}: the same command, given again, goes on with its study")
        if name[2:] not in _FIT:
            check_option("sweep", arg, own)
        left.append(arg)
    return space, left


def _one_of(option: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        near = difflib.get_close_matches(given, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"{option} has no {given!r}; {hint}")


def _number(option: str, text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{option} takes a whole number from {least} on, got {text!r}")
    return int(text)
