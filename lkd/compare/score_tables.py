"""Tables of a comparison based on the counts of a task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

from lkd.compare.grid import Grid
from lkd.compare.measurements import Measurements
from lkd.compare.scores import ScoreDifference, ScoreFigures
from lkd.compare.tables import bracket, cost_table, method_table, range_of, signed, verdict

Found: TypeAlias = Measurements[ScoreFigures, ScoreDifference]
"""Comparison based on counts."""
_MOST = 30
"""Maximum number of classes in the table for the terminal."""


def score_tables(found: Found) -> list[Grid]:
    """Create all tables of a comparison, most important first.

    Args:
        found: The comparison.
    """
    return [_scores(found), *_groups(found), cost_table(found), *method_table(found), *_pairs(found), _classes(found)]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def _scores(found: Found) -> Grid:
    first = next(iter(found.figures.values()))
    main, *others = first.scores
    relative = next((list(one.to_teacher) for one in found.figures.values() if one.to_teacher), [])
    head = ["network", f"{main} %", "95 % interval", *(f"{title} %" for title in others)]
    head += [f"{title} to teacher %" for title in relative]
    rows = [
        [
            name,
            *(_percent(one.main.value), range_of(one.main.interval)),
            *(_percent(one.scores[title].value) for title in others),
            *(_percent(one.to_teacher.get(title, math.nan)) for title in relative),
        ]
        for name, one in found.figures.items()
    ]
    note = "Interval: bootstrap over the images, 10,000 samples."
    if found.teacher is not None:
        note += f" To teacher: agreement, with the predictions of {found.teacher} as labels."
    return Grid(found.title[0].upper() + found.title[1:], head, rows, note)


def _groups(found: Found) -> Iterator[Grid]:
    if not found.groups:
        return
    rows = []
    for group in found.groups:
        main = next(iter(group.measures.values()))
        rows.append(
            [group.name, str(len(main.values)), _percent(main.mean), _percent(main.std), range_of(main.interval)]
        )
    note = (
        "n: number of networks that differ only in their seed. Mean, standard deviation (with n - 1) and 95 % "
        "confidence interval of the mean (Student's t) over the seeds."
    )
    yield Grid("Methods", ["method", "n", f"{found.title} %", "s.d.", "95 % interval"], rows, note)


def _pairs(found: Found) -> Iterator[Grid]:
    if not found.differences:
        return
    rows = [
        [
            f"{one.first} - {one.second}",
            *(signed(one.value), bracket(one.interval), f"{one.p_value:.2g}"),
            verdict(one.p_value, len(found.differences)),
        ]
        for one in found.differences
    ]
    note = (
        f"Difference in {found.title} of two trained networks (not methods) on the same images, in percentage points "
        "(pp): interval and p-value from 10,000 paired bootstrap samples of the images. Significant: p times the "
        "number of pairs is below 0.05 (Bonferroni)."
    )
    yield Grid(
        "Differences of trained networks", ["networks", "gap, pp", "95 % interval", "p", "significant"], rows, note
    )


def _classes(found: Found) -> Grid:
    every = [one.per_class for one in found.figures.values()]
    rows = [[name, *(_percent(one.value) for one in own)] for name, *own in zip(found.class_names, *every, strict=True)]
    note = "On all images; the report plots 95 % intervals."
    title, head = f"{found.class_title} per class, %", ["class", *found.figures]
    return Grid(title, head, rows, note, "terminal" if len(rows) <= _MOST else "page")
