"""Plots of a comparison, with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from lkd.compare.comparison import Comparison, ScoreComparison
from lkd.compare.measurements import Measurements
from lkd.compare.metrics import Bin, confusion
from lkd.types import IGNORE_INDEX

_MOST = 30
"""Maximum number of classes that a plot shows individually."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")  # Okabe, Ito


class Plot(NamedTuple):
    """Figure with a title and a caption."""

    title: str
    note: str
    figure: Figure


def plots(comparison: Comparison | ScoreComparison) -> Iterator[Plot]:
    """Yield the plots of a comparison.

    Args:
        comparison: The comparison.
    """
    with rc_context({"text.parse_math": False}):  # names may contain $
        yield from _drawn(comparison)


def _drawn(comparison: Comparison | ScoreComparison) -> Iterator[Plot]:
    of_logits = isinstance(comparison, Comparison)
    note = f"Higher and further left is better. Bars: 95 % intervals of the {comparison.title}."
    yield Plot("Accuracy against cost" if of_logits else "Quality against cost", note, _against_cost(comparison))
    if isinstance(comparison, Comparison):
        note = (
            "Accuracy of the predictions by their confidence. On the diagonal, the network is calibrated; below it, it "
            "is overconfident. Dashed: after temperature scaling. Gray: proportion of the predictions."
        )
        yield Plot("Reliability", note, _reliability(comparison))
    yield Plot(
        "Accuracy per class" if of_logits else f"{comparison.class_title} per class",
        _class_note(comparison),
        _classes(comparison),
    )
    is_small = len(comparison.class_names) <= _MOST and len(comparison.metrics) > 1
    if isinstance(comparison, Comparison) and comparison.teacher is not None and is_small:
        note = (
            "Proportion of the images of a class (row) that are predicted as a class (column), minus the same "
            f"proportion for {comparison.teacher}, in percentage points. Red: more often; blue: less often. Blue on "
            "the diagonal is a loss of accuracy."
        )
        yield Plot("Confusion matrix relative to the teacher", note, _confusions(comparison))


def style(number: int) -> tuple[str, str]:
    """Return the color and marker of a network; the pairs of 64 networks are distinct.

    Args:
        number: Index of the network.
    """
    rounds, place = divmod(number, len(_COLORS))
    return _COLORS[place], _MARKERS[(place + rounds) % len(_MARKERS)]


def _panels(count: int, width: float, height: float, most: int) -> tuple[Figure, list[Axes]]:
    """Create a figure with `count` panels, at most `most` in a row."""
    rows = math.ceil(count / most)
    columns = math.ceil(count / rows)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for spare in axes[count:]:
        spare.set_axis_off()
    return figure, axes[:count]


