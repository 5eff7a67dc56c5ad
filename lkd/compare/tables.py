"""Tables of a comparison for the terminal, Markdown and the HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple, TypeAlias

from lkd.compare.cost import Cost, Time
from lkd.compare.grid import Grid
from lkd.compare.groups import Group
from lkd.compare.measurements import Measurements
from lkd.compare.metrics import BINS, ClassificationMetrics, Difference, Share

ClassificationMeasurements: TypeAlias = Measurements[ClassificationMetrics, Difference]
"""Comparison of classifiers."""


class _Measure(NamedTuple):
    key: str
    scale: float
    form: str

    def text(self, value: float | None) -> str:
        return "-" if value is None or math.isnan(value) else format(self.scale * value, self.form)


_TOP1 = _Measure("top1", 100, ".2f")
_MEASURES = {
    "top-5 %": _Measure("top5", 100, ".2f"),
    "agreement %": _Measure("agreement", 100, ".2f"),
    "KL": _Measure("kl", 1, ".4f"),
    "NLL": _Measure("nll", 1, ".4f"),
    "ECE %": _Measure("ece", 100, ".2f"),
    "T": _Measure("temperature", 1, ".2f"),
    "NLL at T": _Measure("scaled_nll", 1, ".4f"),
    "ECE % at T": _Measure("scaled_ece", 100, ".2f"),
}
_OF_TEACHER = ("agreement", "kl")
_FEW_PAIRS = 6
"""Number of pairs of networks up to which the terminal shows all of them."""


def tables(comparison: ClassificationMeasurements, members: bool = False) -> list[Grid]:
    """Create all tables of a comparison, the most important one first.

    Args:
        comparison: The comparison.
        members: Whether to show the individual networks of groups in the terminal as well.
    """
    return [
        *_accuracies(comparison, members),
        cost_table(comparison),
        *method_table(comparison),
        *_networks(comparison, members),
        _classes(comparison),
    ]


def entries_of(comparison: Measurements[Any, Any]) -> list[str | Group]:
    """Return the rows of a table: groups, at the position of their first network, and networks without a group.

    Args:
        comparison: The comparison.
    """
    of_member = {member: group for group in comparison.groups for member in group.members}
    entries: list[str | Group] = []
    for name in comparison.metrics:
        entry = of_member.get(name, name)
        if entry not in entries:
            entries.append(entry)
    return entries


def members_of(group: str | Group) -> Sequence[str]:
    """Return the names of the networks of a row.

    Args:
        group: A group, or the name of a network.
    """
    return [group] if isinstance(group, str) else group.members


def name_of(entry: str | Group) -> str:
    """Return the name of a row.

    Args:
        entry: A group, or the name of a network.
    """
    return entry if isinstance(entry, str) else entry.name


def _percent(share: Share) -> str:
    return _TOP1.text(share.value)


def range_of(interval: tuple[float, float]) -> str:
    """Format an interval in percent: `81.20 to 84.50`.

    Args:
        interval: Ends in [0, 1].
    """
    return " to ".join(_TOP1.text(end) for end in interval)


def _accuracies(comparison: ClassificationMeasurements, members: bool) -> Iterator[Grid]:
    title, note = "Accuracy and calibration", _how_measured(comparison)
    columns = {name: one for name, one in _MEASURES.items() if comparison.teacher or one.key not in _OF_TEACHER}
    head = ["network", "top-1 %", "95 % interval", *columns]

    def network(name: str) -> list[str]:
        metrics, values = comparison.metrics[name], comparison.metrics[name].measures()
        own = [one.text(values.get(one.key)) for one in columns.values()]
        return [name, _percent(metrics.top1), range_of(metrics.top1.interval), *own]

    def row(entry: str | Group) -> list[str]:
        if isinstance(entry, str):
            name, top1, *own = network(entry)
            return [name, "1", top1, "-", *own]
        means = {key: one.mean for key, one in entry.measures.items()}
        top1s, own = entry.measures["top1"], [one.text(means.get(one.key)) for one in columns.values()]
        spread = _TOP1.text(top1s.mean), _TOP1.text(top1s.std), range_of(top1s.interval)
        return [entry.name, str(len(entry.members)), *spread, *own]

    if not comparison.groups:
        yield Grid(title, head, list(map(network, comparison.metrics)), note)
        return
    seeds = (
        "n: number of networks that differ only in their seed. Their row shows means over the seeds, the standard "
        "deviation of top-1 (with n - 1), and the 95 % confidence interval of the mean top-1 (Student's t). For n = 1, "
        "the interval is the Wilson score interval over the images. "
    )
    head_n = ["network, method", "n", "top-1 %", "s.d.", "95 % interval", *columns]
    yield Grid(title, head_n, list(map(row, entries_of(comparison))), seeds + note)
    single = [network(name) for group in comparison.groups for name in group.members]
    yield Grid("Individual networks of each method", head, single, note, "terminal" if members else "folded")


def _how_measured(comparison: ClassificationMeasurements) -> str:
    note = "" if comparison.groups else "Interval: Wilson score interval over the images. "
    note += (
        f"NLL: negative log-likelihood in nats. ECE: expected calibration error with {BINS} bins. T: temperature that "
        "minimizes the NLL; 'at T': after temperature scaling, with the temperature of each fifth of the images fitted "
        "to the others."
    )
    if comparison.teacher is not None:
        note += (
            f" Agreement: same prediction as the teacher ({comparison.teacher}). KL: KL(teacher || network) in nats."
        )
    return note


def cost_table(comparison: Measurements[Any, Any]) -> Grid:
    """Return the table of parameters, operations, size and times.

    Args:
        comparison: The comparison.
    """
    sizes = [time.batch_size for time in next(iter(comparison.costs.values())).times]
    head = ["network", "parameters", "MFLOP", "MB", *(f"ms, batch {size} (IQR)" for size in sizes)]
    head += [f"images/s, batch {size}" for size in sizes]
    rows = []
    for entry in entries_of(comparison):
        cost = _mean_cost([comparison.costs[name] for name in members_of(entry)])
        rows.append(
            [
                name_of(entry),
                f"{cost.parameters:,}",
                "?" if cost.flops is None else f"{cost.flops / 1e6:,.2f}",
                f"{cost.bytes / 1e6:,.2f}",
                *(f"{1e3 * time.median:,.2f} ({1e3 * time.iqr:,.2f})" for time in cost.times),
                *(f"{time.throughput:,.0f}" for time in cost.times),
            ]
        )
    note = (
        f"Median time of a forward pass, with networks timed in alternation, on {comparison.facts['device']}. MFLOP: "
        "for one image; a multiply-add counts as two."
    )
    if comparison.groups:
        note += " Times of networks that differ only in their seed are averaged."
    return Grid("Cost", head, rows, note)


def _mean_cost(costs: Sequence[Cost]) -> Cost:
    """Average the times of networks with the same architecture."""
    times = [
        Time(own[0].batch_size, fmean(time.median for time in own), fmean(time.iqr for time in own))
        for own in zip(*(cost.times for cost in costs), strict=True)
    ]
    return replace(costs[0], times=times)


def method_table(comparison: Measurements[Any, Any]) -> Iterator[Grid]:
    """Yield the table of differences between groups, if there are any.

    Args:
        comparison: The comparison.
    """
    if not comparison.method_differences:
        return
    rows = [
        [
            f"{one.first} - {one.second}",
            *(signed(one.value), bracket(one.interval)),
            "-" if math.isnan(one.t) else f"{one.t:.2f} ({one.degrees:.1f})",
            *(
                "-" if math.isnan(one.p_value) else f"{one.p_value:.2g}",
                verdict(one.p_value, len(comparison.method_differences)),
            ),
        ]
        for one in comparison.method_differences
    ]
    note = (
        f"Welch's t-test compares the means of the {comparison.title} of two methods over their seeds. Gap: first "
        "minus second, in percentage points (pp). The test accounts for the variation between training runs, on these "
        "images. Significant: p times the number of pairs is below 0.05 (Bonferroni). With few seeds, only large "
        "differences are detected."
    )
    head = ["methods", "gap, pp", "95 % interval", "t (d.f.)", "p", "significant"]
    yield Grid("Differences between methods", head, rows, note)


def signed(value: float) -> str:
    """Format a difference in percentage points.

    Args:
        value: Difference in [-1, 1].
    """
    return f"{100 * value:+.2f}"


def bracket(interval: tuple[float, float]) -> str:
    """Format the interval of a difference in percentage points.

    Args:
        interval: Ends in [-1, 1].
    """
    return f"[{', '.join(map(signed, interval))}]"


def verdict(p_value: float, pairs: int) -> str:
    """Return whether a difference is significant after Bonferroni's correction.

    Args:
        p_value: The p-value.
        pairs: Number of compared pairs.
    """
    return "-" if math.isnan(p_value) else "yes" if p_value * pairs < 0.05 else "no"


def _reference(comparison: ClassificationMeasurements, names: Sequence[str]) -> str:
    """Return the network with which the others are compared: the teacher, otherwise the most accurate one."""
    return comparison.teacher or max(names, key=lambda name: comparison.metrics[name].top1.value)


def _networks(comparison: ClassificationMeasurements, members: bool) -> Iterator[Grid]:
    """Yield the tables of McNemar's test: all pairs if they are few, or else pairs with a reference, and all folded."""
    alone = [
        name for entry in entries_of(comparison) for name in members_of(entry) if members or isinstance(entry, str)
    ]
    reference = _reference(comparison, alone or list(comparison.metrics))
    pairs = {frozenset((one.first, one.second)): one for one in comparison.differences}
    shown = [_turned(pairs[frozenset((name, reference))], name) for name in alone if name != reference]
    note = (
        "McNemar's exact test compares two trained networks on these images, not two methods: two seeds of one method "
        "may differ as well. To compare methods, train each with several seeds (lkd fit --seeds 5). Gap: top-1 of the "
        "first network minus that of the second, in percentage points (pp); interval: paired bootstrap, 10,000 "
        "samples. Only 1st, only 2nd: images that only this network classifies correctly. Significant: p times the "
        f"number of all pairs, {len(pairs)}, is below 0.05 (Bonferroni). If few images differ, rely on p rather than "
        "on the interval."
    )
    head = ["gap, pp", "95 % interval", "only 1st", "only 2nd", "p", "significant"]
    every = [_turned(one, one.second) if one.first == reference else one for one in comparison.differences]
    all_rows = [[f"{one.first} - {one.second}", *_pair(one, len(pairs))] for one in every]
    if every and len(every) <= _FEW_PAIRS and len(alone) == len(comparison.metrics):
        yield Grid("Differences of trained networks", ["networks", *head], all_rows, note)
        return
    if shown:
        rows = [[one.first, *_pair(one, len(pairs))] for one in shown]
        yield Grid(f"Differences of trained networks (1st) from {reference} (2nd)", ["network", *head], rows, note)
    if len(pairs) > len(shown):
        yield Grid(f"All {len(pairs)} pairs of trained networks", ["networks", *head], all_rows, note, "folded")


