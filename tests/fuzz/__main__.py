"""Give hostile files to lkd's readers, and count what comes of it.

    python -m tests.fuzz [--inputs 10000] [--reader weights ...] [--seed 0] [--only INDEX] [--processes 2] [--out FILE]

Allowed are success, and the documented errors, in one sentence. Anything else is a finding: another exception, a
crash, a minute or 6 GiB of memory, code that runs. An input is a function of the reader, the seed and its index:
`--reader weights --only 123` reads one again. Linux only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import PIL
import safetensors

from benchmarks.speed import machine
from tests.fuzz.runner import READERS, Result, fuzz

COLUMNS = ["reader", "inputs", "seed", "accepted", "refused", "findings", "seconds", "slowest", "memory"]


def row(name: str, result: Result, seed: int) -> str:
    """One reader's results as a line of Markdown."""
    accepted = {kind: number for kind, number in result.kinds.most_common() if kind.startswith("accepted")}
    refused = {kind: number for kind, number in result.kinds.most_common() if kind not in (*accepted, "finding")}
    cells = [
        name,
        f"{result.kinds.total():,}",
        f"{seed}",
        "; ".join(f"{number:,}{kind.removeprefix('accepted')}" for kind, number in accepted.items()) or "0",
        "; ".join(f"{number:,} {kind}" for kind, number in refused.items()) or "0",
        f"{len(result.findings)}",
        f"{result.seconds:.0f}",
        f"{result.slowest[0]:.2f} s (input {result.slowest[1]})",
        f"{result.largest[0] / 2**20:,.0f} MiB (input {result.largest[1]})",
    ]
    return f"| {' | '.join(cells)} |"


def page(rows: dict[str, str]) -> str:
    """All results as Markdown."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *(rows[name] for name in READERS if name in rows),
    ]
    about = f"Pillow {PIL.__version__}, safetensors {safetensors.__version__}; {machine()}"
    made = "Made by `python -m tests.fuzz --out benchmarks/fuzz.md`; each reader's row is of its latest run."
    return "\n".join(["Hostile files, and what lkd's readers make of them.", "", made, "", *lines, "", about, ""])


def rows_of(file: Path | None) -> dict[str, str]:
    """The rows that a file has already."""
    lines = file.read_text().splitlines() if file is not None and file.is_file() else []
    return {name: line for line in lines for name in READERS if line.startswith(f"| {name} |")}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--reader", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    own = parser.parse_args()
    indices = range(own.inputs) if own.only is None else range(own.only, own.only + 1)
    rows, findings = rows_of(own.out), 0
    for name, result in fuzz(own.reader, indices, own.seed, own.processes):
        rows[name] = row(name, result, own.seed)
        findings += len(result.findings)
        print("\n".join([rows[name], *result.findings[:40]]), flush=True)
        if own.out is not None:
            own.out.write_text(page(rows))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
