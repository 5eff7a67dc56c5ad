"""A student that learns from its own past."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lkd.losses import KD, DistillLoss
from lkd.modules.classification import ClassificationModule
from lkd.modules.distill import DistillModule
from lkd.schedules.relative import Interval


class PastTeacherModule(DistillModule):
    r"""Train a student whose teacher is what it was: at the end of the last epoch, or on average over the last steps.

    The teacher is a frozen copy of the student, in eval mode. It begins as the student begins, and learns nothing
    itself: without `ema_decay` it is refreshed between epochs (progressive self-knowledge distillation); with
    `ema_decay` d it follows after every step (mean teacher),

    $$ \theta' \leftarrow d_n \theta' + (1 - d_n) \theta, \quad d_n = \min(d, 1 - 1 / (n + 1)) $$

    at the n-th step, BatchNorm's statistics like the weights. As it cannot be had otherwise, it is in the checkpoint,
    and goes on from there. Neither the optimizer nor DDP's gradients know it; DDP gives all processes the statistics of
    the first.

    The first teacher knows nothing: let `distill_weight` grow from 0, by `lkd.callbacks.Schedule`. A criterion that
    computes something from the teacher's weights once (`OFD`: its margins) does so from that first teacher, and keeps
    it: it belongs to a teacher that is trained, in a `DistillModule`.

    Args:
        student: The network in training; returns logits `(B, K)`.
        criterion: What the student imitates; None: `KD(temperature=1.0)`.
        student_ckpt: File with weights to start from: anything that `lkd.models.load_weights` reads.
        ema_decay: How much of the average stays in a step, in [0, 1); None: the teacher is the student at the end of
            the epoch before.
        distill_weight: Weight of the criterion, at least 0.
        hard_weight: Weight of the cross-entropy with the labels, at least 0; 0: labels are not used.
        optimizer: Makes the optimizer from the parameters that train (the student's and the criterion's).
        lr_scheduler: Makes the learning rate's schedule from the optimizer; None: constant. `lkd.schedules` has
            schedules that follow the length of the run.
        label_smoothing: Share of the target's probability spread over all classes, in [0, 1).
        lr_scheduler_interval: Whether the schedule is stepped after each `epoch` or each optimizer `step`.

    Raises:
        ValueError: If `ema_decay` is out of range, a weight is negative, or the file's weights do not fit.

    References:
        Kim et al.: Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021 (arXiv 2006.12000).
        The target of the paper, (1 - a) y + a p with the past prediction p, has the gradient of `hard_weight` 1 - a and
        `distill_weight` a with KD at temperature 1. In the authors' code p is what the student said in training, of the
        image as it was augmented in the last epoch, and the first epoch's p is the label.
        Tarvainen, Valpola: Mean teachers are better role models, NeurIPS 2017 (arXiv 1703.01780). Their teacher runs in
        training mode, and sees the image with another noise.
    """

    saves_teacher = True

    def __init__(
        self,
        student: nn.Module,
        criterion: DistillLoss | None = None,
        student_ckpt: str | None = None,
        ema_decay: float | None = None,
        distill_weight: float = 0.5,
        hard_weight: float = 0.5,
        optimizer: OptimizerCallable = lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        lr_scheduler_interval: Interval = "epoch",
    ) -> None:
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and less than 1, got {ema_decay}; 0.999 is usual")
        super().__init__(
            student,
            deepcopy(student),
            criterion if criterion is not None else KD(temperature=1.0),
            student_ckpt=student_ckpt,
            distill_weight=distill_weight,
            hard_weight=hard_weight,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            label_smoothing=label_smoothing,
            lr_scheduler_interval=lr_scheduler_interval,
        )
        self.ema_decay = ema_decay
        self._follow(0.0)  # student_ckpt, if any, has changed the student

    def on_train_epoch_start(self) -> None:
        """Without an average, the teacher is the student as it is now; the checkpoint of an epoch has that epoch's."""
        if self.ema_decay is None:
            self._follow(0.0)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, and let the average follow."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema_decay is not None:
            self._follow(min(self.ema_decay, 1 - 1 / (self.global_step + 2)))  # this step is not yet counted

    @torch.no_grad()
    def _follow(self, decay: float) -> None:
        teacher = cast("nn.Module", self.teacher)
        ours, theirs = (list(chain(network.parameters(), network.buffers())) for network in (self.model, teacher))
        if decay:
            floats = [pair for pair in zip(ours, theirs, strict=True) if pair[1].is_floating_point()]
            average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            average([own for _, own in floats], [new for new, _ in floats], 0)
        for new, own in zip(ours, theirs, strict=True):
            if not (decay and own.is_floating_point()):
                own.copy_(new)

    def on_validation_epoch_end(self) -> None:
        """Before the first epoch the teacher is as bad as the student, which is no reason to warn."""
        ClassificationModule.on_validation_epoch_end(self)
