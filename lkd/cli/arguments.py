"""Preparation of the command-line arguments for Lightning's CLI."""

from __future__ import annotations

import difflib
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_only

from lkd.checkpoints.find import (
    available,
    checkpoints_of,
    config_of,
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
)
from lkd.cli.config_files import checked_name, find_config, run_name

_NEWEST = ("last", "best")


class Prepared(NamedTuple):
    """Arguments for Lightning's CLI.

    Attributes:
        args: Command, followed by its arguments, with resolved paths of configs and checkpoint.
        name: Name of the run.
        resumes: Whether `--resume` found a run to continue exactly.
    """

    args: list[str]
    name: str
    resumes: bool = False


def prepare(args: Sequence[str]) -> Prepared:
    """Resolve the configs, the checkpoint and the name of a run.

    If a checkpoint is given without a config, the `config.yaml` of its run is used.

    Args:
        args: Arguments after `lkd`: the command, followed by its options.

    Returns:
        Resolved arguments, name of the run, and whether a run is resumed.

    Raises:
        FileNotFoundError: If a config or the checkpoint does not exist.
        ValueError: If a config or the checkpoint is invalid, or the arguments contradict each other.
    """
    parser = ArgumentParser(prog="lkd", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--ckpt_path")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--name")
    parser.add_argument("--trainer.default_root_dir", dest="root")
    given, rest = parser.parse_known_args(args[1:])
    configs = [find_config(name) for name in given.config]
    root = Path(given.root or "runs")
    name = run_name(configs, root) if given.name is None else checked_name(given.name)
    for option, value in (("trainer.default_root_dir", given.root), ("name", given.name)):
        if value is not None:
            rest.append(f"--{option}={value}")
    if given.resume:
        given.ckpt_path = _resumed(args[0], given, configs, root / name)
    if given.ckpt_path not in (None, "null"):
        by_name = given.ckpt_path in _NEWEST and not Path(given.ckpt_path).exists()
        if by_name and not configs and given.name is None:
            raise ValueError(
                f"--ckpt_path {given.ckpt_path} selects a checkpoint of the newest run with a given name: add --name "
                f"NAME or the --config of the run, or give the path of a checkpoint{available(root)}"
            )
        path = newest_checkpoint(root / name, given.ckpt_path) if by_name else find_checkpoint(given.ckpt_path, root)
        if not configs:
            configs = [config_of(path)]
            name = run_name(configs, root) if given.name is None else name
        if not any(arg.startswith("--weights_only") for arg in rest):  # which declares that the file is trusted
            content = read_checkpoint(path, whole=args[0] == "fit")
            if given.resume:
                _say(f"resuming from {path}, after {content['epoch']} epochs and {content['global_step']} steps")
        if args[0] != "fit" and str(path) != given.ckpt_path:
            _say(f"checkpoint {path}")
        rest.append(f"--ckpt_path={path}")
    resumes = given.resume and given.ckpt_path is not None
    return Prepared([args[0], *(f"--config={path}" for path in configs), *rest], name, resumes)


def _resumed(command: str, given: Namespace, configs: Sequence[Path], runs: Path) -> str | None:
    """Return `last` if there is a checkpoint to resume from, otherwise None.

    Raises:
        ValueError: If `--resume` contradicts the other arguments.
    """
    if command != "fit":
        raise ValueError(
            f"--resume is only available in lkd fit; for lkd {command}, use --ckpt_path with last, best or a file"
        )
    if given.ckpt_path is not None:
        raise ValueError("--resume uses the last checkpoint of the newest run; remove either --resume or --ckpt_path")
    if not configs:
        raise ValueError("--resume requires the --config of the run, to find it by name; or use --ckpt_path instead")
    if checkpoints_of(runs, "last"):
        return "last"
    _say(f"no checkpoint found in {runs}; starting a new run")
    return None


@rank_zero_only
def _say(text: str) -> None:
    print(f"lkd: {text}", flush=True)


def check_option(command: str, arg: str, own: Sequence[str]) -> None:
    """Report a misspelled option of a command before it is parsed as a setting of a run.

    Args:
        command: Name of the command.
        arg: Argument that is not an option of the command.
        own: Options of the command, such as `--output`.

    Raises:
        ValueError: If the argument resembles an option of the command.
    """
    name = arg.partition("=")[0]
    if name.startswith("--") and (near := difflib.get_close_matches(name, own, 1, 0.75)):
        raise ValueError(f"lkd {command} has no option {name}; did you mean {near[0]}?")
