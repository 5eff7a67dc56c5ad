"""`lkd fit --seeds`: train the same run with several seeds and report the variation of its results."""

from __future__ import annotations

import csv
import shlex
import signal
import statistics
import subprocess
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from lkd.callbacks import BestCheckpoint
from lkd.checkpoints.find import read_checkpoint
from lkd.checkpoints.io import damage_of
from lkd.cli.arguments import prepare
from lkd.cli.lightning_cli import LkdCLI
from lkd.io.tensor_cache import replacing
from lkd.io.yaml import load_yaml

TABLE = "seeds.csv"
"""File name of the table of results, in the folder of all runs with the same name."""

_SEEDS = ("seed_everything", "data.init_args.seed")
_PLACES = (
    "config",
    "name",
    "ckpt_path",
    "weights_only",
    "trainer.logger",
    "trainer.default_root_dir",
    "trainer.enable_",
    "trainer.log_every_n_steps",
    "trainer.profiler",
    "last_checkpoint",
    "checkpoint.dirpath",
    "checkpoint.verbose",
    "teacher_cache.folder",
)
"""Settings that affect where a run is saved and what it displays, but not what it trains."""
_LENGTH = "trainer.max_"
_INTERRUPTED = (128 + signal.SIGTERM, 128 + signal.SIGINT)


class Run(NamedTuple):
    """An existing run.

    Attributes:
        folder: Folder of the run, `version_N`.
        config: Saved settings of the run.
    """

    folder: Path
    config: Mapping[str, Any]


class Result(NamedTuple):
    """Result of the run with one seed.

    Attributes:
        seed: The seed.
        folder: Folder of the run; None if the run was not started.
        monitor: Metric that selects the best checkpoint.
        value: Value of this metric at the best checkpoint; None if the run failed.
        reason: Why the run failed.
    """

    seed: int
    folder: Path | None
    monitor: str = ""
    value: float | None = None
    reason: str = ""


def training_settings(config: Mapping[str, Any], length: bool = True) -> dict[str, Any]:
    """Return the settings that determine the training of a run, except for its seed.

    Runs with equal training settings differ only in their seed, folder and display.

    Args:
        config: Settings of a run, as saved in `config.yaml`.
        length: Whether to include the length of the training.

    Returns:
        Values by the dotted names of the settings.
    """
    ignored = _PLACES if length else (*_PLACES, _LENGTH)
    return {name: value for name, value in _flat(config) if name not in _SEEDS and not name.startswith(ignored)}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def fit_seeds(args: Sequence[str], debug: bool = False) -> int:
    """Train one run per seed, and print the mean and standard deviation of their results.

    Each run is a separate `lkd fit` process, so the state of one run (memory, loggers, compiled code, random numbers, a
    crash) does not affect the next one.

    Args:
        args: Arguments after `lkd fit`.
        debug: Whether to show the full traceback of an error in a run.

    Returns:
        Exit code: 0 on success, otherwise that of the first failed run, or that of an interruption.

    Raises:
        ValueError: If the seeds are invalid or contradict other settings.
    """
    seeds, resume, rest = _parsed(args)
    settings, name = _resolved(rest)
    folder = Path(settings["trainer"]["default_root_dir"] or "runs") / name
    begun = {seed: _newest(folder, settings, seed) for seed in seeds} if resume else {}
    done = _done(folder, settings, begun)
    results: list[Result] = []
    code = 0
    for number, seed in enumerate(seeds, start=1):
        _say(f"seed {seed} ({number} of {len(seeds)}){f': completed, {done[seed].folder}' if seed in done else ''}")
        if seed not in done:
            before, last = _newest(folder, settings, seed), _last_checkpoint(begun.get(seed))
            own = [*([f"--ckpt_path={last}"] if last else []), *(["--debug"] if debug else [])]
            ended = _fit([*rest, f"--seed_everything={seed}", *own])
            if ended in _INTERRUPTED:
                _say(f"interrupted; resume with: lkd fit {shlex.join(args if resume else [*args, '--resume'])}")
                return ended
            code, run = code or ended, _newest(folder, settings, seed)
            if ended and not last and run == before:  # failed before its first step, as would all others
                break
        results.append(done[seed] if seed in done else _result(seed, run, ended))
        _write(folder, results)
    if results:
        _report(folder, results)
    return code


def _say(text: str) -> None:
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        print(f"lkd: {text}", flush=True)


