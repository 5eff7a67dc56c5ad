"""Give hostile files to lkd's readers, and count what comes of it.

    python -m tests.fuzz [--inputs 10000] [--reader weights ...] [--seed 0] [--only INDEX] [--out FILE]

Allowed are success, and the documented errors, in one sentence. Anything else is a finding: another exception, a
crash, more than 10 seconds or 6 GiB, code that runs. An input is a function of the reader, the seed and its index:
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

HEAD = "Hostile files, and what lkd's readers make of them."


def table(results: dict[str, Result], seed: int) -> str:
    """The results as Markdown."""
    lines = [
        "| reader | inputs | accepted | refused | findings | seconds | slowest | most memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        fine = {kind: number for kind, number in result.kinds.most_common() if kind.startswith("accepted")}
        rest = {kind: number for kind, number in result.kinds.most_common() if kind not in (*fine, "finding")}
        cells = [
            name,
            f"{result.kinds.total():,}",
            ", ".join(f"{number:,}{kind.removeprefix('accepted').replace(',', '')}" for kind, number in fine.items())
            or "0",
            ", ".join(f"{number:,} {kind}" for kind, number in rest.items()) or "0",
            f"{len(result.findings)}",
            f"{result.seconds:.0f}",
            f"{result.slowest[0]:.2f} s (input {result.slowest[1]})",
            f"{result.largest[0] / 2**20:,.0f} MiB (input {result.largest[1]})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    about = f"seed {seed}; Pillow {PIL.__version__}, safetensors {safetensors.__version__}; {machine()}"
    return "\n".join([*lines, "", about, ""])


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--reader", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--out", type=Path)
    own = parser.parse_args()
    indices = range(own.inputs) if own.only is None else range(own.only, own.only + 1)
    results = fuzz(own.reader, indices, own.seed)
    text = table(results, own.seed)
    print(text)
    findings = [finding for result in results.values() for finding in result.findings]
    print("\n".join(findings[:40]))
    if own.out is not None:
        command = f"python -m tests.fuzz --inputs {own.inputs} --seed {own.seed} --out {own.out}"
        own.out.write_text(f"{HEAD}\n\nMade by `{command}`.\n\n{text}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
