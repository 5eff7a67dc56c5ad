"""Self-contained HTML page of a study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import optuna
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from lkd.__about__ import __version__
from lkd.pages import as_svg, rendered
from lkd.sweep.format import format_settings, format_state, format_value
from lkd.sweep.space import short_names
from lkd.sweep.study import REASON, Study

_STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
_DOT, _LINE = "#3b6ea5", "#c2571a"


def page(study: Study, trials: Sequence[FrozenTrial]) -> str:
    """Render the page of a study.

    Args:
        study: The study.
        trials: Trials of the study.

    Returns:
        HTML with embedded figures.
    """
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    keys, best = list(study.space), study.best
    names = short_names(keys)
    rows = [
        {
            "number": trial.number,
            "state": format_state(trial),
            "value": f"{trial.value:.5g}" if trial.state == TrialState.COMPLETE else "",
            "settings": [format_value(trial.params[key]) if key in trial.params else "" for key in keys],
            "reason": trial.user_attrs.get(REASON, ""),
            "is_best": best is not None and trial.number == best.number,
        }
        for trial in trials
    ]
    states = [format_state(trial) for trial in trials]
    return rendered(
        "sweep",
        title=study.name,
        version=__version__,
        monitor=study.plan.monitor,
        least=study.plan.mode == "min",
        counts=[(states.count(state), state) for state in dict.fromkeys(states)],
        best=best and {"number": best.number, "value": f"{best.value:.5g}", "settings": format_settings(best.params)},
        columns=[{"short": names[key], "long": key} for key in keys],
        rows=rows,
        figures=_figures(study, done, names) if len(done) > 1 else [],
    )


def _figures(study: Study, done: list[FrozenTrial], names: dict[str, str]) -> list[dict[str, Any]]:
    """Return the heading, caption and SVG of each figure."""
    history = _drawn(1, lambda axes: _history(axes[0], study, done))
    found = [("History", "Value of each trial, and best value so far.", history)]
    weights = _importances(study)
    if weights:
        bars = _drawn(1, lambda axes: _bars(axes[0], {names[key]: w for key, w in weights.items()}))
        note = "How well each setting separates the best 10 % of the trials from the others (PED-ANOVA)."
        found.append(("Hyperparameter importance", note, bars))
    slices = _drawn(len(names), lambda axes: _slices(axes, study, done, names))
    found.append(("Slices", "Values of the trials against each setting, over all values of the others.", slices))
    pair = [key for key in (weights or names) if not isinstance(study.space[key], CategoricalDistribution)][:2]
    if len(pair) == 2 and len(done) > 3:
        chart = _drawn(1, lambda axes: _contour(axes[0], study, done, pair, names))
        found.append(("Contour", "Dots are trials; values between them are interpolated.", chart))
    return [{"heading": heading, "note": note, "svg": svg} for heading, note, svg in found]


def _drawn(columns: int, draw: Callable[[list[Axes]], None]) -> Markup:
    """Draw a figure with several columns and return it as SVG."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4 if columns == 1 else 3.2 * columns, 3.2), layout="constrained")
        draw(list(np.atleast_1d(figure.subplots(1, columns))))
        return as_svg(figure)


def _values(done: Sequence[FrozenTrial]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([trial.value for trial in done], dtype=float)


def _history(axes: Axes, study: Study, done: list[FrozenTrial]) -> None:
    numbers, values = [trial.number for trial in done], _values(done)
    best = np.minimum.accumulate(values) if study.plan.mode == "min" else np.maximum.accumulate(values)
    axes.plot(numbers, values, "o", color=_DOT, markersize=4)
    axes.step(numbers, best, where="post", color=_LINE)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial", ylabel=study.plan.monitor)


def _importances(study: Study) -> dict[str, float]:
    """Return the importance of each setting in decreasing order; empty if it cannot be computed."""
    try:
        return dict(optuna.importance.get_param_importances(study.optuna, params=list(study.space)))
    except (ValueError, RuntimeError):  # too few trials, or all values are equal
        return {}


def _bars(axes: Axes, weights: dict[str, float]) -> None:
    names = list(weights)[::-1]
    axes.barh(names, [weights[name] for name in names], height=0.5, color=_DOT)
    axes.set(xlabel="importance", xlim=(0, 1))


def _slices(axes: list[Axes], study: Study, done: list[FrozenTrial], names: dict[str, str]) -> None:
    values = _values(done)
    for number, (key, name) in enumerate(names.items()):
        own = [trial.params[key] for trial in done]
        if isinstance(study.space[key], CategoricalDistribution):
            own = [_label(value) for value in own]
            axes[number].tick_params(axis="x", rotation=20)
        axes[number].plot(own, values, "o", color=_DOT, markersize=4, alpha=0.7)
        axes[number].set(xlabel=name, ylabel=study.plan.monitor if number == 0 else "")
        _scale(axes[number], "x", study, key)


def _label(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


def _scale(axes: Axes, side: str, study: Study, key: str) -> None:
    if getattr(study.space[key], "log", False):
        axes.set(**{f"{side}scale": "log"})
        axis = axes.xaxis if side == "x" else axes.yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def _contour(axes: Axes, study: Study, done: list[FrozenTrial], pair: list[str], names: dict[str, str]) -> None:
    first, second = ([float(trial.params[key]) for trial in done] for key in pair)
    values = _values(done)
    for key, side in zip(pair, "xy", strict=True):
        _scale(axes, side, study, key)
    with suppress(RuntimeError, ValueError):  # all points on one line
        axes.tricontourf(first, second, values, levels=12, cmap="Blues")
    dots = axes.scatter(first, second, c=values, cmap="Blues", edgecolors="black", linewidths=0.6, s=24)
    axes.figure.colorbar(dots, ax=axes, label=study.plan.monitor)
    axes.set(xlabel=names[pair[0]], ylabel=names[pair[1]])
    axes.use_sticky_edges = False  # otherwise dots at the edge are clipped
    axes.margins(0.06)
