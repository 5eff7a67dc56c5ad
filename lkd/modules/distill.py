"""Training a student to imitate a frozen teacher."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lkd._compat import apply_to_tensors, modifications
from lkd._moved import former_members
from lkd.features.extractor import FeatureExtractor, tensors_in
from lkd.features.layers import device_of
from lkd.losses import KD, DistillLoss, named_terms
from lkd.losses.base import RESERVED, buffers_same_everywhere, check_criterion
from lkd.models import load_weights
from lkd.modules.checks import check_batch, check_not_reserved, check_not_shared, check_same_classes, check_weights
from lkd.modules.classification import FROM_DATA
from lkd.modules.criterion_meter import CriterionMeter, RememberedLogits
from lkd.modules.evaluated_distillation import NO_OUTPUTS, EvaluatedDistillation
from lkd.modules.normalization import InputNormalizer
from lkd.types import Batch, Normalization, Outputs, Probe


@former_members(not_to_be_kept="cache_obstacle", recall="teacher_cache")
class DistillModule(EvaluatedDistillation):
    """Train a student with labels and with a frozen teacher.

    The loss is `hard_weight * cross-entropy + distill_weight * criterion`. The teacher is frozen, always in eval mode,
    and excluded from the optimizer, the checkpoint and DDP synchronization. The student is stored as `self.model`, with
    `self.student` as an alias, so a checkpoint of this module can provide the teacher of another run.

    To implement a new method, override `distill_loss`, or write a `DistillLoss` and pass it as `criterion`.

    Logged metrics, in addition to those of `ClassificationModule`: the weighted terms `train/hard` and
    `train/<criterion>`, `val/<criterion>`, `val/teacher_acc`, and `val/agreement`, the proportion of labelled images or
    pixels for which student and teacher predict the same class (see "Curves" in the documentation).

    Args:
        student: Network to train; returns logits `(B, K)`.
        teacher: Network to imitate; returns logits `(B, K)`. `None` for criteria without a teacher (`TfKD`, `USKD`).
        criterion: Distillation loss. `None` uses `KD(temperature=4.0)`.
        teacher_ckpt: File with the weights of the teacher, in any format that `lkd.models.load_weights` supports.
            `None` uses the teacher as given.
        student_ckpt: File with initial weights of the student.
        distill_weight: Weight of the criterion, at least 0.
        hard_weight: Weight of the cross-entropy with the labels, at least 0; with 0, labels are not used.
        teacher_normalization: Normalization of the teacher's input, if it differs from that of the data module.
        kwargs: Arguments of `ClassificationModule`, except `model` and `model_ckpt`. The optimizer receives the
            trainable parameters of student and criterion.

    Raises:
        FileNotFoundError: If a file with weights does not exist.
        ValueError: If a weight is negative or both are 0, if the criterion requires a teacher and there is none, or if
            the weights in a file do not match the network.

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531).
    """

    network_names: tuple[str, ...] = ("student", "teacher")
    replaced_arguments: tuple[str, ...] = ("model", "model_ckpt")
    saves_teacher: ClassVar[bool] = False
    """Whether the teacher changes, and is therefore saved in checkpoints and synchronized between processes."""
    teacher: nn.Module | None
    teacher_cache: Callable[[Batch, Callable[[Batch], Outputs]], Outputs] | None = None
    """Called in training instead of `teacher_outputs`, which is its second argument; set by the teacher cache."""

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
        **kwargs: Any,
    ) -> None:
        super().__init__(student, model_ckpt=student_ckpt, **kwargs)
        check_weights(distill_weight, hard_weight)
        self.criterion = criterion if criterion is not None else KD(temperature=4.0)
        check_criterion(type(self).__name__, self.criterion)
        self.teacher = _load_teacher(teacher, teacher_ckpt)
        if self.teacher is None:
            self.network_names = ("student",)
        self._reserved = frozenset((*RESERVED, *self.stage_metrics("val")))
        check_not_reserved(type(self.criterion).__name__, self.curve_names, self._reserved)
        self.distill_weight, self.hard_weight = distill_weight, hard_weight
        self.teacher_normalization = teacher_normalization
        self.criterion.resolve_layers(self.student, self.teacher)
        self.student_extractor = FeatureExtractor(self.student, self.criterion.student_layers, self.task.logits)
        self.teacher_extractor = (
            None
            if self.teacher is None
            else FeatureExtractor(self.teacher, self.criterion.teacher_layers, self.task.logits)
        )
        self._normalizer: InputNormalizer | None = None
        self._criterion_meter = CriterionMeter()
        self._freeze_teacher()

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the student's logits `(B, K)` and the weighted terms: `hard` and those of the criterion."""
        student = self.student_outputs(batch)
        terms = {}
        if self.hard_weight:
            terms["hard"] = self.hard_weight * self._labels_loss(student, batch)
        if self.distill_weight:
            check_batch(self.criterion, batch)
            teacher = NO_OUTPUTS
            if self.uses_teacher:
                with torch.no_grad():  # not inference_mode: its tensors cannot be saved for backward
                    teacher = self._cached_outputs(batch)
                self.watch("teacher", teacher.logits)
            terms |= self._weighted_terms(student, teacher, batch)
        self._reach_all(terms, *self._supervised_logits(student))
        return student.logits, terms

    def student_outputs(self, batch: Batch) -> Outputs:
        """Compute the outputs of the student in training; override this to change how they are computed.

        Args:
            batch: One batch.
        """
        return self.student_extractor(batch.input)

    def teacher_outputs(self, batch: Batch) -> Outputs:
        """Compute the outputs of the teacher; override this for several teachers or a changing one.

        Args:
            batch: One batch, normalized for the student.

        Raises:
            ValueError: If the module has no teacher.
        """
        if self.teacher_extractor is None:
            raise ValueError(f"{type(self).__name__} has no teacher; set `teacher`, or override teacher_outputs")
        return self.teacher_extractor(self.teacher_input(batch.input))

    def _cached_outputs(self, batch: Batch) -> Outputs:
        if self.teacher_cache is None:
            return self.teacher_outputs(batch)
        return self.teacher_cache(batch, self.teacher_outputs)

    def distill_loss(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor | dict[str, Tensor]:
        """Compute the distillation loss; by default, this calls the criterion.

        Args:
            student: Outputs of the student.
            teacher: Outputs of the teacher, without gradient.
            batch: The batch.

        Returns:
            A scalar, or a mapping from names to scalars, which are summed.
        """
        loss: Tensor | dict[str, Tensor] = self.criterion(student, teacher, batch)
        return loss

    def _weighted_terms(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self._logged_terms(self.distill_loss(student, teacher, batch))

    def _logged_terms(self, loss: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the terms of a distillation loss, multiplied by `distill_weight`, by their logged names.

        Args:
            loss: Return value of `distill_loss`.

        Raises:
            ValueError: If a name is reserved for another logged value.
        """
        terms = named_terms(self.distill_name, loss)
        check_not_reserved(type(self.criterion).__name__, terms, self._reserved)
        return {name: self.distill_weight * term for name, term in terms.items()}

    @property
    def student(self) -> nn.Module:
        """Student network."""
        return self.model

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the teacher out of the module tree, so that DDP, weight averaging, `unfreeze` etc. do not see it."""
        if name == "teacher" and not self.saves_teacher:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def apply_to_others(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move and cast the teacher and its input normalization together with the module."""
        if self.teacher is not None and not self.saves_teacher:
            apply_to_tensors(self.teacher, fn)
        if self._normalizer is not None:
            self._normalizer.apply(fn)

    def _freeze_teacher(self) -> None:
        if self.teacher is not None:
            self.teacher.requires_grad_(False).eval()
        elif self.uses_teacher:
            raise ValueError(
                f"the criterion {type(self.criterion).__name__} requires a teacher, but there is none; set `teacher`"
            )

    def train(self, mode: bool = True) -> DistillModule:
        """Set training or eval mode, except for the teacher, which stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss reads the teacher's outputs."""
        return self.criterion.needs_teacher or self._is_overridden

    @property
    def _is_overridden(self) -> bool:
        return bool(self._overrides("distill_loss"))

    def _overrides(self, *methods: str) -> list[str]:
        return [name for name in methods if getattr(type(self), name) is not getattr(DistillModule, name)]

    @property
    def teacher_changes(self) -> bool:
        """Whether the teacher changes during training."""
        parameters = () if self.teacher is None else self.teacher.parameters()
        return self.saves_teacher or any(parameter.requires_grad for parameter in parameters)

    @property
    def teacher_version(self) -> int:
        """Counter that increases whenever the teacher's parameters or buffers are modified in place."""
        if self.teacher is None:
            return 0
        tensors = chain(self.teacher.parameters(), self.teacher.buffers())
        return sum(modifications(tensor) for tensor in tensors if not tensor.is_inference())

    @property
    def cache_obstacle(self) -> str:
        """Reason why the teacher's outputs cannot be cached as logits; empty if they can."""
        name = type(self).__name__
        if self.teacher is None or not self.uses_teacher:
            return "the loss does not use a teacher"
        if self.teacher_changes:
            return f"the teacher of {name} changes during training"
        if own := self._overrides("teacher_outputs", "teacher_input", "losses", "unpack"):
            return f"{name} overrides {own[0]}"
        if not self.task.caches_logits:
            return f"the teacher's outputs for {type(self.task).__name__} are too large to be cached for all images"
        if self.criterion.teacher_layers:
            layers = ", ".join(self.criterion.teacher_layers)
            return f"the criterion {type(self.criterion).__name__} reads the teacher layers {layers}, not only logits"
        return ""

    def _reach_all(self, terms: dict[str, Tensor], *logits: Tensor) -> None:
        """Give parameters that a weight of 0 excludes a gradient of 0, since DDP waits for all gradients.

        A single process does the same; otherwise weight decay and momentum would act on fewer parameters than in DDP.
        """
        if not terms:
            raise ValueError(
                "distill_weight and hard_weight are both 0 in this step; start the Schedule above 0, or keep the other "
                "weight above 0"
            )
        silent = [] if self.hard_weight else [leaf for output in logits for leaf in tensors_in(output)]
        silent += [] if self.distill_weight else list(self.criterion.parameters())
        if silent:
            first = next(iter(terms))
            terms[first] = terms[first] + 0 * torch.stack([tensor.float().sum() for tensor in silent]).sum()

    @property
    def distill_name(self) -> str:
        """Name of the distillation loss in logs."""
        return "distill" if self._is_overridden else self.criterion.name

    def teacher_input(self, input: Any) -> Any:
        """Convert the student's input to the normalization of the teacher.

        Raises:
            ValueError: If this requires the mean and std of a data module, but no Trainer has attached one yet.
        """
        if self._normalizer is not None:
            return self._normalizer(input)
        if self.teacher_normalization is not None:
            raise ValueError(
                "teacher_normalization requires the mean and std of a data module, which are available within a "
                "Trainer; otherwise override teacher_input, or omit teacher_normalization and normalize the input for "
                "the teacher yourself"
            )
        return input

    def _set_normalizer(self) -> None:
        if self.teacher_normalization is not None:
            mean, std = self._data_attribute("mean"), self._data_attribute("std")
            self._normalizer = InputNormalizer(mean, std, self.teacher_normalization, device_of(self.model))

    def configure_model(self) -> None:
        """Build the criterion before callbacks such as Lightning's weight averaging copy the module."""
        if not self._built and (example := self.example_input()) is not None:
            self.build(example)

    @property
    def only_labels(self) -> bool:
        """Whether the labels are the only training signal, because `distill_weight` is 0."""
        return not self.distill_weight

    def setup(self, stage: str) -> None:
        """Check that networks, criterion and data match, before the run starts."""
        self._set_normalizer()
        super().setup(stage)
        is_unused = self.criterion.skips_unlabelled is True and self._data_attribute("num_labelled") == 0
        if stage == TrainerFn.FITTING and is_unused:
            raise ValueError(
                f"no training image has a label, but {type(self.criterion).__name__} uses labelled images only; "
                "increase label_size of the data module, or use a criterion that does not require labels, such as KD "
                "or, for segmentation, CWD"
            )
        self._remembered, self.teacher_cache, self._criterion_meter = RememberedLogits(), None, CriterionMeter()
        if not self._built and self.criterion.needs_build and self.example_input() is None:
            raise ValueError(
                f"{type(self.criterion).__name__} builds its adapters from the input shape, which is unknown; use a "
                "data module with `input_shape` or `example_input`, or set `example_input_array` of the module"
            )
        if self.teacher is not None and not self.saves_teacher:
            check_not_shared(self, self.teacher)
        _ = self.trains_logits  # determined here, before a strategy shards the weights

    def build(self, example: Any) -> None:
        """Check both networks with a blank input, and build the adapters of the criterion."""
        student = self.probe("student", self.student_extractor, example)
        teacher = Probe(nn.Identity(), NO_OUTPUTS)
        if self.teacher_extractor is not None:
            compared = bool(self.criterion.reads_logits and self.distill_weight)
            teacher = self.probe("teacher", self.teacher_extractor, example, is_classifier=compared)
            if compared:
                counts = (self.task.num_outputs(probe.outputs.logits) for probe in (student, teacher))
                check_same_classes(type(self.criterion).__name__, *counts)
        self.build_criterion(student, teacher)

    def build_criterion(self, *probes: Probe) -> None:
        """Build the adapters of the criterion, unless they have been built already."""
        if self._built:
            return
        for part in self.criterion.modules():
            for name in FROM_DATA:
                if getattr(part, name, 0) is None:
                    setattr(part, name, self._data_attribute(name))
        if self._awaits_checkpoint:
            return
        with torch.device(device_of(self.model)):  # overrides the current default device
            self.criterion.build(*probes)
        self._ddp_params_and_buffers_to_ignore = buffers_same_everywhere(self)
        self._built = True

    @property
    def _awaits_checkpoint(self) -> bool:
        """Whether only a checkpoint can provide the number of training images, since testing does not open them."""
        unknown = any(getattr(part, "num_samples", 0) is None for part in self.criterion.modules())
        return unknown and self._trainer is not None and not self._trainer.training

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Create optimizer and scheduler; if the logits are not trained, monitor the criterion, not `val/loss`."""
        made = super().configure_optimizers()
        schedule = made.get("lr_scheduler") if isinstance(made, dict) else None
        if isinstance(schedule, dict) and schedule.get("monitor") == "val/loss" and not self.trains_logits:
            schedule["monitor"] = f"val/{self.criterion_curve}"
        return made


def _load_teacher(teacher: nn.Module | None, path: str | None) -> nn.Module | None:
    if path is None or teacher is None:
        if path is not None:
            raise ValueError(f"teacher_ckpt is set to {path!r}, but there is no teacher; set `teacher` as well")
        return teacher
    return load_weights(teacher, path)
