"""Functions to find and read the checkpoints of runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lkd.checkpoints.io import damage_of
from lkd.io.refused import UntrustedError, shown
from lkd.io.safe_load import read_torch


def find_checkpoint(place: str, root: Path = Path("runs")) -> Path:
    """Find a checkpoint by its path or by the folder of its run.

    Args:
        place: Path of a checkpoint; or the folder of a run, or of all runs with the same name, which selects the best
            checkpoint of the newest run.
        root: Folder of all runs, whose checkpoints an error message lists.

    Raises:
        FileNotFoundError: If the path does not exist, or no run in the folder has a best checkpoint.
    """
    path = Path(place)
    if path.is_file():
        return path
    if path.is_dir():
        own = path / "checkpoints" / "best.ckpt"
        return own if own.is_file() else newest_checkpoint(path, "best")
    folders = [str(folder) for folder in path.parent.glob("*") if folder.is_dir()]
    if nearest := difflib.get_close_matches(str(path), folders, n=1, cutoff=0.7):
        raise FileNotFoundError(f"checkpoint {place!r} does not exist; did you mean {nearest[0]!r}?")
    hint = available(root) or f"; runs save their checkpoints in {root}/<name>/version_<n>/checkpoints/"
    raise FileNotFoundError(f"checkpoint {place!r} does not exist{hint}")


def available(root: Path) -> str:
    """Return a hint that lists up to four checkpoints below a folder; empty if there are none."""
    found = sorted(str(path) for path in root.rglob("*.ckpt")) if root.is_dir() else []
    return f"; available: {', '.join(found[:4])}" if found else ""


def newest_checkpoint(folder: Path, name: str) -> Path:
    """Find a checkpoint of the newest run that has one.

    Args:
        folder: Folder of all runs with the same name.
        name: `best` for the best of the saved checkpoints, or `last` for the newest one that is not corrupt.

    Raises:
        FileNotFoundError: If no run in the folder has this checkpoint.
        ValueError: If all checkpoints are corrupt.
    """
    found = checkpoints_of(folder, name)
    if not found:
        raise FileNotFoundError(f"no run in {folder} has a {name}.ckpt; give the path of a checkpoint")
    if name == "last":
        return _newest_whole(found[0].parent)
    newest = found[0]
    if newest.stem == name:
        return newest
    for state in read_checkpoint(newest).get("callbacks", {}).values():  # the newest one records the best
        if state.get("monitor") and (path := state.get("best_model_path")):
            best = newest.with_name(Path(path).name)
            if best in found:
                return best
    return newest


def checkpoints_of(folder: Path, name: str) -> list[Path]:
    """Return the checkpoints of all runs with the same name, newest first."""
    names = ("last", "previous") if name == "last" else (name,)
    found = [path for each in names for path in folder.glob(f"version_*/checkpoints/{each}*.ckpt")]
    return sorted(found, key=lambda path: (_number(path.parents[1]), path.stat().st_mtime), reverse=True)


def _number(version: Path) -> int:
    """Return the number of a run's folder, or -1 if it has none."""
    number = version.name.removeprefix("version_")
    return int(number) if number.isdigit() else -1


def _newest_whole(folder: Path) -> Path:
    """Return the newest checkpoint of a run that is not corrupt: `last.ckpt`, or an earlier one."""
    corrupt: list[str] = []
    own = [path for name in ("last", "previous") if (path := folder / f"{name}.ckpt").is_file()]
    others = sorted({*folder.glob("*.ckpt")} - {*own}, key=lambda path: path.stat().st_mtime, reverse=True)
    for path in own + others:
        if not (damage := damage_of(path)):
            if corrupt:
                rank_zero_warn(f"{' and '.join(corrupt)}; resuming from {path}")
            return path
        corrupt.append(f"{shown(path)} is corrupt ({damage})")
    raise ValueError(f"{' and '.join(corrupt)}; this run has no intact checkpoint and must be restarted")


def run_version(path: Path, runs: Path) -> int | None:
    """Return the version of the run that is continued when resuming from a checkpoint.

    Args:
        path: Path of the checkpoint.
        runs: Folder of all runs with the same name.

    Returns:
        The version, or None if a new run starts from the checkpoint, because it belongs to another run or is not the
        last one of its run.
    """
    version = path.absolute().parent.parent  # keep symbolic links: the run may be stored on another disk
    is_last = path.parent.name == "checkpoints" and path.stem in ("last", "previous")
    is_own = version.parent.resolve() == runs.resolve()
    return _number(version) if is_last and is_own and _number(version) >= 0 else None


def read_checkpoint(path: Path, whole: bool = False) -> Mapping[str, Any]:
    """Read a checkpoint without executing any code in it.

    Args:
        path: Path of the checkpoint.
        whole: Whether the checkpoint must contain everything that is needed to resume training.

    Raises:
        ValueError: If the file is not a checkpoint saved by Lightning, or is corrupt.
    """
    try:
        content = read_torch(path)
    except UntrustedError as error:
        raise ValueError(f"{shown(path)} was not loaded: {error}") from error
    except Exception as error:  # corrupt bytes can raise anything in the unpickler
        raise ValueError(
            f"{shown(path)} is corrupt, or is not a checkpoint that PyTorch can read without executing code "
            f"({type(error).__name__}); use one saved by `lkd fit`, or, if you trust the file, --weights_only false"
        ) from error
    needed = {"state_dict", "pytorch-lightning_version"} | ({"optimizer_states"} if whole else set())
    if not (isinstance(content, Mapping) and needed <= set(content) and isinstance(content["state_dict"], Mapping)):
        raise ValueError(
            f"{shown(path)} is not a complete checkpoint as saved by `lkd fit`; load weights alone with "
            "--model.init_args.model_ckpt FILE (student_ckpt for a DistillModule)"
        )
    for name, tensor in content["state_dict"].items():
        if problem := _flaw(tensor):
            raise ValueError(f"{shown(path)} was not loaded: {shown(name)} {problem}; use an earlier checkpoint")
    return content


def _flaw(tensor: object) -> str:
    """Return why a tensor is not a valid state, for a message; infinity is valid, as initial state of some criteria."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        return ""
    if tensor.is_meta:
        return "has no data"
    return "contains NaN" if tensor.is_floating_point() and (tensor != tensor).any() else ""


def config_of(ckpt_path: Path) -> Path:
    """Return the path of the config of the run to which a checkpoint belongs.

    Raises:
        FileNotFoundError: If there is no `config.yaml` in the folder of the checkpoint or up to two levels above it.
    """
    for folder in [*list(ckpt_path.absolute().parents)[:3], *list(ckpt_path.resolve().parents)[:3]]:
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise FileNotFoundError(
        f"no --config given, and no config.yaml found in the folder of the checkpoint {str(ckpt_path)!r} or above it; "
        "give the config of its training run"
    )
