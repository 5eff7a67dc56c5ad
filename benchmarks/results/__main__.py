"""Measure the accuracy of methods, one cell at a time.

    python -m benchmarks.results PLAN STORE [--data FOLDER] [--minutes N]
    python -m benchmarks.results PLAN STORE --table FOLDER
    python -m benchmarks.results PLAN STORE --tune METHOD [--trials 20] [--data FOLDER] [--minutes N]
    python -m benchmarks.results PLAN STORE --merge OTHER
    python -m benchmarks.results PLAN STORE --bundle FILE [--part-size 15M]

PLAN is a YAML file, or the name of one in benchmarks/results/plans. A cell is one `lkd fit`, followed by `lkd test` of
its best and its last checkpoint. STORE is a folder with one JSON file per finished cell. The command trains the missing
cells in this order: teachers, students alone, then methods, seed by seed. It may be killed at any time: the same
command continues, and the results are the same as without interruption. Several commands may share a store on one
machine.

FOLDER contains the images in train/<class>/ and test/<class>/, or the original files of the data set. OTHER is another
store or the name of a bundle. A bundle contains results, unfinished cells and teachers for another machine.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import bundle
from benchmarks.results.plan import cells, read_plan, rows
from benchmarks.results.store import Store
from benchmarks.results.tune import tune
from benchmarks.results.work import Clock, work


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number greater than 0, got {text}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer greater than 0, got {text}")
    return int(text)


def _size(text: str) -> int:
    try:
        return bundle.size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parsed(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan")
    parser.add_argument("store", type=Path)
    parser.add_argument("--data", type=Path, help="folder of the images")
    parser.add_argument("--minutes", type=_positive, help="time limit in minutes; an unfinished cell is saved in time")
    parser.add_argument("--trials", type=_count, default=20, help="number of trials of --tune")
    parser.add_argument("--part-size", type=_size, default="15M", help="largest file of a bundle")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--table", type=Path, help="write table.md, table.json and table.svg to a folder")
    action.add_argument("--tune", metavar="METHOD", help="tune settings on the validation images with the first seed")
    action.add_argument("--merge", type=Path, metavar="OTHER", help="import the cells of another store or a bundle")
    action.add_argument("--bundle", type=Path, metavar="FILE", help="pack what another machine needs to continue")
    return parser.parse_args(args)


def run(options: argparse.Namespace) -> int:
    """Execute the selected action; return the exit code."""
    from benchmarks.results import table  # requires an extra, whose absence is reported before the training

    if not options.store.is_dir() and (options.table or options.tune or options.bundle):
        raise ValueError(f"{options.store} is not a store; check the path, or train cells first")
    clock, plan, store = Clock(options.minutes), read_plan(options.plan), Store(options.store)
    data = options.data and options.data.resolve()
    planned = rows(plan, store.tuned())
    if options.merge:
        with bundle.opened(options.merge) as other:
            for line in store.merge(other):
                print(line, flush=True)
    elif options.bundle:
        print(*bundle.pack(store, options.bundle, options.part_size), sep="\n")
    elif options.table:
        table.write(planned, store, options.table)
    elif options.tune:
        return tune(plan, planned, options.tune, options.trials, store, data, clock)
    else:
        code = work(cells(planned), store, data, clock)
        table.write(planned, store, store.folder)
        return code
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""

    def stop(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return run(parsed(args))
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: pip install -e '.[compare]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
