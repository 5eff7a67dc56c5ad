"""Comparison of networks by counts that a task defines, for outputs that are too large to store."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lkd.callbacks.sheet import Row
from lkd.compare.predictions import Candidate, Collector
from lkd.tasks import Task
from lkd.tasks.visualization import visualize_inputs
from lkd.types import IGNORE_INDEX, Batch

SAMPLES = 10_000
"""Number of bootstrap samples."""
_CHUNK = 500


@dataclass(frozen=True)
class Estimate:
    """Value of a metric with a 95 % bootstrap interval over the images.

    Attributes:
        value: Value on all images; NaN if it is undefined.
        interval: Lower and upper bound.
    """

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class ScoreMetrics:
    """Metrics of one network.

    Attributes:
        scores: Metrics by title, starting with the main metric.
        to_teacher: The same metrics with the teacher's predictions as labels; empty without a teacher.
        per_class: Main metric of each class.
    """

    scores: dict[str, Estimate]
    to_teacher: dict[str, float]
    per_class: list[Estimate]

    @property
    def main(self) -> Estimate:
        """Main metric."""
        return next(iter(self.scores.values()))

    def measures(self) -> dict[str, float]:
        """Return the scalar metrics by name, starting with the main metric."""
        own = {name: one.value for name, one in self.scores.items()}
        return {**own, **{f"{name} to teacher": value for name, value in self.to_teacher.items()}}


@dataclass(frozen=True)
class ScoreDifference:
    """Difference in the main metric between two networks on the same images, from paired bootstrap samples.

    Attributes:
        first: Name of the first network.
        second: Name of the second network.
        value: Metric of the first network minus that of the second, in [-1, 1].
        interval: 95 % interval of the difference.
        p_value: Two-sided p-value: twice the share of samples in which the difference has the opposite sign, or is 0.
            NaN without labels.
    """

    first: str
    second: str
    value: float
    interval: tuple[float, float]
    p_value: float


class Tallies(Collector):
    """Collector of counts per image, and of visualizations of the images on which networks and teacher differ most.

    Args:
        candidates: The networks.
        task: Their task.
        teacher: Name of the teacher; None if there is none.
        shown: Maximum number of images shown per network.
        class_names: Names of the classes.

    Attributes:
        counts: Counts of each image `(B, S, K)`, by network; one tensor per batch.
        to_teacher: The same counts with the teacher's predictions as labels.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        task: Task,
        teacher: str | None,
        shown: int = 12,
        class_names: Sequence[str] = (),
    ) -> None:
        self.task, self.teacher, self.shown, self.class_names = task, teacher, shown, class_names
        names = [one.name for one in candidates]
        self.counts: dict[str, list[Tensor]] = {name: [] for name in names}
        self.to_teacher: dict[str, list[Tensor]] = {name: [] for name in names if teacher and name != teacher}
        self._rows: dict[str, list[tuple[float, Row]]] = {name: [] for name in self.to_teacher}

    def add(self, batch: Batch, logits: Mapping[str, Tensor], data: object) -> None:
        """Count the predictions of a batch."""
        choices = {name: self.task.choice(own, batch.target) for name, own in logits.items()}
        for name, choice in choices.items():
            if choice is None:
                raise ValueError(f"lkd compare does not support {type(self.task).__name__}, which defines no `choice`")
            self.counts[name].append(self.task.tally(choice, batch.target).cpu())
        for name in self.to_teacher:
            choice, teacher_choice = choices[name], choices[str(self.teacher)]
            if choice is not None and teacher_choice is not None:
                self.to_teacher[name].append(self.task.tally(choice, teacher_choice).cpu())
                self._keep(name, batch, logits, (choice, teacher_choice), data)

    def _keep(
        self, name: str, batch: Batch, logits: Mapping[str, Tensor], choices: tuple[Tensor, Tensor], data: object
    ) -> None:
        """Store visualizations of images on which a network and the teacher differ more than on those stored before."""
        agreement = next(iter(self.task.scores(self.to_teacher[name][-1]).values())).nan_to_num(1.0)
        kept = self._rows[name]
        worst = kept[-1][0] if len(kept) == self.shown else 1.0
        order = [int(one) for one in agreement.argsort(stable=True)[: self.shown] if agreement[one] < worst]
        if not order:
            return
        part = batch.rows(order)
        choice, teacher_choice = (values[order] for values in choices)
        images = visualize_inputs(part, getattr(data, "mean", None), getattr(data, "std", None))
        names, own = self.class_names, {one: logits[one][order] for one in (str(self.teacher), name)}
        columns = {"image": images, "label": self.task.visualize(part.target, names)}
        columns |= {one: self.task.visualize(part.target, names, values) for one, values in own.items()}
        columns["differences"] = self.task.visualize(choice.masked_fill(choice == teacher_choice, IGNORE_INDEX), names)
        kept += [
            (float(agreement[one]), {title: cells[row] for title, cells in columns.items()})
            for row, one in enumerate(order)
        ]
        self._rows[name] = sorted(kept, key=lambda pair: pair[0])[: self.shown]

    @property
    def disagreements(self) -> dict[str, list[Row]]:
        """Visualizations of the images on which a network and the teacher differ most, by network."""
        return {name: [row for _, row in rows] for name, rows in self._rows.items() if rows}


