"""`lkd compare`: which checkpoints and networks, on which data, and where the result goes."""

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

from lkd.cli.config_files import find_config
from lkd.compare.comparison import Comparison, compare, place_of
from lkd.compare.groups import methods_of
from lkd.compare.predictions import Candidate, statistics_of
from lkd.compare.tables import tables
from lkd.io.yaml import load_yaml
from lkd.loading import Trained, load_trained, network_of
from lkd.modules import DistillModule
from lkd.types import Normalization

_TEACHER = "teacher"
_SAME = ("input_shape", "resize")
"""What of a run's data is to be as in the data that all are measured on."""
_SPLIT = ("val_size", "split_seed")
"""The same for validation images: with others, some of them are training images."""


def main(args: Sequence[str]) -> None:
    """Compare runs and networks, print the tables, and write table, page, figures and curves.

    Args:
        args: The arguments behind `lkd compare`.

    Raises:
        FileNotFoundError: If a run or config does not exist.
        ValueError: If there is nothing to compare, or networks and data do not fit.
    """
    given = _parsed(args)
    runs = {name: load_trained(place) for name, place in _named(given.runs).items()}
    candidates, data, teacher = _chosen(given, runs)
    folder = _new_folder(Path(given.output))  # before the work: where nothing can be written, it would be in vain
    how = given.split, given.batch_sizes, given.accelerator, given.seconds
    found = compare(candidates, data, teacher, *how, progress=True)
    _check_classes(runs, found)
    console = Console()
    for table in tables(found, given.members):
        if table.place == "terminal":
            console.print(*table.rich(console.width), sep="\n")
    write(found, folder)
    for label, name in {"page": "comparison.html", "table": "comparison.md", "figures": "comparison.json"}.items():
        console.print(f"{label + ':':8} {folder / name}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"curves:  tensorboard --host localhost --logdir {folder}", soft_wrap=True, highlight=False)


def _parsed(args: Sequence[str]) -> Any:
    parser = ArgumentParser(prog="lkd compare", exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("runs", nargs="*", type=str)
    parser.add_argument("--networks", type=dict[str, nn.Module] | None)
    parser.add_argument("--normalization", type=dict[str, Normalization], default={})
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=False)
    parser.add_argument("--teacher", type=str | None)
    parser.add_argument("--split", type=Literal["test", "val"], default="test")
    parser.add_argument("--batch_sizes", type=list[int], default=[1, 64])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--accelerator", type=str, default="auto")
    parser.add_argument("--output", type=str, default="runs/compare")
    parser.add_argument("--members", action="store_true")
    args = list(_with_found_configs(args))
    _check_keys(args, {action.dest.partition(".")[0] for action in parser._actions})
    config = parser.parse_args(args)
    if not config.runs and not config.networks:
        raise ValueError("lkd compare needs runs, or networks in a --config; see 'lkd compare --help'")
    if any(size < 1 for size in config.batch_sizes) or not config.batch_sizes or config.seconds <= 0:
        raise ValueError(
            f"batch_sizes and seconds must be positive, got {config.batch_sizes} and {config.seconds}: for instance "
            "--batch_sizes [1,64] --seconds 1"
        )
    given = parser.instantiate(config)
    given.sources = {name: _source(settings) for name, settings in (config.networks or {}).items()}
    return given


def _check_keys(args: Sequence[str], known: set[str]) -> None:
    """A key that is no setting of this command is told by name: the parser would speak of what stands below it."""
    keys = [re.split(r"[.=+]", arg[2:], maxsplit=1)[0] for arg in args if arg.startswith("--")]
    for arg in args:
        if arg.startswith("--config="):
            keys += load_yaml(Path(arg.removeprefix("--config=")).read_text(encoding="utf-8"))
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(sorted(known))}"
            raise ValueError(f"lkd compare has no setting {key!r}; {hint}")


def _source(settings: Any) -> str:
    """Where a config's network comes from: its class, the network inside of it, the file of its weights."""
    own = settings.get("init_args") or {}
    inner = own.get("network")
    return ", ".join(filter(None, [settings.class_path, inner and inner.class_path, own.get("path")]))


def _with_found_configs(args: Sequence[str]) -> Iterator[str]:
    """The arguments, lkd's own configs by their paths."""
    rest = iter(args)
    for arg in rest:
        name, equals, value = arg.partition("=")
        yield f"--config={find_config(value if equals else next(rest, ''))}" if name == "--config" else arg


