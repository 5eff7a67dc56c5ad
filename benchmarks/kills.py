"""Verify that random kills of `python -m benchmarks.results` do not change any result.

    python -m benchmarks.kills FOLDER [--kills 20] [--seconds 3 9] [--seed 0]

Trains the plan `tiny` into one store without interruption, and into further ones with a command whose processes are all
killed (SIGKILL or SIGTERM) after random times and which is then restarted. It compares everything in the results except
durations, devices and revisions.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results.store import Store

_PLAN = "tiny"
_VARYING = ("seconds", "devices", "revision")


def _start(store: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.results", _PLAN, str(store)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)


def _results(store: Path) -> dict[str, dict[str, Any]]:
    records = Store(store).results()
    return {record["id"]: {key: record[key] for key in record if key not in _VARYING} for record in records}


def _fill(store: Path, kills: int, seconds: Sequence[float], numbers: random.Random) -> int:
    """Run the command until all cells are finished; return how often it was killed."""
    for number in range(kills):
        process = _start(store)
        after, sent = numbers.uniform(*seconds), numbers.choice((signal.SIGKILL, signal.SIGTERM))
        try:
            if process.wait(after) == 0:
                return number
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, sent)
            process.wait()
            print(f"{number + 1}: {sent.name} after {after:.1f} s, {len(_results(store))} cells finished", flush=True)
    if code := _start(store).wait():
        raise SystemExit(f"python -m benchmarks.results {_PLAN} {store} failed with exit code {code}")
    return kills


def main(args: Sequence[str] | None = None) -> None:
    """Fill the stores and compare their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder for the stores")
    parser.add_argument("--kills", type=int, default=20, help="number of kills")
    parser.add_argument("--seconds", type=float, nargs=2, default=(3.0, 9.0), help="range of times before a kill")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times and signals")
    given = parser.parse_args(args)
    if given.folder.exists():
        raise SystemExit(f"error: {given.folder} exists; choose a new folder")
    numbers, kills, number = random.Random(given.seed), 0, 0
    _fill(given.folder / "uninterrupted", 0, given.seconds, numbers)
    whole = _results(given.folder / "uninterrupted")
    while kills < given.kills:
        number += 1
        store = given.folder / f"killed-{number}"
        kills += _fill(store, given.kills - kills, given.seconds, numbers)
        killed = _results(store)
        differing = [name for name in whole if whole[name] != killed.get(name)]
        if differing or not whole:
            raise SystemExit(f"after {kills} kills, these cells differ: {', '.join(differing)}")
        print(f"after {kills} kills, the results of all {len(whole)} cells are equal", flush=True)


if __name__ == "__main__":
    main()
