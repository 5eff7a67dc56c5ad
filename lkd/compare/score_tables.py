"""Tables of a comparison based on the counts of a task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean
from typing import TypeAlias

from lkd.compare.grid import Grid
from lkd.compare.groups import Group
from lkd.compare.measurements import Measurements
from lkd.compare.scores import ScoreDifference, ScoreMetrics
from lkd.compare.tables import (
    bracket,
    cost_table,
    entries_of,
    members_of,
    method_table,
    name_of,
    range_of,
    signed,
    verdict,
)

ScoreMeasurements: TypeAlias = Measurements[ScoreMetrics, ScoreDifference]
"""Comparison based on counts."""
_MOST = 30
"""Maximum number of classes in the table for the terminal."""


def score_tables(comparison: ScoreMeasurements, members: bool = False) -> list[Grid]:
    """Create all tables of a comparison, most important first.

    Args:
        comparison: The comparison.
        members: Whether to show the individual networks of groups in the terminal as well.
    """
    return [
        *_scores(comparison, members),
        cost_table(comparison),
        *method_table(comparison),
        *_pairs(comparison, members),
        _classes(comparison),
    ]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def _scores(comparison: ScoreMeasurements, members: bool) -> Iterator[Grid]:
    title = comparison.title[0].upper() + comparison.title[1:]
    first = next(iter(comparison.metrics.values()))
    relative = next((list(one.to_teacher) for one in comparison.metrics.values() if one.to_teacher), [])
    main, *others = [*first.scores, *(f"{title} to teacher" for title in relative)]
    columns = [f"{other} %" for other in others]
    note = "Interval: bootstrap over the images, 10,000 samples."
    teacher = (
        f" To teacher: agreement, with the predictions of {comparison.teacher} as labels." if comparison.teacher else ""
    )

    def network(name: str) -> list[str]:
        one, values = comparison.metrics[name].main, comparison.metrics[name].measures()
        own = [_percent(values.get(other, math.nan)) for other in others]
        return [name, _percent(one.value), range_of(one.interval), *own]

    def row(entry: str | Group) -> list[str]:
        if isinstance(entry, str):
            name, value, *own = network(entry)
            return [name, "1", value, "-", *own]
        spread = entry.measures[main]
        own = [_percent(entry.measures[other].mean) if other in entry.measures else "-" for other in others]
        count = str(len(entry.members))
        return [entry.name, count, _percent(spread.mean), _percent(spread.std), range_of(spread.interval), *own]

    head = ["network", f"{main} %", "95 % interval", *columns]
    if not comparison.groups:
        yield Grid(title, head, list(map(network, comparison.metrics)), note + teacher)
        return
    seeds = (
        "n: number of networks that differ only in their seed. Their row shows means over the seeds, the standard "
        f"deviation of the {main} (with n - 1), and the 95 % confidence interval of its mean (Student's t). For n = 1, "
        "the interval is that of a bootstrap over the images, 10,000 samples."
    )
    head_n = ["network, method", "n", f"{main} %", "s.d.", "95 % interval", *columns]
    yield Grid(title, head_n, list(map(row, entries_of(comparison))), seeds + teacher)
    single = [network(name) for group in comparison.groups for name in group.members]
    yield Grid("Individual networks of each method", head, single, note + teacher, "terminal" if members else "folded")


def _pairs(comparison: ScoreMeasurements, members: bool) -> Iterator[Grid]:
    alone = {
        name for entry in entries_of(comparison) for name in members_of(entry) if members or isinstance(entry, str)
    }
    every = [_turned(one) if one.first == comparison.teacher else one for one in comparison.differences]
    shown = [one for one in every if {one.first, one.second} <= alone]
    note = (
        f"Difference in {comparison.title} of two trained networks (not methods) on the same images, in percentage "
        "points (pp): interval and p-value from 10,000 paired bootstrap samples of the images. Significant: p times "
        f"the number of all pairs, {len(every)}, is below 0.05 (Bonferroni)."
    )
    head = ["networks", "gap, pp", "95 % interval", "p", "significant"]
    if shown:
        rows = [_pair(one, len(every)) for one in shown]
        yield Grid("Differences of trained networks", head, rows, note)
    if len(every) > len(shown):
        rows = [_pair(one, len(every)) for one in every]
        yield Grid(f"All {len(rows)} pairs of trained networks", head, rows, note, "folded")


def _turned(one: ScoreDifference) -> ScoreDifference:
    """Return the difference with the order of the networks reversed."""
    low, high = one.interval
    return ScoreDifference(one.second, one.first, 0.0 - one.value, (0.0 - high, 0.0 - low), one.p_value)


def _pair(one: ScoreDifference, pairs: int) -> list[str]:
    gap = signed(one.value), bracket(one.interval)
    return [f"{one.first} - {one.second}", *gap, f"{one.p_value:.2g}", verdict(one.p_value, pairs)]


def _classes(comparison: ScoreMeasurements) -> Grid:
    entries = entries_of(comparison)
    every = [[comparison.metrics[name].per_class for name in members_of(entry)] for entry in entries]
    rows = []
    for number, name in enumerate(comparison.class_names):
        means = [fmean(per_class[number].value for per_class in own) for own in every]
        rows.append([name, *map(_percent, means)])
    note = "On all images; the report plots 95 % intervals."
    if comparison.groups:
        note += " Values of networks that differ only in their seed are averaged."
    title, head = f"{comparison.class_title} per class, %", ["class", *map(name_of, entries)]
    return Grid(title, head, rows, note, "terminal" if len(rows) <= _MOST else "page")
