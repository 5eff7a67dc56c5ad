"""Finding and reading the checkpoints of runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lkd.checkpoints.io import damage_of
from lkd.io.refused import UntrustedError, shown
from lkd.io.safe_load import read_torch


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
    found = checkpoints_of(folder, name)
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


def checkpoints_of(folder: Path, name: str) -> list[Path]:
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
