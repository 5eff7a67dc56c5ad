"""What is done to the command line's arguments before Lightning's CLI sees them."""

from __future__ import annotations

import difflib
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lkd.checkpoint_io import damage_of
from lkd.config_files import checked_name, find_config, run_name
from lkd.refused import UntrustedError, shown
from lkd.untrusted import read_torch

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
    if _checkpoints(runs, "last"):
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


def in_folder(folder: Path, name: str) -> Path:
    """A checkpoint in a run's folder, or in that of all runs of one name: of the newest that has left one.

    Args:
        folder: The folder.
        name: `best` or `last`.

    Raises:
        FileNotFoundError: If there is none.
    """
    own = folder / "checkpoints" / f"{name}.ckpt"
    return own if own.is_file() else newest_checkpoint(folder, name)


def newest_checkpoint(folder: Path, name: str) -> Path:
    """A checkpoint of the newest run that has left one.

    Args:
        folder: The folder of all runs of one name.
        name: `best`: of several that were kept, the best one; or `last`: the newest that is whole.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If none is whole.
    """
    found = _checkpoints(folder, name)
    if not found:
        raise FileNotFoundError(f"no run in {folder} has left a {name}.ckpt; give the checkpoint's path")
    if name == "last":
        return _newest_whole(found[0].parent)
    newest = found[0]
    if newest.stem == name:
        return newest
    for state in read_checkpoint(newest).get("callbacks", {}).values():  # the newest of several knows the best
        if state.get("monitor") and (path := state.get("best_model_path")):
            best = newest.with_name(Path(path).name)
            if best in found:
                return best
    return newest


def _checkpoints(folder: Path, name: str) -> list[Path]:
    """Checkpoints of all runs of one name, the newest first."""
    names = ("last", "previous") if name == "last" else (name,)
    found = [path for each in names for path in folder.glob(f"version_*/checkpoints/{each}*.ckpt")]
    return sorted(found, key=lambda path: (_number(path.parents[1]), path.stat().st_mtime), reverse=True)


def _number(version: Path) -> int:
    """The number of a run's folder."""
    number = version.name.removeprefix("version_")
    return int(number) if number.isdigit() else -1


def _newest_whole(folder: Path) -> Path:
    """The newest checkpoint of one run that is whole: `last.ckpt`, or what was kept before it."""
    torn: list[str] = []
    own = [path for name in ("last", "previous") if (path := folder / f"{name}.ckpt").is_file()]
    others = sorted({*folder.glob("*.ckpt")} - {*own}, key=lambda path: path.stat().st_mtime, reverse=True)
    for path in own + others:
        if not (damage := damage_of(path)):
            if torn:
                rank_zero_warn(f"{' and '.join(torn)}; the run goes on from {path}")
            return path
        torn.append(f"{shown(path)} is damaged ({damage})")
    raise ValueError(f"{' and '.join(torn)}; no checkpoint of this run is whole, so it has to begin anew")


def run_version(path: Path, runs: Path) -> int | None:
    """The version of the run that goes on from a checkpoint, in that run's own folder.

    Args:
        path: The checkpoint.
        runs: The folder of all runs of this name.

    Returns:
        Its number; None if the checkpoint is of another run, or not its last: then a new run begins with it.
    """
    version = path.absolute().parent.parent  # links stay: run and checkpoints may lie on another disk
    is_last = path.parent.name == "checkpoints" and path.stem in ("last", "previous")
    is_own = version.parent.resolve() == runs.resolve()
    return _number(version) if is_last and is_own and _number(version) >= 0 else None


def read_checkpoint(path: Path, whole: bool = False) -> Mapping[str, Any]:
    """A checkpoint's content; no code in it is run.

    Args:
        path: The file.
        whole: Whether it must have what a training needs to go on.

    Raises:
        ValueError: If it is none, or none that Lightning wrote.
    """
    try:
        content = read_torch(path)
    except UntrustedError as error:
        raise ValueError(f"{shown(path)} is not loaded: {error}") from error
    except Exception as error:  # damaged bytes can raise anything in the unpickler
        raise ValueError(
            f"{shown(path)} is not a checkpoint that PyTorch reads without running code, or it is damaged "
            f"({type(error).__name__}); give one that `lkd fit` has written, or, if you trust it, --weights_only false"
        ) from error
    needed = {"state_dict", "pytorch-lightning_version"} | ({"optimizer_states"} if whole else set())
    if not (isinstance(content, Mapping) and needed <= set(content) and isinstance(content["state_dict"], Mapping)):
        raise ValueError(
            f"{shown(path)} is not a whole checkpoint as `lkd fit` writes it; weights alone are "
            "--model.init_args.model_ckpt FILE (student_ckpt for a DistillModule)"
        )
    for name, tensor in content["state_dict"].items():
        if problem := _flaw(tensor):
            raise ValueError(f"{shown(path)} is not loaded: {shown(name)} {problem}; take an earlier one")
    return content


def _flaw(tensor: object) -> str:
    """Why a tensor cannot be a state, for a message; infinite numbers some criteria's own begin with."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        return ""
    if tensor.is_meta:
        return "has no content"
    return "has numbers that are NaN" if tensor.is_floating_point() and (tensor != tensor).any() else ""


def config_of(ckpt_path: Path) -> Path:
    """The config of the run in whose folder a checkpoint lies."""
    for folder in [*list(ckpt_path.absolute().parents)[:3], *list(ckpt_path.resolve().parents)[:3]]:
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise FileNotFoundError(
        f"no --config is given, and there is no config.yaml beside the checkpoint {str(ckpt_path)!r} or above it; "
        "give the config that it was trained with"
    )