@dataclass(frozen=True)
class Samples:
    """Metrics of a network on R bootstrap samples of the images, which are the same for all networks.

    Attributes:
        scores: Metrics of each sample `(R,)`, by title.
        per_class: Main metric of each class in each sample `(R, K)`.
    """

    scores: dict[str, Tensor]
    per_class: Tensor


def bootstrapped(task: Task, counts: Tensor, seed: int = 0) -> Samples:
    """Compute the metrics of bootstrap samples.

    Args:
        task: The task.
        counts: Counts of each image `(N, S, K)`.
        seed: Seed; networks with the same seed and number of images use the same samples.
    """
    random, images = np.random.default_rng(seed), len(counts)
    flat, parts = counts.double().flatten(1), []
    for _ in range(0, SAMPLES, _CHUNK):
        drawn = random.multinomial(images, np.full(images, 1 / images), size=_CHUNK)
        parts.append((torch.from_numpy(drawn).double() @ flat).view(_CHUNK, *counts.shape[1:]))
    sums = torch.cat(parts)
    return Samples(task.scores(sums), task.class_scores(sums))


def score_metrics(task: Task, counts: Tensor, samples: Samples, to_teacher: Tensor | None) -> ScoreMetrics:
    """Compute the metrics of a network.

    Args:
        task: The task.
        counts: Counts of each image `(N, S, K)`.
        samples: Bootstrap samples of these counts.
        to_teacher: The same counts with the teacher's predictions as labels; None without a teacher.
    """
    total = counts.sum(0)
    scores = {name: Estimate(float(one), interval(samples.scores[name])) for name, one in task.scores(total).items()}
    classes = zip(task.class_scores(total).tolist(), samples.per_class.unbind(1), strict=True)
    relative = {} if to_teacher is None else task.scores(to_teacher.sum(0))
    return ScoreMetrics(
        scores, {name: float(one) for name, one in relative.items()}, [Estimate(v, interval(s)) for v, s in classes]
    )


def interval(samples: Tensor) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % quantiles of bootstrap samples `(R,)`; undefined samples are ignored."""
    low, high = torch.nanquantile(samples.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def score_difference(
    first: str, second: str, metrics: Mapping[str, ScoreMetrics], samples: Mapping[str, Samples]
) -> ScoreDifference:
    """Compare the main metric of two networks on the same images.

    Args:
        first: Name of the first network.
        second: Name of the second network.
        metrics: Metrics of each network, by name.
        samples: Bootstrap samples of each network, by name.
    """
    first_scores, second_scores = (next(iter(samples[name].scores.values())) for name in (first, second))
    differences = first_scores - second_scores
    value = metrics[first].main.value - metrics[second].main.value
    if not differences.isfinite().any():  # no labels
        return ScoreDifference(first, second, value, (math.nan, math.nan), math.nan)
    differences = differences[differences.isfinite()]
    opposite = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    p_value = min(1.0, 2 * (opposite + 1) / (len(differences) + 1))
    return ScoreDifference(first, second, value, interval(differences), p_value)
