"""`lkd fit --seeds`: the same run with several seeds, one after another, and what its results vary by."""

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
"""The table of results, in the folder of all runs of one name."""

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
"""Settings that change where a run is kept and what it shows, not what it trains."""
_LENGTH = "trainer.max_"
_INTERRUPTED = (128 + signal.SIGTERM, 128 + signal.SIGINT)


class Run(NamedTuple):
    """A run that exists.

    Args:
        folder: Its folder, `version_N`.
        config: Its saved settings.
    """

    folder: Path
    config: Mapping[str, Any]


class Result(NamedTuple):
    """What a run with one seed has achieved.

    Args:
        seed: The seed.
        folder: The run's folder; None if the run was not begun.
        monitor: The curve that chooses the best checkpoint.
        value: Its value at the best checkpoint; None if the run failed.
        reason: Why it failed.
    """

    seed: int
    folder: Path | None
    monitor: str = ""
    value: float | None = None
    reason: str = ""


def training_settings(config: Mapping[str, Any], length: bool = True) -> dict[str, Any]:
    """The settings that decide what a run trains, apart from its seed.

    Runs whose settings are equal differ only by seed, folder and display.

    Args:
        config: The settings, as a run saves them in `config.yaml`.
        length: Whether the length of the training is one of them.

    Returns:
        Each setting's value by its dotted name.
    """
    ignored = _PLACES if length else (*_PLACES, _LENGTH)
    return {name: value for name, value in _flat(config) if name not in _SEEDS and not name.startswith(ignored)}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


class _Settings(LkdCLI):
    """Parses the settings of a run, and builds nothing."""

    def _set_seed(self) -> None:
        """The random numbers of this process stay as they are."""

    def instantiate_classes(self) -> None:
        """Nothing is built."""

    def after_instantiate_classes(self) -> None:
        """Nothing was built."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing runs."""


