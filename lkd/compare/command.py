"""`lkd compare`: selection of networks and data, and output of the results."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import nn

from lkd._compat import destinations_of
from lkd.cli.config_files import find_config
from lkd.compare.comparison import Comparison, ScoreComparison, check_comparable, compare, place_of
from lkd.compare.groups import methods_of
from lkd.compare.predictions import Candidate, statistics_of
from lkd.io.folders import new_folder
from lkd.io.tensor_cache import network_fingerprint
from lkd.io.yaml import load_yaml
from lkd.loading import Trained, load_run, network_of
from lkd.modules import DistillModule
from lkd.tasks import Classification, Task
from lkd.types import Normalization

_TEACHER = "teacher"
_SAME = ("input_shape", "resize")
"""Attributes of a run's data module that should be equal to those of the evaluation data."""
_SPLIT = ("val_size", "split_seed")
"""Additional attributes for the validation split; if they differ, the split contains training images of the run."""


def main(args: Sequence[str]) -> None:
    """Compare runs and networks, print the tables, and write a report, tables, JSON and TensorBoard files.

    Args:
        args: Arguments after `lkd compare`.

    Raises:
        FileNotFoundError: If a run or config does not exist.
        ValueError: If there is nothing to compare, or the networks do not fit the data.
    """
    given = _parsed(args)
    runs = {name: load_run(place) for name, place in _named(given.runs).items()}
    task = _task_of(given, runs)
    candidates, data, teacher = _chosen(given, runs)
    folder = new_folder(Path(given.output))  # before the work, in case the folder is not writable
    how = given.split, given.batch_sizes, given.accelerator, given.seconds
    comparison = compare(candidates, data, teacher, *how, progress=True, task=task)
    _check_classes(runs, comparison)
    console = Console()
    for table in comparison.tables(given.members):
        if table.place == "terminal":
            console.print(*table.rich(console.width), sep="\n")
    write(comparison, folder)
    for label, name in {"Report": "comparison.html", "Tables": "comparison.md", "JSON": "comparison.json"}.items():
        console.print(f"{label + ':':12} {folder / name}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"TensorBoard: tensorboard --host localhost --logdir {folder}", soft_wrap=True, highlight=False)


def _parsed(args: Sequence[str]) -> Any:
    parser = ArgumentParser(prog="lkd compare", exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("runs", nargs="*", type=str)
    parser.add_argument("--networks", type=dict[str, nn.Module] | None)
    parser.add_argument("--normalization", type=dict[str, Normalization], default={})
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=False)
    parser.add_subclass_arguments(Task, "task", required=False)
    parser.add_argument("--teacher", type=str | None)
    parser.add_argument("--split", type=Literal["test", "val"], default="test")
    parser.add_argument("--batch_sizes", type=list[int] | None)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--accelerator", type=str, default="auto")
    parser.add_argument("--output", type=str, default="runs/compare")
    parser.add_argument("--members", action="store_true")
    args = list(_with_found_configs(args))
    _check_keys(args, destinations_of(parser))
    config = parser.parse_args(args)
    if not config.runs and not config.networks:
        raise ValueError("lkd compare requires runs, or networks in a --config; see 'lkd compare --help'")
    sizes = config.batch_sizes
    if (sizes is not None and (not sizes or min(sizes) < 1)) or config.seconds <= 0:
        raise ValueError(
            f"batch_sizes and seconds must be positive, got {config.batch_sizes} and {config.seconds}; for example, "
            "use --batch_sizes [1,64] --seconds 1"
        )
    given = parser.instantiate(config)
    given.sources = {name: _source(settings) for name, settings in (config.networks or {}).items()}
    return given


def _task_of(given: Any, runs: Mapping[str, Trained]) -> Task:
    """Return the task of the networks: the setting `task` if given, otherwise the task of the runs.

    Raises:
        ValueError: If the runs have different tasks, or `lkd compare` does not support the task.
    """
    tasks = {name: run.module.task for name, run in runs.items()}
    task: Task = given.task or next(iter(tasks.values()), Classification())
    for name, own in tasks.items():
        if type(own) is not type(task):
            raise ValueError(
                f"{name} was trained for {type(own).__name__}, but the other networks are compared as "
                f"{type(task).__name__}; compare runs of one task"
            )
    check_comparable(task)
    return task


def _check_keys(args: Sequence[str], known: set[str]) -> None:
    """Report unknown settings by their top-level name; the parser would report a nested key instead."""
    keys = [re.split(r"[.=+]", arg[2:], maxsplit=1)[0] for arg in args if arg.startswith("--")]
    for arg in args:
        if arg.startswith("--config="):
            keys += load_yaml(Path(arg.removeprefix("--config=")).read_text(encoding="utf-8"))
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"available: {', '.join(sorted(known))}"
            raise ValueError(f"lkd compare has no setting {key!r}; {hint}")


def _source(settings: Any) -> str:
    """Return the origin of a network in a config: its class, the network inside it, and the file of its weights."""
    own = settings.get("init_args") or {}
    inner = own.get("network")
    return ", ".join(filter(None, [settings.class_path, inner and inner.class_path, own.get("path")]))


def _with_found_configs(args: Sequence[str]) -> Iterator[str]:
    """Yield the arguments, with the names of configs resolved to paths."""
    rest = iter(args)
    for arg in rest:
        name, equals, value = arg.partition("=")
        yield f"--config={find_config(value if equals else next(rest, ''))}" if name == "--config" else arg


def _chosen(given: Any, runs: Mapping[str, Trained]) -> tuple[list[Candidate], L.LightningDataModule, str | None]:
    """Return the networks to compare, the evaluation data, and the name of the teacher."""
    groups = methods_of(runs)
    candidates = [_of_run(name, run, groups.get(name)) for name, run in runs.items()]
    networks: Mapping[str, nn.Module] = given.networks or {}
    if unknown := set(given.normalization) - set(networks):
        raise ValueError(
            f"normalization applies only to the networks of the config ({', '.join(networks) or 'none'}), got "
            f"{min(unknown)!r}"
        )
    candidates += [
        Candidate(name, network, given.normalization.get(name), given.sources[name])
        for name, network in networks.items()
    ]
    teacher = given.teacher
    if teacher is None and _TEACHER in (one.name for one in candidates):
        teacher = _TEACHER
    wanted = teacher is None or (teacher == _TEACHER and teacher not in (one.name for one in candidates))
    if wanted and (found := {name: own for name, run in runs.items() if (own := _teacher_of(run))}):
        candidates, teacher = [next(iter(found.values())), *candidates], _TEACHER
        _warn_of_other_teachers(found)
    data = given.data or next((run.data for run in runs.values()), None)
    if data is None:
        raise ValueError("lkd compare requires data; add a data module, data: {class_path: ...}, to the --config")
    for name, run in runs.items():
        if place_of(run.data) != place_of(data):
            rank_zero_warn(f"{name} was trained on {place_of(run.data)}, but is evaluated on {place_of(data)}")
        for fact in _SAME + (_SPLIT if given.split == "val" else ()):
            own, measured = (getattr(module, fact, None) for module in (run.data, data))
            if own is not None and measured is not None and repr(own) != repr(measured):  # None: unknown
                rank_zero_warn(f"{name} was trained with {fact} {own}, but is evaluated with {measured}")
    return candidates, data, teacher


def _warn_of_other_teachers(found: Mapping[str, Candidate]) -> None:
    """Warn if a run has another teacher than the first one, with which all networks are compared."""
    (first, teacher), *others = found.items()
    for name, other in others:
        if network_fingerprint(other.network) != network_fingerprint(teacher.network):
            rank_zero_warn(
                f"{name} was trained with another teacher than {first}, but both are compared with the teacher of "
                f"{first}; name another network with --teacher"
            )


def _named(runs: Sequence[str]) -> dict[str, str]:
    """Parse `[NAME=]PLACE` into places by name. The default name is that of the folder, with its version if needed."""
    found: dict[str, str] = {}
    derived = Counter(_run_name(given) for given in runs if not _is_named(given))
    for given in runs:
        name, _, place = given.partition("=")
        if not _is_named(given):
            name, place = _run_name(given), given
            name = name if derived[name] == 1 else _run_name(given, versioned=True)
        if not name or not place or name in found:
            raise ValueError(
                f"each run must have a unique name, got {given!r}"
                + (f", whose name {name!r} is already used" if name in found else "")
                + "; write NAME=PLACE, as in student=runs/digits/kd"
            )
        found[name] = place
    return found


def _is_named(given: str) -> bool:
    return "=" in given and not Path(given).exists()


def _run_name(place: str, versioned: bool = False) -> str:
    """Return the name of a run from its folder: `kd` for `runs/digits/kd/version_0`, or `kd/version_0`."""
    parts = [part for part in Path(place).parts if part not in (os.sep, "checkpoints") and not part.endswith(".ckpt")]
    versions = []
    while len(parts) > 1 and parts[-1].startswith("version_"):
        versions.append(parts.pop())
    return "/".join([*parts[-1:], *(versions[:1] if versioned else [])]) or Path(place).stem


def _check_classes(runs: Mapping[str, Trained], comparison: Comparison | ScoreComparison) -> None:
    """Warn if a run was trained with different classes; many data modules know their classes only after setup."""
    for name, run in runs.items():
        trained = run.checkpoint.get("lkd", {}).get("class_names") or getattr(run.data, "class_names", None)
        if trained and tuple(map(str, trained)) != tuple(comparison.class_names):
            rank_zero_warn(
                f"{name} was trained with the classes {_few(trained)}, but is evaluated with "
                f"{_few(comparison.class_names)}"
            )


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _of_run(name: str, run: Trained, group: str | None) -> Candidate:
    return Candidate(name, network_of(run.module), statistics_of(run.data), str(run.path), run.module.unpack, group)


def _teacher_of(run: Trained) -> Candidate | None:
    """Return the teacher of a run, if it has one and its weights are available."""
    module = run.module
    if not isinstance(module, DistillModule) or module.teacher is None or module.saves_teacher:
        return None
    if _TEACHER not in module.network_names:
        return None
    normalization = module.teacher_normalization or statistics_of(run.data)
    source = str(run.config.model.init_args.get("teacher_ckpt") or "")
    return Candidate(_TEACHER, module.teacher, normalization, source, module.unpack)


def write(comparison: Comparison | ScoreComparison, folder: Path) -> None:
    """Write `comparison.json`, `comparison.md` and `comparison.html`, and TensorBoard files.

    Args:
        comparison: The comparison.
        folder: Existing output folder.
    """
    from lkd.compare.curves import write_curves  # imports matplotlib, which takes a second
    from lkd.compare.page import page
    from lkd.compare.plots import plots

    drawn = list(plots(comparison))
    (folder / "comparison.json").write_text(json.dumps(comparison.as_dict(), indent=2) + "\n", encoding="utf-8")
    facts = [f"- {name}: {fact}" for name, fact in comparison.facts.items()]
    lines = [f"# {', '.join(comparison.metrics)}", "", *facts, ""]
    for table in comparison.tables():
        lines += table.markdown()
    (folder / "comparison.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    (folder / "comparison.html").write_text(page(comparison, drawn), encoding="utf-8")
    write_curves(comparison, folder, drawn)