def _parsed(args: Sequence[str]) -> tuple[list[int], bool, list[str]]:
    """Return the seeds, whether to resume, and the arguments of each run."""
    parser = ArgumentParser(prog="lkd", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--seeds", default="", nargs="?", const="")
    parser.add_argument("--resume", action="store_true")
    given, rest = parser.parse_known_args(list(args))
    names = {arg.partition("=")[0] for arg in rest}
    if "--seed_everything" in names:
        raise ValueError(
            "--seeds sets seed_everything of each run; remove --seed_everything, or remove --seeds to train one run "
            "with this seed"
        )
    if "--ckpt_path" in names:
        raise ValueError("--ckpt_path resumes a single run; to resume the runs of --seeds, use --resume instead")
    return _seeds(given.seeds), given.resume, rest


def _seeds(text: str) -> list[int]:
    """Parse a number of seeds (`5`: 0 to 4) or a list of seeds (`0,1,2`)."""
    parts = [part.strip() for part in text.strip("[]").rstrip(",").split(",")]
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
    seeds = list(range(numbers[0])) if numbers and len(parts) == 1 and "," not in text else numbers
    if len(numbers) < len(parts) or not seeds or len(set(seeds)) < len(seeds) or max(seeds) >= 2**32:
        raise ValueError(
            "--seeds must be the number of runs, at least 1 (--seeds 5: seeds 0 to 4), or distinct seeds separated by "
            f"commas (--seeds 0,1,2), got {text!r}"
        )
    return seeds


def _resolved(args: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return all settings of the runs, and their name.

    Raises:
        ValueError: If the runs would not save their best checkpoints in their own folders.
    """
    prepared, name, _ = prepare(["fit", *args])
    cli = copy_context().run(LkdCLI, prepared, name, until="parsed")
    settings = cli.resolved()
    trainer, checkpoint = settings["trainer"], settings.get("checkpoint", {})
    if trainer["enable_checkpointing"] is False or trainer["fast_dev_run"] or not checkpoint.get("save_top_k", 1):
        raise ValueError(
            "--seeds reports the best checkpoint of each run, but with these settings none would be saved; use the "
            "defaults of trainer.enable_checkpointing, trainer.fast_dev_run and checkpoint.save_top_k"
        )
    if checkpoint.get("dirpath"):
        raise ValueError("--seeds saves the checkpoints of each run in its own folder; remove checkpoint.dirpath")
    return settings, name


def _fit(args: Sequence[str]) -> int:
    """Train one run in a separate process and return its exit code."""
    run = subprocess.Popen([sys.executable, "-m", "lkd", "fit", *args])
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: run.terminate()) if is_main else None
    try:
        code = run.wait()
        return 128 - code if code < 0 else code  # killed by a signal: as a shell reports it
    except KeyboardInterrupt:  # the run also receives it from the terminal, and saves a checkpoint
        run.wait()
        return 128 + signal.SIGINT
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _newest(folder: Path, settings: Mapping[str, Any], seed: int) -> Run | None:
    """Return the newest run with this seed and these settings, except for its length."""
    wanted = _comparable(settings, settings, length=False)
    found = [path for path in folder.glob("version_*/config.yaml") if path.parent.name[8:].isdigit()]
    for path in sorted(found, key=lambda path: int(path.parent.name[8:]), reverse=True):
        try:
            config = load_yaml(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        if config.get("seed_everything") == seed and _comparable(config, settings, length=False) == wanted:
            return Run(path.parent, config)
    return None


def _comparable(config: Mapping[str, Any], settings: Mapping[str, Any], length: bool = True) -> dict[str, Any]:
    """Return the training settings of a run for comparison; the precision is ignored if lkd selects it."""
    found = training_settings(config, length)
    if settings["trainer"]["precision"] is None:
        del found["trainer.precision"]
    return found


def _last_checkpoint(run: Run | None) -> Path | None:
    """Return the checkpoint from which to resume a run; None if it has no intact one."""
    paths = [run.folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous")] if run else []
    return next((path for path in paths if path.is_file() and not damage_of(path)), None)


def _done(folder: Path, settings: Mapping[str, Any], begun: Mapping[int, Run | None]) -> dict[int, Result]:
    """Return the results of the runs that were completed with exactly these settings, by seed."""
    try:
        with (folder / TABLE).open(newline="", encoding="utf-8") as file:
            finished = {row["run"] for row in csv.DictReader(file) if row["value"]}
    except (OSError, UnicodeDecodeError, KeyError):
        return {}
    wanted = _comparable(settings, settings)
    results = [
        _result(seed, run)
        for seed, run in begun.items()
        if run and run.folder.name in finished and _comparable(run.config, settings) == wanted
    ]
    return {result.seed: result for result in results if result.value is not None}


def _result(seed: int, run: Run | None, code: int = 0) -> Result:
    """Return the result of a run; its last checkpoint contains the score of the best one."""
    folder, path = run and run.folder, _last_checkpoint(run)
    if code or path is None:
        return Result(seed, folder, reason=f"exit code {code}" if code else "no checkpoint was saved")
    for name, state in read_checkpoint(path).get("callbacks", {}).items():
        if name.startswith(BestCheckpoint.__name__) and state["best_model_score"] is not None:
            return Result(seed, folder, str(state["monitor"]), float(state["best_model_score"]))
    return Result(seed, folder, reason="no metric was monitored")


def _write(folder: Path, results: Sequence[Result]) -> None:
    """Write the table of results, from which `--resume` reads which runs are complete."""
    if rank_zero_only.rank != 0 or not folder.is_dir():  # type: ignore[attr-defined]
        return
    with replacing(folder / TABLE) as path, path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["seed", "run", "monitor", "value", "reason"])
        for one in results:
            value = "" if one.value is None else one.value
            rows.writerow([one.seed, one.folder.name if one.folder else "", one.monitor, value, one.reason])


@rank_zero_only
def _report(folder: Path, results: Sequence[Result]) -> None:
    """Print the results, their mean and their standard deviation."""
    console = Console(soft_wrap=True)
    monitor = next((one.monitor for one in results if one.monitor), "result")
    table = Table("seed", f"best {monitor}", "run")
    for one in results:
        table.add_row(
            str(one.seed), f"failed: {one.reason}" if one.value is None else _number(one.value), str(one.folder)
        )
    console.print(table)
    values = [one.value for one in results if one.value is not None]
    if values:
        spread = f"standard deviation {_number(statistics.stdev(values))}" if len(values) > 1 else "one run only"
        console.print(f"mean {_number(statistics.mean(values))}, {spread}, n = {len(values)}", highlight=False)
    for label, text in {
        "Table": str(folder / TABLE),
        "Compare": f"lkd compare {' '.join(shlex.quote(str(one.folder)) for one in results if one.value is not None)}",
    }.items():
        console.print(f"{label + ':':8} {text}", highlight=False, markup=False)


def _number(value: float) -> str:
    return f"{value:.4g}"
