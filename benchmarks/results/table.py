"""Table of a plan's results: Markdown, JSON and a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy import stats

from benchmarks.results.plan import STUDENT, Row
from benchmarks.results.store import Record, Store
from lkd.io.tensor_cache import replacing

_CONFIDENCE = 0.95
_HEAD = "| method | n | best, % | last, % | best, difference from the student alone | published | minutes |"


def summary(rows: Sequence[Row], store: Store) -> list[dict[str, Any]]:
    """Summarize the finished cells of each row; entries without any are `None`.

    Metrics are in percent, differences in percentage points. `best` is the checkpoint with the highest metric on
    the validation images, `last` the one after the last step; both are evaluated on the test images. `difference` is
    the mean over seeds of the difference of `best` to the student alone with the same seed, `low` and `high` its 95 %
    confidence interval from Student's t-distribution. `classes` contains the metric of each class for `best`, as a mean
    over seeds, if the results include it.

    Args:
        rows: The rows.
        store: The store.
    """
    found = []
    for row in rows:
        results = _results(row, store)
        alone = next(
            other for other in rows if (other.pair, other.recipe, other.method) == (row.pair, row.recipe, STUDENT)
        )
        base = {record["seed"]: record["best"]["test"] for record in _results(alone, store)}
        is_student = row.cells[0].teacher != ""
        paired = [record["best"]["test"] - base[record["seed"]] for record in results if record["seed"] in base]
        found.append({
            "metric": next((record["best"].get("metric", "accuracy") for record in results), None),
            **{"label": row.cells[0].label, "pair": row.pair, "recipe": row.recipe, "method": row.method},
            **{"n": len(results), "planned": len(row.cells), "seeds": [record["seed"] for record in results]},
            **{name: _spread([record[name]["test"] for record in results]) for name in ("best", "last")},
            "difference": interval(paired if is_student else []),
            "published": row.published,
            "minutes": _mean([record["seconds"] / 60 for record in results]),
            "teachers": sorted({record["teacher"]["weights"] for record in results if record["teacher"]}),
            **_classes(results),
        })  # fmt: skip
    return found


def interval(values: Sequence[float]) -> dict[str, float | None] | None:
    """Compute mean and confidence interval of paired differences; `None` without values.

    Args:
        values: One difference per seed; a single one has no interval.

    Example:
        >>> found = interval([1.0, 2.0, 3.0])
        >>> [round(found[name], 2) for name in ("mean", "low", "high")]
        [2.0, -0.48, 4.48]
    """
    if not values:
        return None
    mean = statistics.mean(values)
    if len(values) == 1:
        return {"n": 1, "mean": mean, "low": None, "high": None}
    quantile = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1))
    margin = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return {"n": len(values), "mean": mean, "low": mean - margin, "high": mean + margin}


def write(rows: Sequence[Row], store: Store, folder: Path) -> None:
    """Write `table.md`, `table.json` and `table.svg`.

    Args:
        rows: The rows.
        store: The store.
        folder: Folder of the files.
    """
    figures = summary(rows, store)
    records = [record for row in rows for record in _results(row, store)]
    with replacing(folder / "table.json") as path:
        path.write_text(json.dumps(figures, indent=1) + "\n")
    with replacing(folder / "table.md") as path:
        path.write_text("\n".join(_markdown(figures, records)) + "\n")
    with replacing(folder / "table.svg") as path:
        _plot(figures).savefig(path, format="svg", metadata={"Date": None})


def _results(row: Row, store: Store) -> list[Record]:
    return [record for cell in row.cells if (record := store.finished(cell)) is not None]


def _classes(results: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Return the means of the metric of each class, as `classes`; nothing if a result lacks them."""
    scores = [record["best"].get("classes") for record in results]
    if not scores or not all(scores):
        return {}
    return {"classes": {name: statistics.mean(score[name] for score in scores) for name in scores[0]}}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def _spread(values: Sequence[float]) -> dict[str, float | None] | None:
    if not values:
        return None
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def _markdown(figures: Sequence[dict[str, Any]], records: Sequence[Record]) -> Iterator[str]:
    for title, section in _sections(figures).items():
        yield from (f"### {title}", "", _HEAD, "|---|---|---|---|---|---|---|")
        yield from map(_line, section)
        yield ""
        yield from _class_table([row for row in section if "classes" in row])
    yield from _remarks(records, any(row["published"] is not None for row in figures))


