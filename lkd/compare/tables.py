"""A comparison as tables, for terminal, Markdown and page alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from lkd.compare.comparison import Comparison
from lkd.compare.cost import Time
from lkd.compare.figures import BINS, Figures, Share

_WIDEST = 7
"""Columns that a terminal shows side by side."""


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        title: What it shows.
        head: Its columns' names.
        rows: Its cells.
        note: How to read it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str

    def markdown(self) -> Iterator[str]:
        """Its lines in Markdown."""
        yield f"## {self.title}"
        yield ""
        for row in (self.head, ["---"] * len(self.head), *self.rows):
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
        yield ""
        yield self.note
        yield ""

    def rich(self) -> Table:
        """It as the terminal shows it: on its side, if it has many columns."""
        rows = [self.head, *self.rows]
        if len(self.head) > _WIDEST:
            rows = list(zip(*rows, strict=True))
        table = Table(title=self.title, title_justify="left", caption=self.note, caption_justify="left")
        for number, name in enumerate(rows[0]):
            table.add_column(escape(name), justify="right" if number else "left", overflow="fold")
        for row in rows[1:]:
            table.add_row(*map(escape, row))
        return table


def tables(found: Comparison) -> list[Grid]:
    """All tables of a comparison, the most important one first.

    Args:
        found: The comparison.
    """
    return [_answers(found), _cost(found), *_differences(found), _classes(found)]


def _percent(share: Share | None) -> str:
    return "-" if share is None or math.isnan(share.value) else f"{100 * share.value:.2f}"


_OF_LABELS: dict[str, Callable[[Figures], str]] = {
    "top-1 %": lambda figures: _percent(figures.top1),
    "95 % interval": lambda figures: " - ".join(f"{100 * end:.2f}" for end in figures.top1.interval),
    "top-5 %": lambda figures: _percent(figures.top5),
    "NLL": lambda figures: f"{figures.nll:.4f}",
    "ECE %": lambda figures: f"{100 * figures.ece:.2f}",
    "T": lambda figures: f"{figures.temperature:.2f}",
    "NLL at T": lambda figures: f"{figures.scaled_nll:.4f}",
    "ECE % at T": lambda figures: f"{100 * figures.scaled_ece:.2f}",
}
_OF_TEACHER: dict[str, Callable[[Figures], str]] = {
    "agrees %": lambda figures: _percent(figures.agreement),
    "KL": lambda figures: "-" if figures.kl is None else f"{figures.kl:.4f}",
}


def _answers(found: Comparison) -> Grid:
    columns = _OF_LABELS | (_OF_TEACHER if found.teacher is not None else {})
    note = (
        f"NLL: negative log-likelihood, nats. ECE: expected calibration error, {BINS} bins. T: temperature that fits "
        "the labels best; 'at T': each fifth of the images with the temperature that fits the others. Interval: "
        "Wilson's."
    )
    if found.teacher is not None:
        note += f" Agrees, KL: with {found.teacher}, the teacher, at temperature 1; KL(teacher || network), nats."
    rows = [[name, *(column(figures) for column in columns.values())] for name, figures in found.figures.items()]
    return Grid("Answers", ["network", *columns], rows, note)


def _cost(found: Comparison) -> Grid:
    sizes = [time.batch_size for time in next(iter(found.costs.values())).times]
    head = ["network", "parameters", "MFLOP", "MB", *(f"ms, batch {size} (IQR)" for size in sizes)]
    head += [f"images/s, batch {size}" for size in sizes]
    rows = [
        [
            name,
            f"{cost.parameters:,}",
            "?" if cost.flops is None else f"{cost.flops / 1e6:,.2f}",
            f"{cost.bytes / 1e6:,.2f}",
            *(_milliseconds(time) for time in cost.times),
            *(f"{time.throughput:,.0f}" for time in cost.times),
        ]
        for name, cost in found.costs.items()
    ]
    note = (
        f"Forward passes, medians, taken in turn on {found.facts['device']}. MFLOP: for one image; a multiplication "
        "with its addition counts as two."
    )
    return Grid("Cost", head, rows, note)


def _milliseconds(time: Time) -> str:
    return f"{1e3 * time.median:,.2f} ({1e3 * time.iqr:,.2f})"


def _differences(found: Comparison) -> Iterator[Grid]:
    if not found.differences:
        return
    rows = []
    for one in found.differences:
        low, high = one.interval
        rows.append(
            [
                f"{one.first} - {one.second}",
                f"{100 * one.value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]",
                f"{one.only_first:,}",
                f"{one.only_second:,}",
                f"{one.p_value:.2g}",
                "yes" if one.p_value * len(found.differences) < 0.05 else "no",
            ]
        )
    head = ["pair", "points, [95 %]", "only 1st right", "only 2nd", "p", "real?"]
    note = (
        "Top-1 of the first minus the second's. Intervals: paired bootstrap, 10,000 samples. p: McNemar's exact test. "
        "Real: p times the number of pairs is below 0.05 (Bonferroni). Where few images differ, p tells, not the "
        "interval."
    )
    yield Grid("Is the difference real?", head, rows, note)


def _classes(found: Comparison) -> Grid:
    every = [figures.per_class for figures in found.figures.values()]
    rows = [
        [name, f"{shares[0].total:,}", *(_percent(share) for share in shares)]
        for name, *shares in zip(found.class_names, *every, strict=True)
    ]
    return Grid("Accuracy of each class, %", ["class", "images", *found.figures], rows, "Top-1 of the class's images.")
