"""Evaluation of student, teacher and criterion in validation and test."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lkd import devices
from lkd._compat import tree_map_only
from lkd._moved import former_members
from lkd.datamodules.limits import images_measured
from lkd.features.extractor import FeatureExtractor
from lkd.features.layers import device_of, evaluating
from lkd.losses import DistillLoss, WeightedSum
from lkd.losses.base import SUM
from lkd.modules.classification import ClassificationModule
from lkd.modules.criterion_meter import (
    CriterionMeter,
    RememberedLogits,
    has_untrained_part,
    with_total,
)
from lkd.tasks.metrics import Accuracy
from lkd.types import Batch, Normalization, Outputs

NO_OUTPUTS = Outputs(torch.empty(0), {})
"""Empty teacher outputs for criteria that do not use a teacher."""
_BLANK = 4
"""Number of images in the blank batch on which a loss is tested."""


@former_members(asks_teacher="uses_teacher", student_taps="student_extractor", teacher_taps="teacher_extractor")
class EvaluatedDistillation(ClassificationModule):
    """Evaluation logic of `DistillModule`, for student, teacher and criterion."""

    logit_metrics: tuple[str, ...] = ("loss", "agreement")
    criterion: DistillLoss
    distill_weight: float
    hard_weight: float
    student_extractor: FeatureExtractor
    teacher_normalization: Normalization | None
    _built: bool = False
    _criterion_meter: CriterionMeter
    _remembered: RememberedLogits
    _has_untrained_part: bool | None = None  # None: not determined yet

    @property
    @abstractmethod
    def uses_teacher(self) -> bool:
        """Whether the loss reads the teacher's outputs."""

    @property
    @abstractmethod
    def teacher_changes(self) -> bool:
        """Whether the teacher changes during training."""

    @property
    @abstractmethod
    def teacher_version(self) -> int:
        """Counter that increases whenever the teacher's parameters or buffers are modified in place."""

    @property
    @abstractmethod
    def distill_name(self) -> str:
        """Name of the distillation loss in logs."""

    @abstractmethod
    def teacher_outputs(self, batch: Batch) -> Outputs:
        """Compute the outputs of the teacher.

        Args:
            batch: One batch, normalized for the student.
        """

    @abstractmethod
    def _weighted_terms(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted terms of the criterion."""

    @abstractmethod
    def _overrides(self, *methods: str) -> list[str]:
        """Return which of the given methods are overridden in a subclass of `DistillModule`."""

    @abstractmethod
    def _set_normalizer(self) -> None:
        """Set the conversion of the student's input to the normalization of the teacher, if they differ."""

    def make_metrics(self) -> dict[str, Metric]:
        """Create the metrics of `ClassificationModule`, those of the teacher, and the agreement of both networks."""
        teacher = {f"teacher_{name}": metric for name, metric in self.task.metrics().items()}
        return {**super().make_metrics(), **teacher, "agreement": Accuracy()}

    @property
    def validates_criterion(self) -> bool:
        """Whether the criterion is evaluated in validation and test.

        It is not evaluated if `distill_weight` is 0, or if it requires something that evaluation batches lack: several
        views of an image, indices of training images (`CRD`, whose memory banks hold only these), or a teacher. For
        criteria with a fixed batch size (`SemCKD`), batches of a different size are skipped.
        """
        lacks = self.criterion.num_views > 1 or self.criterion.needs_index
        has_teacher = not self.uses_teacher or "teacher" in self.network_names
        return bool(self.distill_weight) and has_teacher and not (lacks and not self._overrides("distill_loss"))

    @property
    def criterion_curve(self) -> str:
        """Name of the total distillation loss among the metrics."""
        return self.distill_name or SUM

    @property
    def curve_names(self) -> list[str]:
        """Names of the total distillation loss and of the criteria in sums; names of terms start with one of them."""
        sums = [part for part in self.criterion.modules() if isinstance(part, WeightedSum)]
        return [self.criterion_curve, *(name for part in sums for name in part.criteria)]

    @property
    def main_metric(self) -> str | None:
        """Name of the main metric: that of the task, or the distillation loss if the logits are not trained.

        None if the logits are not trained and the distillation loss is not evaluated.
        """
        if self.trains_logits:
            return self.task.metric
        return self.criterion_curve if self.validates_criterion else None

    def is_loss(self, curve: str) -> bool:
        """Return whether lower values of a logged metric are better, as for losses and the terms of the criterion.

        Args:
            curve: Name of the metric, such as `val/kd`.
        """
        name, terms = curve.partition("/")[2], self.curve_names
        return super().is_loss(curve) or any(name == term or name.startswith(f"{term}_") for term in terms)

    @property
    def trains_logits(self) -> bool:
        """Whether the loss trains all parameters that the logits depend on.

        This is determined once per run, before it starts, since a `Schedule` may change `hard_weight` later. If
        `hard_weight` is 0, a blank batch is passed through student, teacher and criterion, with gradients. The value is
        True if no example input is known, and for overridden losses (`losses`, `training_values` or `training_step`).
        """
        if self._has_untrained_part is not None:
            return not self._has_untrained_part
        found = False if self.hard_weight else self._try_loss()
        if self._trainer is not None and self._trainer.state.status == TrainerStatus.RUNNING:
            self._has_untrained_part = found
        return not found

    def teardown(self, stage: str) -> None:
        """Reset `trains_logits`, which is determined again for the next run."""
        self._has_untrained_part = None

    def _try_loss(self) -> bool | None:
        """Return whether a part that the logits depend on is not trained; None if no example input is known."""
        example = self.example_input()
        own = [getattr(type(self), name).__module__ for name in ("losses", "training_values", "training_step")]
        if example is None or not all(name.startswith("lkd.") for name in own):
            return None if example is None else False
        self._set_normalizer()
        self.configure_model()
        if self.criterion.needs_build and not self._built:
            return None
        terms = self._criterion_meter.recorded = {}
        try:
            with (
                devices.isolated_random_numbers(device_of(self.model)),
                evaluating(self),
                torch.inference_mode(False),
                torch.enable_grad(),
            ):
                logits = self.update_metrics(deepcopy(self.stage_metrics("val")), self._blank_batch(example))
                return has_untrained_part(logits, torch.stack(list(terms.values())).sum(), self.parameters())
        except Exception as error:  # a custom criterion may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            rank_zero_warn(
                f"cannot determine whether the loss trains the logits, so val/{self.task.metric} is logged ({reason})"
            )
            return False
        finally:
            self._criterion_meter.recorded = None
            self.student_extractor.clear()  # features with a graph would prevent copying the module

    def _blank_batch(self, example: Any) -> Batch:
        """Create a batch of copies of an input, with labels and indices; criteria may compare images of a batch."""
        views = self.criterion.num_views
        images = tree_map_only(Tensor, lambda leaf: torch.cat([leaf] * views * _BLANK), example)
        with torch.no_grad():
            target = self.task.blank_target(self(images))
        index = torch.zeros(views * _BLANK, dtype=torch.int64, device=device_of(self.model))
        return Batch(images, target, index, views)

    def _isolated(self) -> AbstractContextManager[None]:
        return devices.isolated_random_numbers(device_of(self.model))

    def _can_replay(self, batch: Batch) -> bool:
        return not self.validates_criterion or self._criterion_meter.is_tried(batch.size)

    def update_metrics(self, metrics: MutableMapping[str, Metric], batch: Batch) -> Tensor:
        """Evaluate student, teacher and criterion on one batch."""
        self.student_extractor.clear()
        logits = super().update_metrics(metrics, batch)
        teacher = NO_OUTPUTS
        if "teacher" in self.network_names:
            teacher = self._evaluated_teacher(batch)
            self._compare(metrics, logits, teacher.logits, batch.target)
        self.measure_criterion(
            metrics, batch, lambda: self._weighted_terms(self.student_extractor.outputs(logits), teacher, batch)
        )
        return logits

    def network_logits(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the logits of the teacher, if there is one, and of the student."""
        teacher = {"teacher": self.teacher_outputs(batch).logits} if "teacher" in self.network_names else {}
        logits = {**teacher, **super().network_logits(batch)}
        self.student_extractor.clear()
        return logits

    def _compare(self, metrics: Mapping[str, Metric], student: Tensor, teacher: Tensor, target: Tensor) -> None:
        num_classes = self.task.num_outputs(teacher)
        if num_classes != self.task.num_outputs(student):
            return
        self.task.update({name: metrics[f"teacher_{name}"] for name in self.task_metrics}, teacher, target)
        self._num_classes = num_classes
        choice, teacher_choice = self.task.choice(student, target), self.task.choice(teacher, target)
        if choice is not None and teacher_choice is not None:
            metrics["agreement"].update(choice, teacher_choice)

    def measure_criterion(
        self, metrics: MutableMapping[str, Metric], batch: Batch, terms: Callable[[], dict[str, Tensor]]
    ) -> None:
        """Evaluate the criterion on one batch, if possible (see `validates_criterion`).

        Args:
            metrics: Metrics of the stage by name; metrics of the terms are added to it.
            batch: The batch.
            terms: Function that computes the weighted terms from the outputs of the networks in eval mode.
        """
        is_trial = self._criterion_meter.recorded is not None
        size = batch.size
        sizes = {getattr(part, "batch_size", None) for part in self.criterion.modules()} - {None}
        if is_trial or (self.validates_criterion and sizes <= {size}):
            weight = self.task.labelled(batch.target) if self.criterion.skips_unlabelled else size
            self._criterion_meter.update(metrics, lambda: with_total(terms(), self.criterion_curve), size, weight)

    def _evaluated_teacher(self, batch: Batch) -> Outputs:
        """Return the teacher's outputs for an evaluation batch.

        Validation images are the same in each epoch, so the logits of a frozen teacher are computed once and reused.
        """
        index, trainer = batch.index, self._trainer
        if (
            trainer is None
            or trainer.state.fn != TrainerFn.FITTING
            or len(trainer.num_val_batches) != 1
            or batch.version is None  # data from outside lkd may differ between epochs
            or index is None
            or not index.is_cpu  # reading it would synchronize with the GPU; running the teacher is faster
            or self.teacher_changes
            or self._overrides("teacher_outputs", "teacher_input")
            or (self.criterion.teacher_layers and self.validates_criterion)
        ):
            return self.teacher_outputs(batch)
        name = (index.numpy().tobytes(), self.teacher_version)
        return self._remembered.outputs(name, lambda: self.teacher_outputs(batch))

    def on_validation_epoch_end(self) -> None:
        """Before the first epoch, print the teacher's main metric, and warn if it is near chance."""
        super().on_validation_epoch_end()
        metric = self.stage_metrics("val")[f"teacher_{self.task.metric}"]
        if not self.trainer.sanity_checking or not metric.update_called:
            return
        score = float(metric.compute())
        images = images_measured(self.trainer, "val")
        title, shown = self.task.metric_title, self.task.formatted(score)
        self.print(f"Teacher {title} on {images}: {shown}")
        chance = None if self._num_classes is None else self.task.chance(self._num_classes)
        if chance is not None and score - chance < 0.1 * (1 - chance):
            weights = "its weights (teacher_ckpt)"
            if not self.hparams.get("teacher_ckpt"):
                weights = "the weights with which it was created, as teacher_ckpt is not set"
            rank_zero_warn(
                f"the teacher's {title} on {images} is {shown}, which is near chance "
                f"({self.task.formatted(chance)}); check {weights}, the order of its classes and its input "
                "normalization (teacher_normalization)"
            )
