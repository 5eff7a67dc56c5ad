"""What is done to the command line's arguments before Lightning's CLI sees them."""

from __future__ import annotations

import difflib
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_only

from lkd.checkpoints.find import checkpoints_of, config_of, in_folder, newest_checkpoint, read_checkpoint
from lkd.cli.config_files import checked_name, find_config, run_name

_NEWEST = ("last", "best")


class Prepared(NamedTuple):
    """What Lightning's CLI is given.

    Attributes:
        args: The arguments, the command first, with the paths of configs and checkpoint.
        name: The run's name.
        resumes: Whether a run is to continue exactly: `--resume` found one.
    """

    args: list[str]
    name: str
    resumes: bool = False


def prepare(args: Sequence[str]) -> Prepared:
    """Find the configs and the checkpoint that the arguments name, and the run's name.

    A checkpoint without a config stands for its run's own `config.yaml`.

    Args:
        args: The arguments after `lkd`, the command first.

    Returns:
        Arguments, name, and whether a run is resumed.

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
        if given.ckpt_path in _NEWEST and not Path(given.ckpt_path).exists() and not configs and given.name is None:
            raise ValueError(
                f"--ckpt_path {given.ckpt_path} is a checkpoint of the newest run of one name: add --name NAME or the "
                f"run's --config, or give the checkpoint's path{_near(root)}"
            )
        path = _find_checkpoint(given.ckpt_path, root, name)
        if not configs:
            configs = [config_of(path)]
            name = run_name(configs, root) if given.name is None else name
        if not any(arg.startswith("--weights_only") for arg in rest):  # otherwise the file is trusted to run code
            content = read_checkpoint(path, whole=args[0] == "fit")
            if given.resume:
                _say(f"resuming {path}, after {content['epoch']} epochs and {content['global_step']} steps")
        rest.append(f"--ckpt_path={path}")
    resumes = given.resume and given.ckpt_path is not None
    return Prepared([args[0], *(f"--config={path}" for path in configs), *rest], name, resumes)


def _resumed(command: str, given: Namespace, configs: Sequence[Path], runs: Path) -> str | None:
    """Return `last` if the newest run has left a checkpoint to continue from, otherwise None.

    Raises:
        ValueError: If `--resume` contradicts the other arguments.
    """
    if command != "fit":
        raise ValueError(f"--resume is for fit; lkd {command} takes --ckpt_path last or best, or a file")
    if given.ckpt_path is not None:
        raise ValueError("--resume takes the newest run's last checkpoint; leave out --resume or --ckpt_path")
    if not configs:
        raise ValueError("--resume needs the run's --config, which gives it its name; or give its --ckpt_path")
    if checkpoints_of(runs, "last"):
        return "last"
    _say(f"no run in {runs} has left a checkpoint; a new run begins")
    return None


@rank_zero_only
def _say(text: str) -> None:
    print(f"lkd: {text}", flush=True)


def _find_checkpoint(name: str, root: Path, run: str) -> Path:
    """A checkpoint's path: the file itself, a folder's best, or the `last` or `best` of the newest run of that name."""
    if Path(name).is_file():
        return Path(name)
    if Path(name).is_dir():
        return in_folder(Path(name), "best")
    if name in _NEWEST:
        return newest_checkpoint(root / run, name)
    hint = _near(root) or f"; a run writes it to {root}/<name>/version_<n>/checkpoints/"
    raise FileNotFoundError(f"there is no checkpoint {name!r}{hint}")


def _near(root: Path) -> str:
    """Return the end of a sentence: some checkpoints below a folder, if there are any."""
    found = sorted(str(path) for path in root.rglob("*.ckpt")) if root.is_dir() else []
    return f"; there are {', '.join(found[:4])}" if found else ""


def check_option(command: str, arg: str, own: Sequence[str]) -> None:
    """Notice an option that is nearly one of a command's own, before it goes on to the settings of a run.

    Args:
        command: The command.
        arg: An argument that is none of its own.
        own: Its own options (`--output`).

    Raises:
        ValueError: If it is one.
    """
    name = arg.partition("=")[0]
    if name.startswith("--") and (near := difflib.get_close_matches(name, own, 1, 0.75)):
        raise ValueError(f"lkd {command} has no option {name}; did you mean {near[0]}?")
