"""Feed corrupt and malicious files to lkd's readers and count the outcomes.

    python -m tests.fuzz [--inputs 10000] [--reader weights ...] [--seed 0] [--only INDEX] [--processes 2] [--out FILE]

Allowed outcomes are success and the documented one-sentence errors. Anything else is a finding: another exception, a
crash, more than a minute or 6 GiB of memory, executed code. An input is a function of the reader, the seed and its
index: `--reader weights --only 123` reproduces one. Linux only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import PIL
import safetensors

from benchmarks.speed import machine
from tests.fuzz.runner import READERS, Result, fuzz

HEAD = (
    "# Corrupt and malicious files",
    "",
    "`python -m tests.fuzz --out benchmarks/fuzz.md` feeds corrupt and malicious files to lkd's readers and generates",
    "this table, with the latest run of each reader. A file is accepted, or rejected with one of the documented",
    "one-sentence errors. Anything else is a finding: another exception, a crash, executed code, or more than a",
    "minute or 6 GiB of memory.",
    "",
)
COLUMNS = ["reader", "inputs", "seed", "accepted", "rejected", "findings", "seconds", "slowest", "memory"]


def row(name: str, result: Result, seed: int) -> str:
    """Format the results of one reader as a Markdown row."""
    accepted = {kind: number for kind, number in result.kinds.most_common() if kind.startswith("accepted")}
    rejected = {kind: number for kind, number in result.kinds.most_common() if kind not in (*accepted, "finding")}
    cells = [
        name,
        f"{result.kinds.total():,}",
        f"{seed}",
        "; ".join(f"{number:,}{kind.removeprefix('accepted')}" for kind, number in accepted.items()) or "0",
        "; ".join(f"{number:,} {kind}" for kind, number in rejected.items()) or "0",
        f"{len(result.findings)}",
        f"{result.seconds:.0f}",
        f"{result.slowest[0]:.2f} s (input {result.slowest[1]})",
        f"{result.largest[0] / 2**20:,.0f} MiB (input {result.largest[1]})",
    ]
    return f"| {' | '.join(cells)} |"


def page(rows: dict[str, str]) -> str:
    """Format all results in Markdown."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *(rows[name] for name in READERS if name in rows),
    ]
    about = f"Pillow {PIL.__version__}, safetensors {safetensors.__version__}; {machine()}"
    return "\n".join([*HEAD, *lines, "", about, ""])


def rows_of(file: Path | None) -> dict[str, str]:
    """Read the existing rows of a file."""
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
