"""Base class of tasks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import Metric

from lkd.tasks.visualization import Visualization
from lkd.types import Batch, Mixed


class Task(ABC):
    """What a network returns, how it is supervised, and how it is evaluated.

    A task holds settings only; weights, metrics and batches belong to the module that uses it. To support a task of
    your own, override the abstract methods, and `metric` if its main metric is not an accuracy. `Batch.target` may be
    of any type that the methods below accept. The same applies to the predictions that `logits` returns, which are
    passed to the other methods: a tensor, or a named tuple that contains tensors.
    """

    metric: ClassVar[str] = "acc"
    """Name of the main metric, one of `metrics()`; logged as `val/<metric>`. The best checkpoint has the lowest value
    if the metric's `higher_is_better` is False, as for torchmetrics' `MeanAbsoluteError`, else the highest one."""

    metric_title: ClassVar[str] = "accuracy"
    """Main metric in reports; by default, the name of a metric that a subclass sets."""

    metric_format: ClassVar[str] = ".2%"
    """Format of the main metric in reports, as in `format(0.5, ".2%")`; for example `.3f` if it is not a proportion."""

    class_metric_title: ClassVar[str] = "accuracy"
    """Main metric of a single class in reports."""

    has_classes: ClassVar[bool] = True
    """Whether the outputs are scores of the data's classes, in dimension 1."""

    graph_obstacle: ClassVar[str] = ""
    """Reason why a step can be neither captured as a graph nor compiled; empty if it can."""

    caches_logits: ClassVar[bool] = False
    """Whether outputs `(B, K)` are small enough to be stored for all samples (teacher cache, `lkd compare`)."""

    exports: ClassVar[bool] = True
    """Whether networks map one tensor to one tensor, which `lkd export` requires."""

    pipeline_tag: ClassVar[str] = ""
    """Name of the task on Hugging Face, for model cards; empty if there is none."""

    aux_weight: float = 0.0
    """Weight of the supervised loss of an auxiliary head, relative to that of the network itself."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "metric" in vars(cls) and "metric_title" not in vars(cls):
            cls.metric_title = cls.metric

    def prepare(self, batch: Batch) -> Batch:
        """Convert the labels of a batch from the data module, for example the label of ignored pixels.

        It is not called in prediction, which does not read labels.

        Args:
            batch: Batch as the data module returns it.

        Returns:
            Batch whose missing labels are `IGNORE_INDEX`.
        """
        return batch

    @abstractmethod
    def logits(self, output: Any) -> Any:
        """Return the predictions in the output of a network, for example the logits `(B, K)`.

        Args:
            output: What the network returned.

        Raises:
            TypeError: If the output has another format.
        """

    def auxiliary_logits(self, output: Any) -> Tensor | None:
        """Return the predictions of an auxiliary head, or None; only the supervised loss in training reads them.

        Args:
            output: What the network returned.
        """
        return None

    def num_outputs(self, logits: Any) -> int | None:
        """Return the number of classes that the output of a network distinguishes; `None` if there are no classes.

        Args:
            logits: Output of the network, as returned by `logits`.
        """
        return int(logits.shape[1]) if self.has_classes else None

    def chance(self, num_classes: int) -> float | None:
        """Return the main metric of random predictions; `None` if it is unknown, or if lower values are better.

        A teacher near this value causes a warning. The method is called only for tasks with `has_classes`.

        Args:
            num_classes: Number of classes, at least 1.
        """
        return None

    @abstractmethod
    def check(self, name: str, logits: Any) -> None:
        """Check the output of a network for one blank input.

        Args:
            name: Name of the network in the error message.
            logits: Its output, as returned by `logits`.

        Raises:
            ValueError: If it does not fit the task.
        """

    @abstractmethod
    def blank_target(self, logits: Any) -> Any:
        """Return valid targets for a batch of blank inputs.

        Args:
            logits: Output of the network for the inputs.
        """

    @abstractmethod
    def loss(self, logits: Any, target: Any, label_smoothing: float = 0.0, mixed: Mixed | None = None) -> Tensor:
        """Compute the supervised loss, averaged over what is labelled.

        Args:
            logits: Output of the network.
            target: Targets; missing labels are `IGNORE_INDEX`.
            label_smoothing: Label smoothing factor, in [0, 1).
            mixed: Partners of mixed images and their weights, if the images are mixed.

        Returns:
            Scalar loss.
        """

    @abstractmethod
    def labelled(self, target: Any) -> Tensor:
        """Return the number of labelled elements.

        Args:
            target: Targets of a batch.
        """

    def loss_weight(self, target: Any) -> Tensor:
        """Return the weight of a batch in the mean loss of a split: by default, the number of labelled elements.

        Args:
            target: Targets of a batch.
        """
        return self.labelled(target)

    def correct(self, logits: Any, target: Any) -> Tensor | None:
        """Return the number of correct predictions, from which `train/acc` is computed; `None` disables `train/acc`.

        Args:
            logits: Output of the network.
            target: Targets of a batch.
        """
        return None

    @abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """Create the metrics of one network, by name, including `metric`."""

    @abstractmethod
    def update(self, metrics: Mapping[str, Metric], logits: Any, target: Any) -> None:
        """Update metrics with a batch. It must not synchronize with the device, unless there is a `graph_obstacle`.

        Args:
            metrics: Some or all of `metrics()`, by name.
            logits: Output of the network.
            target: Targets of the batch.
        """

    def formatted(self, value: float) -> str:
        """Format a value of the main metric; a dash for NaN.

        Args:
            value: Value of the metric.
        """
        return "-" if math.isnan(value) else format(value, self.metric_format)

    def formatted_difference(self, value: float) -> str:
        """Format a difference of the main metric, with its sign; proportions in percentage points.

        Args:
            value: Difference of two values of the metric.
        """
        if self.metric_format.endswith("%"):
            return f"{100 * value:+{self.metric_format[:-1]}f} pp"
        return format(value, f"+{self.metric_format}")

    def class_metrics(self, metrics: Mapping[str, Metric]) -> dict[str, Tensor]:
        """Return metrics of each class `(K,)`, by name; `lkd validate` and `lkd test` log `<stage>/<name>/<class>`.

        Args:
            metrics: The updated `metrics()`, by name.
        """
        return {}

    def choice(self, logits: Any, target: Any) -> Tensor | None:
        """Return a network's predictions as targets, for the agreement of two networks; `None` if it is not defined.

        Args:
            logits: Output of the network.
            target: Targets of the batch, which determine the shape and the elements that count.

        Returns:
            Predictions in the shape of `target`; elements without a label are `IGNORE_INDEX`.
        """
        return None

    def tally(self, choice: Tensor, target: Tensor) -> Tensor:
        """Return counts of each sample; `scores` computes the metrics of a set of samples from their sums.

        Args:
            choice: Predictions of a network, from `choice`.
            target: Targets of the batch, or the predictions of another network.

        Returns:
            Counts `(B, S, K)`, int64: S counts of each class.

        Raises:
            NotImplementedError: If the task does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define `tally`")

    def scores(self, counts: Tensor) -> dict[str, Tensor]:
        """Compute metrics from counts, by title, starting with the main metric; higher values are better.

        Args:
            counts: Sums of `tally` over samples `(..., S, K)`.

        Returns:
            Metrics `(...)` in [0, 1].

        Raises:
            NotImplementedError: If the task does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define `scores`")

    def class_scores(self, counts: Tensor) -> Tensor:
        """Compute the main metric of each class from counts.

        Args:
            counts: Sums of `tally` over samples `(..., S, K)`.

        Returns:
            Metric of each class `(..., K)`; NaN for absent classes.

        Raises:
            NotImplementedError: If the task does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define `class_scores`")

    def visualize(
        self, target: Tensor, class_names: Sequence[str], logits: Tensor | None = None
    ) -> list[Visualization]:
        """Return a visualization of each target or prediction of a batch.

        Args:
            target: Targets of the batch.
            class_names: Names of the classes; may be empty.
            logits: Output of a network; `None` shows the targets.

        Raises:
            NotImplementedError: If the task does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define `visualize`")
