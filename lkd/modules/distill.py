"""Training a student to imitate a frozen teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD

from lkd.features.extractor import FeatureTaps
from lkd.features.layers import device_of
from lkd.losses import KD, DistillLoss, named_terms
from lkd.losses.base import RESERVED, buffers_same_everywhere, check_criterion
from lkd.models import load_weights
from lkd.modules.classification import FROM_DATA, RUNNING_HOOK
from lkd.modules.criterion_meter import CriterionMeter, RememberedLogits
from lkd.modules.evaluated_distillation import NO_ANSWER, EvaluatedDistillation
from lkd.schedules.relative import Interval
from lkd.types import Batch, Normalization, Outputs, Probe


class DistillModule(EvaluatedDistillation):
    """Train a student with labels and with a teacher's answers.

    The loss is `hard_weight * cross-entropy + distill_weight * criterion`. The teacher is frozen, always in eval
    mode, and neither in the optimizer nor in checkpoints nor in DDP's synchronisation. The student is `self.model`
    (and `self.student`), so a checkpoint's weights serve as another run's teacher.

    With a weight of 0, what only that part of the loss would reach (the classifier, where features alone are compared;
    the criterion's adapters) has a gradient of 0 rather than none, in one process as in several: weight decay goes on.

    To shard a student too large for one device, override `configure_model`: first `super().configure_model()`, then
    PyTorch's `fully_shard(self.model, mesh=self.device_mesh["data_parallel"])`; with Lightning's
    `ModelParallelStrategy(data_parallel_size, 1)`. The teacher stays whole in every process.

    To write a method of one's own, override `distill_loss`, or write a `DistillLoss` and pass it as `criterion`.

    Beside `ClassificationModule`'s curves:

    - `train/hard` and `train/<criterion>`: the terms of the loss, multiplied by `hard_weight` and `distill_weight`;
    - `val/<criterion>`: the criterion in eval mode on the validation images, multiplied by `distill_weight` as in
      training. Where it has several terms, each has a curve (`val/<criterion>_<term>`) and `val/<criterion>` is their
      sum; the sum of a `WeightedSum` is `val/distill`. `validates_criterion` tells which criteria have no such curve.
      In several processes, an image that fills up the last batch counts twice here, but in no other metric;
    - `val/teacher_acc`, and `val/agreement`: the share of images for which student and teacher choose the same class.

    The loss may leave a part of the student untrained that its logits depend on: its classifier where `hard_weight` is
    0 and the criterion compares features. Then no metric of the logits is logged, neither accuracy nor cross-entropy
    nor agreement, and the best checkpoint is the one with the lowest `val/<criterion>`. `lkd.callbacks.KNN` and
    `LinearProbe` measure the features.

    In validation the teacher's logits are computed once where the data tells that its images do not change, and up to
    256 MiB of them are remembered. A criterion that reads the teacher's features costs a pass of the teacher over the
    validation images each time, as does validation on a GPU that makes the batches itself.

    Args:
        student: The network in training; returns logits `(B, K)`.
        teacher: The network to imitate; returns logits `(B, K)`. None, for criteria that ask none (`TfKD`, `USKD`).
        criterion: What the student imitates; None: `KD(temperature=4.0)`.
        teacher_ckpt: File with the teacher's weights: anything that `lkd.models.load_weights` reads. None: the
            teacher is taken as it is.
        student_ckpt: File with weights for the student to start from.
        distill_weight: Weight of the criterion, at least 0.
        hard_weight: Weight of the cross-entropy with the labels, at least 0; 0: labels are not used.
        teacher_normalization: How the teacher wants its images normalised, if not as the datamodule does it.
        optimizer: Makes the optimizer from the parameters that train (the student's and the criterion's).
        lr_scheduler: Makes the learning rate's schedule from the optimizer; None: constant. `lkd.schedules` has
            schedules that follow the length of the run.
        label_smoothing: Share of the target's probability spread over all classes, in [0, 1).
        lr_scheduler_interval: Whether the schedule is stepped after each `epoch` or each optimizer `step`.

    Raises:
        ValueError: If a weight is negative or both are 0, the criterion needs a teacher and there is none, or a file's
            weights do not fit.

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531).
    """

    network_names: tuple[str, ...] = ("student", "teacher")
    saves_teacher: ClassVar[bool] = False
    """Whether checkpoints hold the teacher, and processes share its statistics: for one that changes."""
    teacher: nn.Module | None
    recall: Callable[[Batch, Callable[[Batch], Outputs]], Outputs] | None = None
    """Stands between training and `teacher_outputs`, its second argument: for a callback that keeps answers."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        criterion: DistillLoss | None = None,
        teacher_ckpt: str | None = None,
        student_ckpt: str | None = None,
        distill_weight: float = 0.9,
        hard_weight: float = 0.1,
        teacher_normalization: Normalization | None = None,
        optimizer: OptimizerCallable = lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        lr_scheduler_interval: Interval = "epoch",
    ) -> None:
        super().__init__(student, optimizer, lr_scheduler, label_smoothing, student_ckpt, lr_scheduler_interval)
        for name, weight in (("distill_weight", distill_weight), ("hard_weight", hard_weight)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must not be negative, got {weight}; take a finite number from 0 on")
        if distill_weight == hard_weight == 0:
            raise ValueError("distill_weight and hard_weight are both 0, so there is nothing to learn; set one of them")
        self.criterion = criterion if criterion is not None else KD(temperature=4.0)
        check_criterion(type(self).__name__, self.criterion)
        self.teacher = _load_teacher(teacher, teacher_ckpt)
        if self.teacher is None:
            self.network_names = ("student",)
        if self.distill_name in RESERVED:
            raise ValueError(
                f"the criterion {type(self.criterion).__name__} would be logged as {self.distill_name!r}, the name of "
                "another curve; call the class otherwise"
            )
        self.distill_weight, self.hard_weight = distill_weight, hard_weight
        self.teacher_normalization = teacher_normalization
        self.criterion.locate(self.student, self.teacher)
        self.student_taps = FeatureTaps(self.student, self.criterion.student_layers)
        self.teacher_taps = None if self.teacher is None else FeatureTaps(self.teacher, self.criterion.teacher_layers)
        self.teacher_scale: Tensor | None = None
        self.teacher_shift: Tensor | None = None
        self._criterion_meter = CriterionMeter()
        self._freeze_teacher()

    @property
    def student(self) -> nn.Module:
        """The network in training."""
        return self.model

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the teacher out of the module's tree: what walks it (DDP, averaging, `unfreeze`) is not to meet it."""
        if name == RUNNING_HOOK or (name == "teacher" and not self.saves_teacher):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistillModule:
        """Move and cast the teacher, and what normalises its images, with the module."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.teacher is not None and not self.saves_teacher:
            self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.teacher_scale is not None and self.teacher_shift is not None:
            self.teacher_scale, self.teacher_shift = fn(self.teacher_scale), fn(self.teacher_shift)
        return self

    def _freeze_teacher(self) -> None:
        if self.teacher is not None:
            self.teacher.requires_grad_(False).eval()
        elif self.asks_teacher:
            raise ValueError(
                f"the criterion {type(self.criterion).__name__} compares the student with a teacher, and there is "
                "none; give a teacher"
            )

    def train(self, mode: bool = True) -> DistillModule:
        """Set the mode of everything but the teacher, which stays in eval."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @property
    def asks_teacher(self) -> bool:
        """Whether the loss reads the teacher's answers."""
        return self.criterion.needs_teacher or self._is_overridden

    @property
    def _is_overridden(self) -> bool:
        return bool(self._overrides("distill_loss"))

    def _overrides(self, *methods: str) -> list[str]:
        return [name for name in methods if getattr(type(self), name) is not getattr(DistillModule, name)]

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits `(B, K)`; the weighted terms `hard` and those of the criterion."""
        student = self.student_outputs(batch)
        terms = {}
        if self.hard_weight:
            terms["hard"] = self.hard_weight * self._labels_loss(student.logits, batch)
        if self.distill_weight:
            self._check_batch(batch)
            teacher = NO_ANSWER
            if self.asks_teacher:
                with torch.no_grad():  # not inference_mode: its tensors cannot be saved for backward
                    teacher = self._teacher_answer(batch)
                self.watch("teacher", teacher.logits)
            terms |= self._weighted_terms(student, teacher, batch)
        self._reach_all(terms, student.logits)
        return student.logits, terms

    def _weighted_terms(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        loss = self.distill_loss(student, teacher, batch)
        return {name: self.distill_weight * term for name, term in named_terms(self.distill_name, loss).items()}

    def _teacher_answer(self, batch: Batch) -> Outputs:
        return self.teacher_outputs(batch) if self.recall is None else self.recall(batch, self.teacher_outputs)

    @property
    def teacher_changes(self) -> bool:
        """Whether the teacher is not frozen."""
        parameters = () if self.teacher is None else self.teacher.parameters()
        return self.saves_teacher or any(parameter.requires_grad for parameter in parameters)

    @property
    def teacher_version(self) -> int:
        """A number that rises whenever the teacher's weights or statistics are changed in place."""
        if self.teacher is None:
            return 0
        tensors = chain(self.teacher.parameters(), self.teacher.buffers())
        return sum(tensor._version for tensor in tensors if not tensor.is_inference())

    @property
    def not_to_be_kept(self) -> str:
        """Why the teacher's answers to an image cannot be kept as logits; empty if they can."""
        name = type(self).__name__
        if self.teacher is None or not self.asks_teacher:
            return "the loss asks no teacher"
        if self.teacher_changes:
            return f"the teacher of {name} changes"
        if own := self._overrides("teacher_outputs", "teacher_input", "losses"):
            return f"{name} makes them in its own way ({own[0]})"
        if self.criterion.teacher_layers:
            layers = ", ".join(self.criterion.teacher_layers)
            return f"the criterion {type(self.criterion).__name__} reads the teacher's layers {layers}, not only logits"
        return ""

    def _reach_all(self, terms: dict[str, Tensor], *logits: Tensor) -> None:
        """Give what a weight of 0 leaves out a gradient of 0: DDP waits for every parameter's.

        One process does it too, or weight decay and momentum would move there other parameters than in several.
        """
        if not terms:
            raise ValueError(
                "distill_weight and hard_weight are both 0 in this step, so there is nothing to learn; let a Schedule "
                "begin above 0, or keep the other weight above 0 meanwhile"
            )
        silent = [] if self.hard_weight else list(logits)
        silent += [] if self.distill_weight else list(self.criterion.parameters())
        if silent:
            first = next(iter(terms))
            terms[first] = terms[first] + 0 * torch.stack([tensor.float().sum() for tensor in silent]).sum()

    def _check_batch(self, batch: Batch) -> None:
        name = type(self.criterion).__name__
        if self.criterion.needs_index and batch.index is None:
            raise ValueError(
                f"criterion {name} needs sample indices; this datamodule's batches have none: let them be "
                "(input, target, index), with the sample's position in the data set"
            )
        if self.criterion.num_views > 1 and batch.views != self.criterion.num_views:
            raise ValueError(
                f"criterion {name} reads {self.criterion.num_views} views of each image, and this datamodule's batches "
                f"have {batch.views}: set its `views`, as the method's file in configs/methods/ does"
            )

    def distill_loss(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor | dict[str, Tensor]:
        """Compare student and teacher; by default the criterion does it.

        Args:
            student: What the student answered.
            teacher: What the teacher answered, without gradient.
            batch: The batch that both saw.

        Returns:
            A scalar, or named scalars that are added.
        """
        loss: Tensor | dict[str, Tensor] = self.criterion(student, teacher, batch)
        return loss

    @property
    def distill_name(self) -> str:
        """What the distillation's term is called in logs."""
        return "distill" if self._is_overridden else self.criterion.name

    def student_outputs(self, batch: Batch) -> Outputs:
        """What the student says of a batch, in training; override it for one whose answer is made otherwise.

        Args:
            batch: One batch.
        """
        return self.student_taps(batch.input)

    def teacher_outputs(self, batch: Batch) -> Outputs:
        """What the teacher says of a batch; override it for several teachers, or one that changes.

        Args:
            batch: One batch, normalised for the student.
        """
        if self.teacher_taps is None:
            raise ValueError(f"{type(self).__name__} has no teacher; override teacher_outputs, or give one")
        return self.teacher_taps(self.teacher_input(batch.input))

    def teacher_input(self, input: Any) -> Any:
        """The student's input, normalised as the teacher wants it.

        Raises:
            ValueError: If that needs a data module's mean and std, and no Trainer has brought one yet.
        """
        if self.teacher_scale is not None:
            return input * self.teacher_scale + self.teacher_shift
        if self.teacher_normalization is not None:
            raise ValueError(
                "teacher_normalization needs the mean and std of a data module, which a Trainer brings; without one, "
                "override teacher_input, or leave teacher_normalization out and normalise as the teacher wants it"
            )
        return input

    def configure_model(self) -> None:
        """Build for callbacks that copy the module before `setup` is called: Lightning's weight averaging."""
        if not self._built and (example := self.example_input()) is not None:
            self.build(example)

    @property
    def only_labels(self) -> bool:
        """Whether the criterion has no weight."""
        return not self.distill_weight

    def setup(self, stage: str) -> None:
        """Check that networks, criterion and data fit before anything runs."""
        if self.teacher_normalization is not None:
            self._renormalize(self.teacher_normalization)
        super().setup(stage)
        self._remembered, self.recall, self._criterion_meter = RememberedLogits(), None, CriterionMeter()
        if not self._built and self.criterion.needs_build and self.example_input() is None:
            raise ValueError(
                f"{type(self.criterion).__name__} builds its adapters from the shape of the input, which is not known; "
                "use a datamodule with `input_shape` or `example_input`, or set the module's `example_input_array`"
            )
        self._check_hidden()
        _ = self.trains_logits  # found out here, before a strategy shards the weights

    def _check_hidden(self) -> None:
        if self.teacher is None or self.saves_teacher:
            return
        hidden = {id(tensor) for tensor in chain(self.teacher.parameters(), self.teacher.buffers())}
        for name, tensor in chain(self.named_parameters(), self.named_buffers()):
            if id(tensor) in hidden:
                raise ValueError(
                    f"{name} is the teacher's, and would get into training and checkpoints; what shall train needs a "
                    "copy (copy.deepcopy), what shall only be read goes into a tuple, where PyTorch does not find it"
                )

    def _renormalize(self, teacher: Normalization) -> None:
        mean, std = self._data_attribute("mean"), self._data_attribute("std")
        if mean is None or std is None:
            raise ValueError(
                "teacher_normalization needs to know how the data is normalised; use a datamodule with `mean` and `std`"
            )
        if len(mean) != len(teacher.mean):
            raise ValueError(
                f"teacher_normalization has {len(teacher.mean)} channels, the data has {len(mean)}; give one mean and "
                "one std per channel"
            )
        data_mean, data_std, teacher_mean, teacher_std = (
            torch.tensor(values, device=device_of(self.model)).view(1, -1, 1, 1)
            for values in (mean, std, teacher.mean, teacher.std)
        )
        self.teacher_scale = data_std / teacher_std
        self.teacher_shift = (data_mean - teacher_mean) / teacher_std

    def build(self, example: Any) -> None:
        """Check both networks on a blank input, and let the criterion build its adapters."""
        student = self.probe("student", self.student_taps, example)
        teacher = Probe(nn.Identity(), NO_ANSWER)
        if self.teacher_taps is not None:
            compared = bool(self.criterion.reads_logits and self.distill_weight)
            teacher = self.probe("teacher", self.teacher_taps, example, is_classifier=compared)
            self._check_classes(student, teacher, compared)
        self.build_criterion(student, teacher)

    def build_criterion(self, *probes: Probe) -> None:
        """Let the criterion make its adapters, the first time."""
        if self._built:
            return
        for part in self.criterion.modules():
            for name in FROM_DATA:
                if getattr(part, name, 0) is None:
                    setattr(part, name, self._data_attribute(name))
        if self._awaits_checkpoint:
            return
        with torch.device(device_of(self.model)):  # wherever tensors are made by default at this moment
            self.criterion.build(*probes)
        self._ddp_params_and_buffers_to_ignore = buffers_same_everywhere(self)
        self._built = True

    @property
    def _awaits_checkpoint(self) -> bool:
        """Whether, in a test, only a checkpoint can tell how many images there are: no training images are opened."""
        unknown = any(getattr(part, "num_samples", 0) is None for part in self.criterion.modules())
        return unknown and self._trainer is not None and not self._trainer.training

    def _check_classes(self, student: Probe, teacher: Probe, compared: bool) -> None:
        ours, theirs = (probe.outputs.logits.shape[1] for probe in (student, teacher))
        if ours != theirs and compared:
            raise ValueError(
                f"the student has {ours} classes, the teacher {theirs}; {type(self.criterion).__name__} compares their "
                "logits and needs the same classes in both: set the same num_classes"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """As in `ClassificationModule`; where the logits are not trained, a schedule does not wait for `val/loss`."""
        made = super().configure_optimizers()
        schedule = made.get("lr_scheduler") if isinstance(made, dict) else None
        if isinstance(schedule, dict) and schedule.get("monitor") == "val/loss" and not self.trains_logits:
            schedule["monitor"] = f"val/{self.criterion_curve}"
        return made


def _load_teacher(teacher: nn.Module | None, path: str | None) -> nn.Module | None:
    if path is None:
        return teacher
    if teacher is None:
        raise ValueError(f"teacher_ckpt {path!r} has weights for a teacher, but there is none; give a teacher")
    return load_weights(teacher, path)