def _turned(one: Difference, first: str) -> Difference:
    """Return the difference with the given network as the first one."""
    if one.first == first:
        return one
    low, high = one.interval
    return Difference(
        one.second, one.first, one.only_second, one.only_first, one.total, (0.0 - high, 0.0 - low), one.p_value
    )


def _pair(one: Difference, pairs: int) -> list[str]:
    counts = f"{one.only_first:,}", f"{one.only_second:,}"
    return [signed(one.value), bracket(one.interval), *counts, f"{one.p_value:.2g}", verdict(one.p_value, pairs)]


def _classes(comparison: ClassificationMeasurements) -> Grid:
    entries = entries_of(comparison)
    every = [[comparison.metrics[name].per_class for name in members_of(entry)] for entry in entries]
    rows = []
    for number, name in enumerate(comparison.class_names):
        shares = [[per_class[number] for per_class in own] for own in every]
        rows.append([name, f"{shares[0][0].total:,}", *(_percent(_pooled(own)) for own in shares)])
    note = "Top-1 accuracy for the images of each class."
    if comparison.groups:
        note += " Accuracies of networks that differ only in their seed are averaged."
    return Grid("Accuracy per class, %", ["class", "images", *map(name_of, entries)], rows, note, "page")


def _pooled(shares: Sequence[Share]) -> Share:
    return Share(sum(share.count for share in shares), sum(share.total for share in shares))