def _class_table(section: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Format the metric of each class, one line per class."""
    if not section:
        return
    yield f"| class | {' | '.join(row['method'] for row in section)} |"
    yield "|---" * (len(section) + 1) + "|"
    for name in section[0]["classes"]:
        scores = (f"{row['classes'][name]:.1f}" for row in section)
        yield f"| {name} | {' | '.join(scores)} |"
    yield ""


def _sections(figures: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in figures:
        found.setdefault(f"{row['label']}: {row['pair']}, recipe {row['recipe']}", []).append(row)
    return found


def _line(row: dict[str, Any]) -> str:
    """Format one row in Markdown; missing values are empty."""
    number = "" if not row["n"] else f"{row['n']}" if row["n"] == row["planned"] else f"{row['n']} of {row['planned']}"
    published = "" if row["published"] is None else f"{row['published']:.2f}"
    minutes = "" if row["minutes"] is None else f"{row['minutes']:.1f}"
    scores = (_score(row[name]) for name in ("best", "last"))
    cells = (row["method"], number, *scores, _difference(row["difference"], row["n"]), published, minutes)
    return f"| {' | '.join(cells)} |"


def _score(spread: dict[str, float | None] | None) -> str:
    if spread is None:
        return ""
    return f"{spread['mean']:.2f}" + ("" if spread["sd"] is None else f" ± {spread['sd']:.2f}")


def _difference(found: dict[str, float | None] | None, number: int) -> str:
    """Format a difference, with the number of pairs if it is less than the number of seeds."""
    if found is None:
        return ""
    limits = "" if found["low"] is None else f" ({found['low']:+.2f} to {found['high']:+.2f})"
    return f"{found['mean']:+.2f}{limits}" + ("" if found["n"] == number else f", n = {found['n']}")


def _remarks(records: Sequence[Record], has_published: bool) -> Iterator[str]:
    """Describe how the results were measured."""
    metric = " or ".join(sorted({record["best"].get("metric", "accuracy") for record in records})) or "accuracy"
    text = (
        f"The metric is the {metric}. `best` is the checkpoint with the highest {metric} on the validation images, "
        "`last` the one after the last step. Both are evaluated on the test images: mean ± standard deviation over n "
        "seeds. Differences are paired by seed, in percentage points, with 95 % confidence intervals from Student's "
        "t-distribution. All students of a pair have the same teacher, so the intervals do not include the variation "
        "between teachers."
    )
    if has_published:
        text += (
            " Published accuracies are from the official split, after 240 epochs on all training images (sources: "
            "benchmarks/results/published.yaml). RepDistiller reports `last`, whereas dkd and logit_standardization "
            "report the epoch with the best test accuracy; the code of reviewkd records both."
        )
    if any("classes" in record["best"] for record in records):
        text += " The metric of each class, in percent, is that of `best`: mean over the seeds."
    yield text
    if not records:
        return
    counted = [images for record in records if "train" in (images := record["images"])]
    sizes = {f"{images['train']:,} for training, {images['val']:,} for validation" for images in counted}
    versions = {", ".join(f"{name} {record['versions'][name]}" for name in ("lkd", "torch")) for record in records}
    devices = {f"{life['device']} ({record['precision']})" for record in records for life in record["devices"]}
    contents = {record["images"]["contents"] for record in records}
    yield ""
    images = f"Images: {'; '.join(sorted(sizes))}. " if sizes else ""
    yield f"{images}Devices: {'; '.join(sorted(devices))}. {'; '.join(sorted(versions))}."
    if len(contents) > 1:
        yield f"\nThe cells were trained on {len(contents)} different sets of images and are not comparable."


def _plot(figures: Sequence[dict[str, Any]]) -> Figure:
    """Plot the differences to the student alone with their confidence intervals."""
    sections = _sections(figures)
    height = sum(1.2 + 0.3 * len(section) for section in sections.values())
    figure = Figure(figsize=(7, height), layout="constrained")
    heights = [2 + len(section) for section in sections.values()]
    every = figure.subplots(len(sections), 1, squeeze=False, height_ratios=heights)
    for axes, (title, section) in zip(every[:, 0], sections.items(), strict=True):
        measured = [row for row in section if row["difference"] is not None]
        for place, row in enumerate(measured):
            found = row["difference"]
            axes.plot(found["mean"], place, "o", color="C0")
            if found["low"] is not None:
                axes.hlines(place, found["low"], found["high"], color="C0")
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set(
            title=title,
            yticks=range(len(measured)),
            yticklabels=[f"{row['method']} (n = {row['difference']['n']})" for row in measured],
        )
        axes.set_ylim(max(len(measured), 1) - 0.5, -0.5)
        metric = next((row["metric"] for row in section if row["metric"]), "accuracy")
        axes.set_xlabel(f"test {metric} of the best checkpoint, difference from the student alone, percentage points")
    return figure
