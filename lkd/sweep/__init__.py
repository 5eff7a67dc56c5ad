"""`lkd sweep`: hyperparameter search over temperature, weights or any other setting of `lkd fit`."""

from __future__ import annotations

import math
import re
import shlex
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

from lkd.cli.config_files import find_config

if TYPE_CHECKING:
    from lkd.sweep.fitting import Outcome
    from lkd.sweep.options import Options
    from lkd.sweep.study import Claim, Study

_TRIALS = 20
_DRAW_EVERY = 20.0
"""Minimum interval between updates of the page, in seconds; an update takes half a second."""

_ALIKE = 3
"""Number of trials that fail with the same message, before any trial has succeeded, after which the sweep ends."""


def main(args: Sequence[str]) -> None:
    """Start or resume a search.

    Args:
        args: Arguments after `lkd sweep`: its own options, and those of `lkd fit`.

    Raises:
        ValueError: If the search cannot start, or its trials fail repeatedly in the same way.
        SystemExit: After Ctrl-C or SIGTERM.
    """
    import optuna

    from lkd.sweep.options import read_options

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    options = read_options(args)
    with _stoppable(args):
        study, total = _planned(options)
        _work(study, total, options)
    _report(study)


@contextmanager
def _stoppable(args: Sequence[str]) -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, and print the command that resumes the search."""

    def stop(*_: Any) -> None:
        raise SIGTERMException

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if is_main else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, KeyboardInterrupt) or error.code or isinstance(error, SIGTERMException):
            print(f"interrupted; resume with: lkd sweep {shlex.join(args)}", flush=True)
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(1) from error  # the exit code of lkd fit
        raise
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _planned(options: Options) -> tuple[Study, int]:
    """Check the settings and the search space, and return the study and its total number of trials."""
    from lkd.sweep.fitting import Settings, planned
    from lkd.sweep.space import as_arguments, corners, grid, read_space
    from lkd.sweep.study import Study

    settings = Settings(options.fit)
    config = settings.resolved()
    space = read_space([find_config(name, "sweep") for name in options.space_files], options.space, config)
    fixed = {arg.partition("=")[0].removeprefix("--") for arg in options.fit}
    if both := sorted(fixed & set(space)):
        raise ValueError(f"{both[0]} is both in the search space and set on the command line; remove one of them")
    cells = math.prod(map(len, grid(space).values())) if options.sampler == "grid" else None
    for corner in corners(space):
        settings.change(as_arguments(corner))
    study = Study(planned(config, options.fit), space, options)
    return study, min(options.trials or cells, cells) if cells else options.trials or _TRIALS


def _work(study: Study, total: int, options: Options) -> None:
    """Train trials until the total number is reached.

    Raises:
        ValueError: If the trials fail repeatedly in the same way.
    """
    from lkd.sweep.results import write

    done = sum(trial.state.is_finished() for trial in study.trials)
    goal = "minimizing" if study.plan.mode == "min" else "maximizing"
    print(f"{study.folder}: {done} of {total} trials finished; {goal} {study.plan.monitor}", flush=True)
    drawn = -math.inf
    failures: Counter[str] | None = Counter()  # None after a trial that did not fail
    while claim := study.claim(total):
        try:
            outcome = _trained(study, claim, options)
        except BaseException:  # the trial can be resumed later
            study.give_back(claim)
            raise
        study.finish(claim, outcome)
        print(_line(study, claim, outcome), flush=True)
        if is_due := time.monotonic() - drawn > _DRAW_EVERY:
            drawn = time.monotonic()
        write(study, with_page=is_due)
        if outcome.state.name != "FAIL":
            failures = None
        elif failures is not None:
            failures[alike := re.sub(r"\d+", "", outcome.reason)] += 1
            if failures[alike] == _ALIKE:
                log = study.trial_folder(claim.trial.number) / "log.txt"
                raise ValueError(f"{_ALIKE} trials failed in the same way: {outcome.reason} (details in {log})")
    write(study)  # even without a new trial: a killed process may not have written it


def _trained(study: Study, claim: Claim, options: Options) -> Outcome:
    from optuna_integration import PyTorchLightningPruningCallback

    from lkd.sweep.fitting import last_checkpoint, train
    from lkd.sweep.space import as_arguments

    number = claim.trial.number
    folder = study.trial_folder(number)
    if claim.resumed:
        where = "resuming from its last checkpoint" if last_checkpoint(folder) else "restarting from the beginning"
        print(f"trial {number} was interrupted; {where}", flush=True)
    prunes = options.pruner != "none"
    callbacks = [PyTorchLightningPruningCallback(claim.trial, study.plan.monitor)] if prunes else []
    args = [*options.fit, *as_arguments(claim.settings)]
    return train(args, f"{study.name}/{folder.name}", folder, study.plan.monitor, callbacks)


def _line(study: Study, claim: Claim, outcome: Outcome) -> str:
    """Return the line that is printed after a trial: its settings, result, and the best trial so far."""
    from lkd.sweep.format import format_settings

    best = study.best
    if outcome.value is not None:
        result = f"{study.plan.monitor} {outcome.value:.5g}"
    else:
        result = f"failed: {outcome.reason}" if outcome.state.name == "FAIL" else f"pruned {outcome.reason}"
    so_far = f"; best {best.value:.5g} (trial {best.number})" if best else ""
    return f"trial {claim.trial.number}: {format_settings(claim.settings)}: {result}{so_far}"


def _report(study: Study) -> None:
    """Print the states of the trials, the best one, and the files of the study."""
    from lkd.sweep.format import format_settings, format_state
    from lkd.sweep.results import BEST, PAGE, TABLE, checkpoint

    trials = study.trials
    states = Counter(map(format_state, trials))
    print(f"\n{len(trials)} trials: {', '.join(f'{number} {state}' for state, number in states.items())}")
    for trial in trials:
        if format_state(trial) == "running":
            place = study.elsewhere(trial)
            where = f" at {place}; if that process has ended, use --take_over {trial.number}" if place else ""
            print(f"trial {trial.number} is assigned to another process{where}")
    if best := study.best:
        value = f"{study.plan.monitor} {best.value:.5g}"
        print(f"Best:        trial {best.number}, {value}: {format_settings(best.params)}")
        if (study.folder / BEST).is_file() and not study.elsewhere(best):
            print(f"Train it:    lkd fit --config {shlex.quote(str(study.folder / BEST))}")
            print(f"Evaluate:    lkd test --ckpt_path {shlex.quote(str(checkpoint(study, best)))}")
        else:
            print(f"             its config and checkpoint are at {study.elsewhere(best)}")
    print(f"Table:       {study.folder / TABLE}")
    print(f"Report:      {study.folder / PAGE}")
    print(f"TensorBoard: tensorboard --host localhost --logdir {shlex.quote(str(study.folder))}")
