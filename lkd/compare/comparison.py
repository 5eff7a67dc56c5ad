"""Comparison of several networks on the same images: accuracy, cost, and significance of the differences."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import lightning as L
import torch

from lkd import devices
from lkd.__about__ import __version__
from lkd._moved import former_members
from lkd.callbacks.sheet import Row
from lkd.compare.cost import Cost, costs, size_of
from lkd.compare.grid import Grid
from lkd.compare.groups import Group, Measured, MethodDifference, groups_of, method_difference
from lkd.compare.measurements import Measurements
from lkd.compare.metrics import ClassificationMetrics, Difference, difference, measure
from lkd.compare.predictions import Candidate, Predictions, Split, predict, run_networks
from lkd.compare.score_tables import score_tables
from lkd.compare.scores import ScoreDifference, ScoreMetrics, Tallies, bootstrapped, score_difference, score_metrics
from lkd.compare.tables import tables
from lkd.tasks import Classification, Task
from lkd.tasks.visualization import class_name

_TITLES = "top-1 accuracy", "top-1 accuracy"


@former_members(answers="predictions")
@dataclass
class Comparison(Measurements[ClassificationMetrics, Difference]):
    """Comparison of classifiers, based on their logits.

    Attributes:
        predictions: Logits of the networks, labels, and images with different predictions.
    """

    predictions: Predictions

    def tables(self, members: bool = False) -> list[Grid]:
        """Create all tables, most important first."""
        return tables(self, members)


@dataclass
class ScoreComparison(Measurements[ScoreMetrics, ScoreDifference]):
    """Comparison of networks for other tasks, based on the counts that the task defines (`Task.tally`).

    Attributes:
        disagreements: Visualizations of the images on which a network and the teacher differ most, by network.
    """

    disagreements: dict[str, list[Row]]

    def tables(self, members: bool = False) -> list[Grid]:
        """Create all tables, most important first."""
        return score_tables(self, members)


def compare(
    candidates: Sequence[Candidate],
    data: L.LightningDataModule,
    teacher: str | None = None,
    split: Split = "test",
    batch_sizes: Sequence[int] | None = None,
    accelerator: str = "auto",
    seconds: float = 1.0,
    progress: bool = False,
    task: Task | None = None,
) -> Comparison | ScoreComparison:
    """Compare networks on one split of a dataset.

    Args:
        candidates: Networks with unique names.
        data: Data module that provides the images.
        teacher: Name of the network with which the others are compared; None if there is no teacher.
        split: `test`, or `val` for the validation images.
        batch_sizes: Batch sizes for the measurement of latency and throughput. None uses 1 and 64 for
            classification, and 1 and the batch size of the data for other tasks.
        accelerator: Device, as in `lightning.Trainer`.
        seconds: Duration of the measurement for each network and batch size, in seconds.
        progress: Whether to show a progress bar.
        task: Task of the networks; None for classification.

    Returns:
        The comparison.

    Raises:
        ValueError: If names are not unique, the teacher is not among them, a network does not fit the data, or the task
            does not define how networks are compared.
    """
    names = [one.name for one in candidates]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"the networks to compare must have unique names, got {', '.join(names) or 'none'}")
    if teacher is not None and teacher not in names:
        raise ValueError(f"the teacher must be one of the networks {', '.join(names)}, got {teacher!r}")
    if batch_sizes is not None and not batch_sizes:
        raise ValueError("batch_sizes must contain at least one batch size, got none")
    check_comparable(task or Classification())
    run = Run(candidates, data, split, accelerator, seconds, progress)
    if task is None or isinstance(task, Classification):
        return _by_logits(run, teacher, batch_sizes or (1, 64), task)
    return _by_counts(run, teacher, batch_sizes, task)


_COMPARED = ("choice", "tally", "scores", "class_scores", "visualize")
"""Methods of a task on which the comparison is based."""


def check_comparable(task: Task) -> None:
    """Check that `lkd compare` supports a task.

    Args:
        task: The task.

    Raises:
        ValueError: If the task is neither classification nor defines the methods of `_COMPARED`.
    """
    missing = [name for name in _COMPARED if getattr(type(task), name) is getattr(Task, name)]
    if missing and not isinstance(task, Classification):
        raise ValueError(
            f"lkd compare does not support the task {type(task).__name__}, which does not define {', '.join(missing)}; "
            "`lkd test` evaluates it"
        )


class Run(NamedTuple):
    """Settings that all comparisons share; see the arguments of `compare`."""

    candidates: Sequence[Candidate]
    data: L.LightningDataModule
    split: Split
    accelerator: str
    seconds: float
    progress: bool

    def costs(self, example: Any, batch_sizes: Sequence[int], device: torch.device) -> dict[str, Cost]:
        """Measure the cost of the networks."""
        return costs({one.name: one.network for one in self.candidates}, example, batch_sizes, device, self.seconds)

    def groups(self, metrics: Mapping[str, Measured]) -> tuple[list[Group], list[MethodDifference]]:
        """Combine networks that differ only in their seed, and compare these groups."""
        groups = groups_of({one.name: one.group for one in self.candidates}, metrics)
        return groups, [method_difference(*pair) for pair in combinations(groups, 2)]

    def class_names(self, number: int) -> list[str]:
        """Return the class names from the data; a class without a name is named by its index."""
        names = [str(name) for name in getattr(self.data, "class_names", None) or ()]
        return [class_name(names, one) for one in range(number)]

    def facts(self, device: torch.device, images: int) -> dict[str, str]:
        """Describe the data, the device, the versions and the networks."""
        where = f"{device.type}, {platform.machine()}" if device.type == "cpu" else devices.name_of(device)
        return {
            "data": f"{place_of(self.data)}, {self.split} split, {images:,} images",
            "device": f"{where}, float32, {torch.get_num_threads()} thread(s)",
            "versions": f"lkd {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
            **{f"network {one.name}": one.source for one in self.candidates if one.source},
        }


def _by_logits(run: Run, teacher: str | None, batch_sizes: Sequence[int], task: Classification | None) -> Comparison:
    """Compare classifiers, whose logits are stored for all images."""
    found = predict(run.candidates, run.data, run.split, teacher, run.accelerator, progress=run.progress, task=task)
    reference = None if teacher is None else found.logits[teacher]
    metrics = {
        name: measure(logits, found.target, None if name == teacher else reference)
        for name, logits in found.logits.items()
    }
    cost = run.costs(found.example, batch_sizes, found.device)
    pairs = [
        difference(one, other, found.logits[one], found.logits[other], found.target)
        for one, other in combinations(metrics, 2)
    ]
    names = run.class_names(next(iter(found.logits.values())).shape[1])
    facts = run.facts(found.device, len(found.target))
    return Comparison(metrics, cost, pairs, *run.groups(metrics), teacher, facts, names, run.data, *_TITLES, found)


def _by_counts(run: Run, teacher: str | None, batch_sizes: Sequence[int] | None, task: Task) -> ScoreComparison:
    """Compare networks of a task by counts, which are computed batch by batch."""
    tallies = Tallies(run.candidates, task, teacher, class_names=getattr(run.data, "class_names", None) or ())
    device, example = run_networks(run.candidates, run.data, run.split, task, tallies, run.accelerator, run.progress)
    counts = {name: torch.cat(parts) for name, parts in tallies.counts.items()}
    relative = {name: torch.cat(parts) for name, parts in tallies.to_teacher.items()}
    samples = {name: bootstrapped(task, own) for name, own in counts.items()}
    metrics = {name: score_metrics(task, own, samples[name], relative.get(name)) for name, own in counts.items()}
    cost = run.costs(example, batch_sizes or sorted({1, size_of(example)}), device)
    pairs = [score_difference(one, other, metrics, samples) for one, other in combinations(metrics, 2)]
    first = next(iter(counts.values()))
    facts, names = run.facts(device, len(first)), run.class_names(first.shape[-1])
    titles = task.metric_title, task.class_metric_title
    grouped = run.groups(metrics)
    return ScoreComparison(
        metrics, cost, pairs, *grouped, teacher, facts, names, run.data, *titles, tallies.disagreements
    )


def place_of(data: L.LightningDataModule) -> str:
    """Return the class of a data module and, if it has one, its root folder.

    Args:
        data: The data module.
    """
    root = getattr(data, "root", None)
    return f"{type(data).__name__}{f' ({root})' if root else ''}"
