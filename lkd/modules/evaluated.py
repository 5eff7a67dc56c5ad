"""Evaluation of a network in validation and test."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, MutableMapping
from typing import Any, cast

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import Metric

from lkd import devices
from lkd.modules.checks import evaluated_size
from lkd.modules.recorded import RecordedModule
from lkd.tasks.base import Task
from lkd.tasks.metrics import WeightedMean
from lkd.types import Batch


class EvaluatedModule(RecordedModule):
    """Evaluation logic of `ClassificationModule`, with separate metrics for validation and test.

    Attributes:
        metrics: Mapping from stage (`val`, `test`) to a mapping from names to metrics.
    """

    task: Task
    network_names: tuple[str, ...]
    metrics: nn.ModuleDict
    task_metrics: tuple[str, ...]
    """Names of the metrics of the task."""
    logit_metrics: tuple[str, ...] = ("loss",)
    """Names of the metrics of the logits, which are not logged if the loss does not train the logits."""

    def make_metrics(self) -> dict[str, Metric]:
        """Create the metrics of one stage, by name; called for `val` and for `test`."""
        return {"loss": WeightedMean(), **self.task.metrics()}

    def stage_metrics(self, stage: str) -> dict[str, Metric]:
        """Return the metrics of a stage, `val` or `test`, by name."""
        return dict(cast("nn.ModuleDict", self.metrics[stage]).items())  # type: ignore[arg-type]

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Class names from the data module or else from the checkpoint; empty if unknown."""

    @property
    def trains_logits(self) -> bool:
        """Whether the loss trains all parameters that the logits depend on; if not, `logit_metrics` are not logged."""
        return True

    @property
    def main_metric(self) -> str | None:
        """Name, without the stage, of the metric that best describes the quality of the trained network."""
        return self.task.metric

    def is_loss(self, curve: str) -> bool:
        """Return whether lower values of a logged metric are better: a loss, or an error that the task measures.

        Args:
            curve: Name of the metric, such as `val/loss`.
        """
        stage, _, name = curve.partition("/")
        metric = self.stage_metrics(stage).get(name) if stage in self.metrics else None
        if metric is not None and not isinstance(metric, WeightedMean):  # which averages losses
            return metric.higher_is_better is False
        return "loss" in curve or name == "hard"

    def setup(self, stage: str) -> None:
        """Reset the metrics, since `validate` leaves inference tensors, which `fit` could not update."""
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()

    def update_metrics(self, metrics: MutableMapping[str, Metric], batch: Batch) -> Tensor:
        """Update the metrics with one validation or test batch. Metrics without an update are not logged.

        Args:
            metrics: Metrics of the stage by name, as created by `make_metrics`; new ones may be added.
            batch: One batch.

        Returns:
            Logits `(B, K)` of the trained network.
        """
        logits: Tensor = self(batch.input)
        self.measure(metrics, logits, batch.target)
        return logits

    def network_logits(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the logits of each network for a batch, by name; called in eval mode.

        Args:
            batch: One batch.
        """
        return {self.network_names[0]: self(batch.input)}

    def measure(self, metrics: Mapping[str, Metric], logits: Tensor, target: Tensor) -> None:
        """Update the supervised loss and the metrics of the task.

        Args:
            metrics: Metrics of the stage by name.
            logits: Output of the network.
            target: Targets; missing labels are `IGNORE_INDEX`.
        """
        metrics["loss"].update(self.task.loss(logits, target), weight=self.task.loss_weight(target))
        self.task.update({name: metrics[name] for name in self.task_metrics}, logits, target)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate one validation batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate one test batch."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Any) -> None:
        """Evaluate one batch, without advancing the random number generators of training."""
        with devices.isolated_random_numbers(self.device):
            self._update(stage, batch)

    def _update(self, stage: str, batch: Any) -> None:
        metrics, batch = self.stage_metrics(stage), self.read(batch)
        graph = self.eval_graph if stage == "val" and self._can_replay(batch) else None
        if graph is None or not graph.update(metrics, batch):
            with evaluated_size(self._trainer, batch.input):
                self.update_metrics(metrics, batch)
        self._adopt(stage, metrics)
        unlogged = () if self.trains_logits else self.logit_metrics
        updated = {name: metric for name, metric in metrics.items() if metric.update_called and name not in unlogged}
        for name, metric in updated.items():
            self.log(f"{stage}/{name}", metric, prog_bar=stage == "val" and name == self.main_metric)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of each class in `validate`; in `fit`, they would add too many curves."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._log_classes("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of each class."""
        self._log_classes("test")

    def _log_classes(self, stage: str) -> None:
        names = self.class_names
        for metric, values in self.task.class_metrics(self.stage_metrics(stage)).items():
            for number, value in enumerate(values):
                name = names[number] if number < len(names) else str(number)
                self.log(f"{stage}/{metric}/{name}", value, sync_dist=True)

    def _can_replay(self, batch: Batch) -> bool:
        """Return whether a captured graph may evaluate a batch, which requires that all metrics exist."""
        return True

    def _adopt(self, stage: str, metrics: Mapping[str, Metric]) -> None:
        """Register metrics that were created in `update_metrics`."""
        own = cast("nn.ModuleDict", self.metrics[stage])
        for name in metrics.keys() - own.keys():
            own[name] = metrics[name]
            self._metric_attributes = None  # Lightning caches the metrics that it has found
