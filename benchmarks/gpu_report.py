"""The report of benchmarks/gpu.py: rows in a file, tables in Markdown, and a summary of the checks."""

from __future__ import annotations

import json
import re
import statistics
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

OUTCOMES = ("FAILED", "skipped", "ok")
"""Outcomes of a row, in the order of the tables."""
OUT_OF_TIME = "out of time"
"""Remark of rows skipped because the deadline had passed."""

Row = dict[str, Any]


class Report:
    """Collect results: print each at once, append it to a file, and rewrite the Markdown file.

    Args:
        out: The Markdown file; rows are appended to `<out>.rows.jsonl` beside it, and those of earlier runs are read
            from there. `None` only prints.
        failures: File to which tracebacks are appended. `None` prints them.
    """

    def __init__(self, out: Path | None, failures: Path | None) -> None:
        self.out, self.failures = out, failures
        self.rows: dict[tuple[str, str], Row] = {}
        self._lock = threading.Lock()
        self._side = out.with_name(f"{out.name}.rows.jsonl") if out else None
        if self._side and self._side.is_file():
            for line in self._side.read_text().splitlines():
                self._insert(json.loads(line))

    def _insert(self, row: Row) -> None:
        """Add a row; replace an earlier row with its name and the row that reported its whole job as skipped."""
        job, is_check, _ = row["name"].partition(": ")
        if is_check:
            self.rows.pop((row["part"], job), None)
        self.rows[row["part"], row["name"]] = row

    def add(self, part: str, name: str, outcome: str, remark: str = "", trace: str = "", **rest: Any) -> None:
        """Add a result.

        Args:
            part: Table of the result: `check`, `speed`, `full`, `machine` or `preparation`.
            name: Name of the result; an earlier result with this name is replaced.
            outcome: `ok`, `FAILED` or `skipped`.
            remark: One sentence.
            trace: The traceback of a failure.
            rest: Measurements.
        """
        row = {"part": part, "name": name, "outcome": outcome, "remark": remark, **rest}
        with self._lock:
            self._insert(row)
            print(f"{name}: {outcome}{f' ({remark})' if remark else ''}", flush=True)
            if self.out and self._side:
                with self._side.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                self.out.write_text("\n".join(self.lines()) + "\n")
            if trace and self.failures:
                with self.failures.open("a") as file:
                    file.write(f"===== {name}\n{trace}\n")
            elif trace:
                print(trace, file=sys.stderr, flush=True)

    def part(self, part: str) -> list[Row]:
        """Return all rows of one table."""
        return [row for (name, _), row in self.rows.items() if name == part]

    def lines(self) -> Iterator[str]:
        """Yield the lines of the Markdown file."""
        for part, table in (("check", check_table), ("speed", speed_table), ("full", full_table)):
            if rows := self.part(part):
                about = self.rows.get(("machine", part), {})
                yield from (f"## {part}", "", about.get("remark", ""), "", *table(rows, about), "")


def check_table(rows: Sequence[Row], about: Row) -> Iterator[str]:
    """Yield the table of checks, failures first, after the counts and the reasons for steps without a CUDA graph."""
    yield _counts(rows)
    yield f"\n{_steps(rows)}"
    yield "\n| check | result | remark |\n|---|---|---|"
    for row in sorted(rows, key=lambda row: OUTCOMES.index(row["outcome"])):
        yield f"| {row['name']} | {row['outcome']} | {row['remark'].replace('|', '/')} |"


def check_summary(rows: Sequence[Row], limit: int = 60, width: int = 160) -> list[str]:
    """Summarize the checks: failures, then what was skipped, by reason, then counts.

    Args:
        rows: The checks.
        limit: Maximum number of lines.
        width: Maximum length of a line.
    """
    failed = [f"FAILED: {row['name']}: {row['remark']}" for row in rows if row["outcome"] == "FAILED"]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["outcome"] == "skipped":
            reasons.setdefault(row["remark"], []).append(row["name"])
    skipped = [f"skipped ({reason}): {'; '.join(names)}" for reason, names in reasons.items()]
    lines = [line for text in (*failed, *skipped) for line in textwrap.wrap(text, width, subsequent_indent="    ")]
    if (more := len(lines) - (limit - 2)) > 0:
        lines[limit - 3 :] = [f"... {more + 1} more lines omitted; see --out FILE for all of them"]
    return [*lines, textwrap.shorten(_steps(rows), width), _counts(rows)]


def _counts(rows: Sequence[Row]) -> str:
    counts = Counter(row["outcome"] for row in rows)
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])


def _steps(rows: Sequence[Row]) -> str:
    """Count the runs that trained with a CUDA graph, and the reasons why others did not."""
    remarks = [row["remark"] for row in rows if row["name"].endswith(": trains") and row["outcome"] == "ok"]
    reasons = Counter(_reason(remark) for remark in remarks)
    return "Steps: " + "; ".join(f"{number} {reason}" for reason, number in reasons.most_common())


def _reason(optimizations: str) -> str:
    """Return `with a CUDA graph`, or the reason why a step has none."""
    found = re.search(r"no CUDA graph \((.*)\)", optimizations)
    has_graph = "CUDA graph" in optimizations and not found
    return "with a CUDA graph" if has_graph else f"without ({found[1] if found else 'not on this device'})"


def speed_table(rows: Sequence[Row], about: Row) -> Iterator[str]:
    """Yield the tables of the timed rows: speed, then start-up."""
    ratios = {row["name"]: statistics.median(row["ratios"]) for row in rows if row.get("ratios")}
    yield (
        "| | images/s | ms/step | ratio | range of the ratio | ratio to the bare loop | TFLOP/s | share of the peak "
        "| GPU memory, MB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        if row["outcome"] != "ok":
            yield f"| {row['name']} | {row['outcome']}: {row['remark']} |" + " |" * 7
            continue
        speed, peak = statistics.median(row["speeds"]), about.get("peak", float("inf"))
        ratio, spread, bare = "", "", ""
        if row["ratios"]:
            ratio = f"{ratios[row['name']]:.2f}"
            spread = f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
            bare = f"{ratios[row['name']] / ratios[row['bare']]:.2f}" if row["bare"] in ratios else ""
        flops = speed * row["flops"]
        cells = [row["name"], f"{speed:,.0f}", f"{1e3 * row['batch'] / speed:.2f}", ratio, spread, bare]
        cells += [f"{flops / 1e12:.2f}", f"{flops / peak:.2%}", f"{row['memory']:,.0f}"]
        yield f"| {' | '.join(cells)} |"
    yield "\n| | GPU busy | s to the first step | optimizations |\n|---|---|---|---|"
    for row in rows:
        if row["outcome"] == "ok":
            busy = "" if row["busy"] is None else f"{row['busy']:.0f} %"
            yield f"| {row['name']} | {busy} | {row['start_up']:.1f} | {row['remark']} |"


def full_table(rows: Sequence[Row], about: Row) -> Iterator[str]:
    """Yield the list of complete runs."""
    for row in rows:
        yield f"- `{row['name']}`: {row['outcome']}: {row['remark']}"