def fit_seeds(args: Sequence[str], debug: bool = False) -> int:
    """Train one run for each seed, and print the mean and standard deviation of their results.

    Each run is `lkd fit` in a process of its own, so nothing of one run (memory, loggers, compiled code, random
    numbers, a crash) reaches the next one.

    Args:
        args: The arguments behind `lkd fit`.
        debug: Whether a run shows the whole traceback of an error.

    Returns:
        The exit code: 0, that of the first run that failed, or that of an interruption.

    Raises:
        ValueError: If the seeds are invalid, or other settings contradict them.
    """
    seeds, resume, rest = _parsed(args)
    settings, name = _resolved(rest)
    folder = Path(settings["trainer"]["default_root_dir"] or "runs") / name
    begun = {seed: _newest(folder, settings, seed) for seed in seeds} if resume else {}
    done = _done(folder, settings, begun)
    results: list[Result] = []
    code = 0
    for number, seed in enumerate(seeds, start=1):
        _say(f"seed {seed} ({number} of {len(seeds)}){f': done, {done[seed].folder}' if seed in done else ''}")
        if seed not in done:
            before, last = _newest(folder, settings, seed), _last_checkpoint(begun.get(seed))
            own = [*([f"--ckpt_path={last}"] if last else []), *(["--debug"] if debug else [])]
            ended = _fit([*rest, f"--seed_everything={seed}", *own])
            if ended in _INTERRUPTED:
                _say(f"interrupted; continue with: lkd fit {shlex.join(args if resume else [*args, '--resume'])}")
                return ended
            code, run = code or ended, _newest(folder, settings, seed)
            if ended and not last and run == before:  # it failed before its first step, as all others would
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
    """The seeds, whether to resume, and the arguments of each run."""
    parser = ArgumentParser(prog="lkd", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--seeds", default="", nargs="?", const="")
    parser.add_argument("--resume", action="store_true")
    given, rest = parser.parse_known_args(list(args))
    names = {arg.partition("=")[0] for arg in rest}
    if "--seed_everything" in names:
        raise ValueError(
            "--seeds sets seed_everything of each run, so leave --seed_everything out; for one run with that seed, "
            "leave --seeds out"
        )
    if "--ckpt_path" in names:
        raise ValueError("--ckpt_path continues one run; to continue the runs of --seeds, give --resume instead")
    return _seeds(given.seeds), given.resume, rest


def _seeds(text: str) -> list[int]:
    """The seeds that `5` (0 to 4) or `0,1,2` stands for."""
    parts = [part.strip() for part in text.strip("[]").rstrip(",").split(",")]
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
    seeds = list(range(numbers[0])) if numbers and len(parts) == 1 and "," not in text else numbers
    if len(numbers) < len(parts) or not seeds or len(set(seeds)) < len(seeds) or max(seeds) >= 2**32:
        raise ValueError(
            "--seeds takes the number of runs, at least 1 (--seeds 5: seeds 0 to 4), or different seeds separated by "
            f"commas (--seeds 0,1,2), got {text!r}"
        )
    return seeds


def _resolved(args: Sequence[str]) -> tuple[dict[str, Any], str]:
    """All settings of the runs, and their name.

    Raises:
        ValueError: If the runs would leave no best checkpoint in a folder of lkd's.
    """
    prepared, name, _ = prepare(["fit", *args])
    cli = copy_context().run(_Settings, prepared, name)
    settings: dict[str, Any] = yaml.safe_load(cli._parser("fit").dump(cli.config["fit"], skip_none=False))
    trainer, checkpoint = settings["trainer"], settings.get("checkpoint", {})
    if trainer["enable_checkpointing"] is False or trainer["fast_dev_run"] or not checkpoint.get("save_top_k", 1):
        raise ValueError(
            "--seeds reports the best checkpoint of each run, and there would be none; leave "
            "trainer.enable_checkpointing, trainer.fast_dev_run and checkpoint.save_top_k as they are"
        )
    if checkpoint.get("dirpath"):
        raise ValueError("--seeds keeps each run's checkpoints in its own folder; leave checkpoint.dirpath out")
    return settings, name


def _fit(args: Sequence[str]) -> int:
    """Train one run in a process of its own; returns its exit code."""
    run = subprocess.Popen([sys.executable, "-m", "lkd", "fit", *args])
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: run.terminate()) if is_main else None
    try:
        code = run.wait()
        return 128 - code if code < 0 else code  # killed by a signal: as a shell reports it
    except KeyboardInterrupt:  # the run gets it from the terminal, too, and writes a checkpoint
        run.wait()
        return 128 + signal.SIGINT
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _newest(folder: Path, settings: Mapping[str, Any], seed: int) -> Run | None:
    """The newest run with a seed and these settings, but for its length."""
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
    """The settings of a run to compare with those of the command: a precision that lkd has chosen is no difference."""
    found = training_settings(config, length)
    if settings["trainer"]["precision"] is None:
        del found["trainer.precision"]
    return found


def _last_checkpoint(run: Run | None) -> Path | None:
    """The checkpoint from which a run goes on; None if it has left none that is intact."""
    paths = [run.folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous")] if run else []
    return next((path for path in paths if path.is_file() and not damage_of(path)), None)


def _done(folder: Path, settings: Mapping[str, Any], begun: Mapping[int, Run | None]) -> dict[int, Result]:
    """Results of the runs that were finished, with these very settings."""
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
    """What a run has achieved: its last checkpoint knows the best one."""
    folder, path = run and run.folder, _last_checkpoint(run)
    if code or path is None:
        return Result(seed, folder, reason=f"exit code {code}" if code else "it has left no checkpoint")
    for name, state in read_checkpoint(path).get("callbacks", {}).items():
        if name.startswith(BestCheckpoint.__name__) and state["best_model_score"] is not None:
            return Result(seed, folder, str(state["monitor"]), float(state["best_model_score"]))
    return Result(seed, folder, reason="no curve was monitored")


def _write(folder: Path, results: Sequence[Result]) -> None:
    """Write the table; its rows tell `--resume` which runs are done."""
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
    """Print the results, and how they vary."""
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
        "table": str(folder / TABLE),
        "compare": f"lkd compare {' '.join(shlex.quote(str(one.folder)) for one in results if one.value is not None)}",
    }.items():
        console.print(f"{label + ':':8} {text}", highlight=False, markup=False)


def _number(value: float) -> str:
    return f"{value:.4g}"
