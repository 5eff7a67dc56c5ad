"""Measuring a network in validation and test."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, cast

from torch import Tensor, nn
from torchmetrics import Metric

from lkd.losses._labels import cross_entropies
from lkd.modules.meter import Accuracy, WeightedMean
from lkd.modules.recorded import RecordedModule
from lkd.types import IGNORE_INDEX, Batch


def mean_cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels, the mean over the images that have one.

    Args:
        logits: `(B, K)`.
        target: `(B,)`; `IGNORE_INDEX` where there is no label.
        label_smoothing: Share of the target's probability spread over all classes, in [0, 1).

    Returns:
        A scalar in nats; 0 if no image has a label.
    """
    total = cross_entropies(logits, target, label_smoothing, "sum")
    return total / (target != IGNORE_INDEX).sum().clamp(min=1)


class EvaluatedModule(RecordedModule):
    """The part of a `ClassificationModule` that measures it, with one set of metrics for validation and one for test.

    Attributes:
        metrics: Stage (`val`, `test`) to name to metric.
    """

    metrics: nn.ModuleDict
    logit_metrics: tuple[str, ...] = ("loss", "acc")
    """Metrics of the logits: they are not logged where the loss does not train the logits."""

    def make_metrics(self) -> dict[str, Metric]:
        """Name to metric, for each of the stages `val` and `test`."""
        return {"loss": WeightedMean(), "acc": Accuracy()}

    def stage_metrics(self, stage: str) -> dict[str, Metric]:
        """The metrics of `val` or `test`, by name."""
        return dict(cast("nn.ModuleDict", self.metrics[stage]).items())  # type: ignore[arg-type]

    @property
    def trains_logits(self) -> bool:
        """Whether the loss trains all that the logits depend on; otherwise nothing is logged of them."""
        return True

    @property
    def main_metric(self) -> str | None:
        """The metric that tells best how good the network in training is, by its name without the stage."""
        return "acc"

    def is_loss(self, curve: str) -> bool:
        """Whether lower values of a curve are better.

        Args:
            curve: Its name, such as `val/loss`.
        """
        return "loss" in curve or curve.partition("/")[2] == "hard"

    def update_metrics(self, metrics: MutableMapping[str, Metric], batch: Batch) -> Tensor:
        """Measure one batch of validation or test. Metrics that are not updated are not logged.

        Args:
            metrics: One stage's metrics by name, as `make_metrics` made them; new ones may be added.
            batch: One batch.

        Returns:
            The logits `(B, K)` of the network in training.
        """
        logits: Tensor = self(batch.input)
        self.measure(metrics, logits, batch.target)
        return logits

    def measure(self, metrics: Mapping[str, Metric], logits: Tensor, target: Tensor) -> None:
        """Update `loss` and `acc`.

        Args:
            metrics: One stage's metrics.
            logits: `(B, K)`.
            target: `(B,)`; `IGNORE_INDEX` where there is no label.
        """
        metrics["loss"].update(mean_cross_entropy(logits, target), weight=(target != IGNORE_INDEX).sum())
        metrics["acc"].update(logits, target)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure one batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure one batch."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Any) -> None:
        metrics, batch = self.stage_metrics(stage), self.unpack(batch)
        graph = self.eval_graph if stage == "val" and self._can_replay(batch) else None
        if graph is None or not graph.update(metrics, batch):
            self.update_metrics(metrics, batch)
        self._adopt(stage, metrics)
        unlogged = () if self.trains_logits else self.logit_metrics
        updated = {name: metric for name, metric in metrics.items() if metric.update_called and name not in unlogged}
        for name, metric in updated.items():
            self.log(f"{stage}/{name}", metric, prog_bar=stage == "val" and name == self.main_metric)

    def _can_replay(self, batch: Batch) -> bool:
        """Whether a graph may measure a batch: all metrics exist."""
        return True

    def _adopt(self, stage: str, metrics: Mapping[str, Metric]) -> None:
        """Keep metrics that were created in `update_metrics`."""
        own = cast("nn.ModuleDict", self.metrics[stage])
        for name in metrics.keys() - own.keys():
            own[name] = metrics[name]
            self._metric_attributes = None  # Lightning has looked for metrics before