def _chosen(given: Any, runs: Mapping[str, Trained]) -> tuple[list[Candidate], L.LightningDataModule, str | None]:
    """Whom to compare, on what, and who is the teacher."""
    groups = methods_of(runs)
    candidates = [_of_run(name, run, groups.get(name)) for name, run in runs.items()]
    networks: Mapping[str, nn.Module] = given.networks or {}
    if unknown := set(given.normalization) - set(networks):
        raise ValueError(f"normalization is for networks of the config, {', '.join(networks)}, got {min(unknown)!r}")
    candidates += [
        Candidate(name, network, given.normalization.get(name), given.sources[name])
        for name, network in networks.items()
    ]
    teacher = given.teacher
    if teacher is None and _TEACHER in (one.name for one in candidates):
        teacher = _TEACHER
    wanted = teacher is None or (teacher == _TEACHER and teacher not in (one.name for one in candidates))
    if wanted and (own := next(filter(None, map(_teacher_of, runs.values())), None)):
        candidates, teacher = [own, *candidates], _TEACHER
    data = given.data or next((run.data for run in runs.values()), None)
    if data is None:
        raise ValueError("networks are compared on data: name a data module, data: {class_path: ...}, in the --config")
    for name, run in runs.items():
        if place_of(run.data) != place_of(data):
            rank_zero_warn(f"{name} was trained on {place_of(run.data)}, and is measured on {place_of(data)}")
        for fact in _SAME + (_SPLIT if given.split == "val" else ()):
            own, measured = (getattr(module, fact, None) for module in (run.data, data))
            if own is not None and measured is not None and repr(own) != repr(measured):  # None: not known yet
                rank_zero_warn(f"{name} was trained with {fact} {own}, and is measured with {measured}")
    return candidates, data, teacher


def _named(runs: Sequence[str]) -> dict[str, str]:
    """Name to place, of `[NAME=]PLACE`; a run without a name has its folder's, with the version where needed."""
    found: dict[str, str] = {}
    derived = Counter(_run_name(given) for given in runs if not _is_named(given))
    for given in runs:
        name, _, place = given.partition("=")
        if not _is_named(given):
            name, place = _run_name(given), given
            name = name if derived[name] == 1 else _run_name(given, versioned=True)
        if not name or not place or name in found:
            raise ValueError(
                f"each run needs a name of its own, got {given!r}"
                + (f" beside {name!r}" if name in found else "")
                + "; write NAME=PLACE, as in student=runs/digits/kd"
            )
        found[name] = place
    return found


def _is_named(given: str) -> bool:
    return "=" in given and not Path(given).exists()


def _run_name(place: str, versioned: bool = False) -> str:
    """The name of a run's folder: `kd` of `runs/digits/kd/version_0`, or `kd/version_0`."""
    parts = [part for part in Path(place).parts if part not in (os.sep, "checkpoints") and not part.endswith(".ckpt")]
    versions = []
    while len(parts) > 1 and parts[-1].startswith("version_"):
        versions.append(parts.pop())
    return "/".join([*parts[-1:], *(versions[:1] if versioned else [])]) or Path(place).stem


def _check_classes(runs: Mapping[str, Trained], found: Comparison) -> None:
    """Warn where a run was trained with other classes: many data modules know theirs once they have been used."""
    for name, run in runs.items():
        trained = run.checkpoint.get("lkd", {}).get("class_names") or getattr(run.data, "class_names", None)
        if trained and tuple(map(str, trained)) != tuple(found.class_names):
            rank_zero_warn(
                f"{name} was trained with the classes {_few(trained)}, and is measured with {_few(found.class_names)}"
            )


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _of_run(name: str, run: Trained, group: str | None) -> Candidate:
    return Candidate(name, network_of(run.module), statistics_of(run.data), str(run.path), run.module.unpack, group)


def _teacher_of(run: Trained) -> Candidate | None:
    """The teacher that a run's student has learned from, if it has one, with its weights."""
    module = run.module
    if not isinstance(module, DistillModule) or module.teacher is None or module.saves_teacher:
        return None
    if _TEACHER not in module.network_names:
        return None
    normalization = module.teacher_normalization or statistics_of(run.data)
    source = str(run.config.model.init_args.get("teacher_ckpt") or "")
    return Candidate(_TEACHER, module.teacher, normalization, source, module.unpack)


def _new_folder(parent: Path) -> Path:
    """A folder of its own for each comparison."""
    number = 0
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = parent / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def write(found: Comparison, folder: Path) -> None:
    """Write `comparison.json`, `.md` and `.html`, and TensorBoard's curves.

    Args:
        found: The comparison.
        folder: Where; it exists.
    """
    from lkd.compare.curves import write_curves  # they take matplotlib, which takes a second
    from lkd.compare.page import page
    from lkd.compare.plots import plots

    drawn = list(plots(found))
    (folder / "comparison.json").write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
    lines = [f"# {', '.join(found.figures)}", "", *(f"- {name}: {fact}" for name, fact in found.facts.items()), ""]
    for table in tables(found):
        lines += table.markdown()
    (folder / "comparison.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    (folder / "comparison.html").write_text(page(found, drawn), encoding="utf-8")
    write_curves(found, folder, drawn)