def _against_cost(comparison: Measurements[Any, Any]) -> Figure:
    size = next(iter(comparison.costs.values())).times[0].batch_size
    measures: dict[str, Callable[[Any], float | None]] = {
        "parameters": lambda cost: cost.parameters,
        "MFLOP for one image": lambda cost: cost.flops and cost.flops / 1e6,
        f"ms for a batch of {size}": lambda cost: 1e3 * cost.times[0].median,
    }
    figure, axes = _panels(len(measures), 4.2, 3.6, 3)
    for axis, (label, measure) in zip(axes, measures.items(), strict=True):
        for number, (name, metrics) in enumerate(comparison.metrics.items()):
            cost, share = measure(comparison.costs[name]), metrics.main
            if cost is None:
                continue
            low, high = share.interval
            gap = [[100 * (share.value - low)], [100 * (high - share.value)]]
            color, marker = style(number)
            axis.errorbar([cost], [100 * share.value], yerr=gap, fmt=marker, color=color, capsize=3, label=name)
        axis.set_xscale("log")
        axis.tick_params(axis="x", labelsize=8)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(EngFormatter(sep="") if label == "parameters" else "{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{comparison.title}, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    return figure


def _reliability(comparison: Comparison) -> Figure:
    figure, axes = _panels(len(comparison.metrics), 3.0, 3.0, 4)
    for number, (axis, (name, metrics)) in enumerate(zip(axes, comparison.metrics.items(), strict=True)):
        bins, scaled = metrics.reliability, metrics.scaled_reliability
        color, marker = style(number)
        edges = np.arange(len(bins)) / len(bins)
        axis.bar(edges, [one.share for one in bins], width=1 / len(bins), align="edge", color="#CCCCCC")
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
        lines: tuple[tuple[list[Bin], str, dict[str, Any]], ...] = (
            (bins, f"{marker}-", {"markersize": 3}),
            (scaled, f"{marker}--", {"markersize": 2, "alpha": 0.7, "linewidth": 0.8}),
        )
        for points, line, size in lines:
            shown = [(one.confidence, one.accuracy) for one in points if one.share]
            axis.plot(*zip(*shown, strict=True), line, color=color, **size)
        axis.set_title(f"{name}\nECE {100 * metrics.ece:.1f} %, at T {100 * metrics.scaled_ece:.1f} %", fontsize=9)
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        axis.label_outer()
    return figure


def _chosen(comparison: Measurements[Any, Any]) -> list[int]:
    """Return the classes to show: all, or those with the largest differences between networks if there are many."""
    classes = range(len(comparison.class_names))
    if len(classes) <= _MOST:
        return list(classes)
    values = np.array([[share.value for share in metrics.per_class] for metrics in comparison.metrics.values()])
    apart = values.max(0) - values.min(0) if len(values) > 1 else -values[0]
    return sorted(np.argsort(-np.nan_to_num(apart, nan=-2), kind="stable")[:_MOST].tolist())


def _class_note(comparison: Measurements[Any, Any]) -> str:
    if len(comparison.class_names) <= _MOST:
        return f"{comparison.class_title[0].upper()}{comparison.class_title[1:]} of each class; bars: 95 % intervals."
    return f"The {_MOST} classes on which the networks differ the most; bars: 95 % intervals."


def _classes(comparison: Measurements[Any, Any]) -> Figure:
    chosen = _chosen(comparison)
    height = max(0.32, 0.06 * len(comparison.metrics))  # per class, with one marker per network
    figure, (axis,) = _panels(1, 9.5, 1.0 + height * len(chosen), 1)
    for number, (name, metrics) in enumerate(comparison.metrics.items()):
        shares = [metrics.per_class[one] for one in chosen]
        offset = 0.6 * ((number + 0.5) / len(comparison.metrics) - 0.5)
        values = np.array([100 * share.value for share in shares])
        gaps = np.abs(np.array([[100 * end for end in share.interval] for share in shares]).T - values)
        place = np.arange(len(chosen)) + offset
        color, marker = style(number)
        axis.errorbar(values, place, xerr=gaps, fmt=marker, markersize=3.5, color=color, elinewidth=0.8, label=name)
    axis.set_yticks(range(len(chosen)), [comparison.class_names[one] for one in chosen])
    axis.invert_yaxis()
    axis.set_xlabel(f"{comparison.class_title}, %")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(comparison.metrics), 5), frameon=False)
    return figure


def _confusions(comparison: Comparison) -> Figure:
    names = [name for name in comparison.metrics if name != comparison.teacher]
    known = comparison.predictions.target != IGNORE_INDEX
    target = comparison.predictions.target[known]
    teacher = confusion(comparison.predictions.logits[str(comparison.teacher)][known], target)
    gaps = {
        name: 100 * (confusion(comparison.predictions.logits[name][known], target) - teacher).numpy() for name in names
    }
    widest = max(0.1, *(float(np.abs(gap).max()) for gap in gaps.values()))
    figure, axes = _panels(len(names), 4.8 if len(names) == 1 else 4.0, 3.8, 3)
    ticks = range(len(comparison.class_names))
    for axis, (name, gap) in zip(axes, gaps.items(), strict=True):
        image = axis.imshow(gap, cmap="RdBu_r", vmin=-widest, vmax=widest)
        axis.set_title(name, fontsize=9)
        axis.set_xticks(ticks, comparison.class_names, rotation=90, fontsize=7)
        axis.set_yticks(ticks, comparison.class_names, fontsize=7)
    figure.colorbar(image, ax=axes, label="percentage points", shrink=0.7)
    return figure
