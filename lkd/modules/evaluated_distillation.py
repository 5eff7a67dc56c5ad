"""Measuring a distillation in validation and test."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

from lkd import devices
from lkd.datamodules.limits import images_measured
from lkd.features.extractor import FeatureTaps
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
from lkd.modules.meter import Accuracy
from lkd.types import IGNORE_INDEX, Batch, Normalization, Outputs

NO_ANSWER = Outputs(torch.empty(0), {})
"""What a criterion that asks no teacher is given as the teacher's outputs."""
_BLANK = 4
"""Images in the batch that a loss is tried with."""


class EvaluatedDistillation(ClassificationModule):
    """The part of a `DistillModule` that measures student, teacher and criterion."""

    logit_metrics: tuple[str, ...] = ("loss", "acc", "agreement")
    criterion: DistillLoss
    distill_weight: float
    hard_weight: float
    student_taps: FeatureTaps
    teacher_normalization: Normalization | None
    _built: bool = False
    _criterion_meter: CriterionMeter
    _remembered: RememberedLogits
    _has_untrained_part: bool | None = None  # None: not known yet

    @property
    @abstractmethod
    def asks_teacher(self) -> bool:
        """Whether the loss reads the teacher's answers."""

    @property
    @abstractmethod
    def teacher_changes(self) -> bool:
        """Whether the teacher is not frozen."""

    @property
    @abstractmethod
    def teacher_version(self) -> int:
        """A number that rises whenever the teacher's weights or statistics are changed in place."""

    @property
    @abstractmethod
    def distill_name(self) -> str:
        """What the distillation's term is called in logs."""

    @abstractmethod
    def teacher_outputs(self, batch: Batch) -> Outputs:
        """What the teacher says of a batch.

        Args:
            batch: One batch, normalised for the student.
        """

    @abstractmethod
    def _weighted_terms(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms of the criterion."""

    @abstractmethod
    def _overrides(self, *methods: str) -> list[str]:
        """Those of some methods that a subclass of `DistillModule` overrides."""

    @abstractmethod
    def _renormalize(self, teacher: Normalization) -> None:
        """Find out how the teacher's images are made from the student's."""

    def make_metrics(self) -> dict[str, Metric]:
        """Those of `ClassificationModule`, the teacher's accuracy, and the agreement with it."""
        return {**super().make_metrics(), "teacher_acc": Accuracy(), "agreement": Accuracy()}

    @property
    def validates_criterion(self) -> bool:
        """Whether the criterion is measured in validation and test.

        It is not if it needs what evaluation batches lack: several views of an image, positions among the training
        images (`CRD`, whose memories have no others), or a teacher. Batches of another size than the one that a
        criterion is made for (`SemCKD`) are left out.
        """
        lacks = self.criterion.num_views > 1 or self.criterion.needs_index
        has_teacher = not self.asks_teacher or "teacher" in self.network_names
        return bool(self.distill_weight) and has_teacher and not (lacks and not self._overrides("distill_loss"))

    @property
    def criterion_curve(self) -> str:
        """The name of the whole distillation loss among the metrics."""
        return self.distill_name or SUM

    @property
    def main_metric(self) -> str | None:
        """`acc`; where the loss does not train the logits, the distillation loss; None if that is not measured."""
        if self.trains_logits:
            return "acc"
        return self.criterion_curve if self.validates_criterion else None

    def is_loss(self, curve: str) -> bool:
        """Whether lower values of a curve are better: of a loss, and of the criterion's terms.

        Args:
            curve: Its name, such as `val/kd`.
        """
        sums = [part for part in self.criterion.modules() if isinstance(part, WeightedSum)]
        terms = [self.criterion_curve, *(name for part in sums for name in part.criteria)]
        name = curve.partition("/")[2]
        return super().is_loss(curve) or any(name == term or name.startswith(f"{term}_") for term in terms)

    @property
    def trains_logits(self) -> bool:
        """Whether the loss trains all that the logits depend on.

        This is found out once in a run, before it starts: a `Schedule` may begin with labels that do not count. With a
        `hard_weight` of 0, a blank batch runs through student, teacher and criterion, with gradients. It is True while
        no input is known to try it with, and for a loss of your own (`losses`, `training_values` or `training_step`).
        """
        if self._has_untrained_part is not None:
            return not self._has_untrained_part
        found = False if self.hard_weight else self._try_loss()
        if self._trainer is not None and self._trainer.state.status == TrainerStatus.RUNNING:
            self._has_untrained_part = found
        return not found

    def teardown(self, stage: str) -> None:
        """Let the next run find out anew whether the loss trains the logits."""
        self._has_untrained_part = None

    def _try_loss(self) -> bool | None:
        """Whether a part that the logits depend on is not trained; None if there is no input to try it with."""
        example = self.example_input()
        own = [getattr(type(self), name).__module__ for name in ("losses", "training_values", "training_step")]
        if example is None or not all(name.startswith("lkd.") for name in own):
            return None if example is None else False
        if self.teacher_normalization is not None:
            self._renormalize(self.teacher_normalization)
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
        except Exception as error:  # whatever the criterion of a user raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            rank_zero_warn(f"it is not known whether the loss trains the logits, so val/acc is logged ({reason})")
            return False
        finally:
            self._criterion_meter.recorded = None
            self.student_taps.clear()  # features with their graph: the module could not be copied

    def _blank_batch(self, example: Any) -> Batch:
        """Some copies of an input, with labels and positions: criteria may compare images with each other."""
        views = self.criterion.num_views
        images = tree_map_only(Tensor, lambda leaf: torch.cat([leaf] * views * _BLANK), example)
        zeros = torch.zeros(views * _BLANK, dtype=torch.int64, device=device_of(self.model))
        return Batch(images, zeros, zeros, views)

    def _evaluate(self, stage: str, batch: Any) -> None:
        """Measure one batch; what a criterion draws at random is not taken from the training."""
        with self._isolated() if self.validates_criterion else nullcontext():
            super()._evaluate(stage, batch)

    def _isolated(self) -> AbstractContextManager[None]:
        return devices.isolated_random_numbers(device_of(self.model))

    def _can_replay(self, batch: Batch) -> bool:
        return not self.validates_criterion or self._criterion_meter.is_tried(len(batch.target))

    def update_metrics(self, metrics: MutableMapping[str, Metric], batch: Batch) -> Tensor:
        """Measure student, teacher and criterion on one batch."""
        self.student_taps.clear()
        logits = super().update_metrics(metrics, batch)
        teacher = NO_ANSWER
        if "teacher" in self.network_names:
            teacher = self._evaluated_teacher(batch)
            self._compare(metrics, logits, teacher.logits, batch.target)
        self.measure_criterion(
            metrics, batch, lambda: self._weighted_terms(self.student_taps.outputs(logits), teacher, batch)
        )
        return logits

    def _compare(self, metrics: Mapping[str, Metric], student: Tensor, teacher: Tensor, target: Tensor) -> None:
        if teacher.shape[1] == student.shape[1]:
            choice = teacher.argmax(1)
            metrics["teacher_acc"].update(choice, target)
            metrics["agreement"].update(student, choice.masked_fill(target == IGNORE_INDEX, IGNORE_INDEX))
            self._num_classes = teacher.shape[1]

    def measure_criterion(
        self, metrics: MutableMapping[str, Metric], batch: Batch, terms: Callable[[], dict[str, Tensor]]
    ) -> None:
        """Measure the criterion on one batch, unless it cannot be: see `validates_criterion`.

        Args:
            metrics: One stage's metrics by name, which those of the terms are added to.
            batch: The batch.
            terms: Computes the weighted terms from the outputs of networks in eval mode.
        """
        is_tried_out = self._criterion_meter.recorded is not None
        size = len(batch.target)
        sizes = {getattr(part, "batch_size", None) for part in self.criterion.modules()} - {None}
        if is_tried_out or (self.validates_criterion and sizes <= {size}):
            weight = (batch.target != IGNORE_INDEX).sum() if self.criterion.skips_unlabelled else size
            self._criterion_meter.update(metrics, lambda: with_total(terms(), self.criterion_curve), size, weight)

    def _evaluated_teacher(self, batch: Batch) -> Outputs:
        """The teacher's outputs for a batch of evaluation.

        The validation images are the same in every epoch, and so are a frozen teacher's logits.
        """
        index, trainer = batch.index, self._trainer
        if (
            trainer is None
            or trainer.state.fn != TrainerFn.FITTING
            or len(trainer.num_val_batches) != 1
            or batch.version is None  # not lkd's data: it may differ from epoch to epoch
            or index is None
            or not index.is_cpu  # to look at it would make the host wait for a GPU, which asks the teacher sooner
            or self.teacher_changes
            or self._overrides("teacher_outputs", "teacher_input")
            or (self.criterion.teacher_layers and self.validates_criterion)
        ):
            return self.teacher_outputs(batch)
        name = (index.numpy().tobytes(), self.teacher_version)
        return self._remembered.outputs(name, lambda: self.teacher_outputs(batch))

    def on_validation_epoch_end(self) -> None:
        """Before the first epoch, say how good the teacher is."""
        super().on_validation_epoch_end()
        metric = self.stage_metrics("val")["teacher_acc"]
        if not self.trainer.sanity_checking or not metric.update_called:
            return
        acc = float(metric.compute())
        chance = 1 / self._num_classes
        images = images_measured(self.trainer, "val")
        self.print(f"The teacher's accuracy on {images}: {acc:.2%}")
        if acc - chance < 0.1 * (1 - chance):
            rank_zero_warn(
                f"the teacher's accuracy on {images} is {acc:.2%}, near chance ({chance:.2%}): "
                "its weights may be untrained (teacher_ckpt), its classes in another order, or its images normalised "
                "otherwise (teacher_normalization)"
            )
