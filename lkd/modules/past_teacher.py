"""Self-distillation from a past or averaged copy of the student."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lkd.losses import KD, DistillLoss
from lkd.modules.classification import ClassificationModule
from lkd.modules.distill import DistillModule


class PastTeacherModule(DistillModule):
    r"""Train a student with its own past as teacher: its weights after the previous epoch, or their moving average.

    The teacher is a copy of the student that is frozen, in eval mode, and starts with the same weights. Without
    `ema_decay` it is replaced by the current student at the start of each epoch (progressive self-knowledge
    distillation). With `ema_decay` d it is an exponential moving average that is updated after step n (mean teacher):

    $$ \theta' \leftarrow d_n \theta' + (1 - d_n) \theta, \quad d_n = \min(d, 1 - 1 / (n + 1)) $$

    BatchNorm statistics are averaged like the weights. The teacher is saved in the checkpoint and restored from it,
    since it cannot be recomputed. It is excluded from the optimizer and from DDP's gradients; DDP broadcasts the
    BatchNorm statistics of rank 0.

    The first teacher is untrained, so increase `distill_weight` from 0 with `lkd.callbacks.Schedule`. Do not use
    criteria that precompute values from the teacher's weights, such as the margins of `OFD`: the values of the
    untrained first teacher would be used throughout. They require a trained teacher in a `DistillModule`.

    Args:
        student: Network to train; returns logits `(B, K)`.
        criterion: Distillation loss. `None` uses `KD(temperature=1.0)`.
        student_ckpt: File with initial weights, in any format that `lkd.models.load_weights` supports.
        ema_decay: Decay of the moving average per step, in [0, 1). `None` uses the student after the previous epoch.
        distill_weight: Weight of the criterion, at least 0.
        hard_weight: Weight of the cross-entropy with the labels, at least 0; with 0, labels are not used.
        kwargs: Arguments of `ClassificationModule`, except `model` and `model_ckpt`. The optimizer receives the
            trainable parameters of student and criterion.

    Raises:
        FileNotFoundError: If the file with the weights does not exist.
        ValueError: If `ema_decay` is out of range, a weight is negative or both are 0, or the weights in the file do
            not match the network.

    References:
        Kim et al.: Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021 (arXiv 2006.12000).
        The target of the paper, (1 - a) y + a p with the past prediction p, has the same gradient as `hard_weight`
        1 - a and `distill_weight` a with KD at temperature 1. In the authors' code, p is the prediction that the
        student made during the previous epoch, in training mode and for the image as augmented then; in the first
        epoch, p is the label.
        Tarvainen, Valpola: Mean teachers are better role models, NeurIPS 2017 (arXiv 1703.01780). Their teacher runs in
        training mode and sees the image with different noise.
    """

    saves_teacher = True
    replaced_arguments = ("teacher", "teacher_ckpt", "teacher_normalization")

    def __init__(
        self,
        student: nn.Module,
        criterion: DistillLoss | None = None,
        student_ckpt: str | None = None,
        ema_decay: float | None = None,
        distill_weight: float = 0.5,
        hard_weight: float = 0.5,
        **kwargs: Any,
    ) -> None:
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and less than 1, got {ema_decay}; a typical value is 0.999")
        super().__init__(
            student,
            teacher=deepcopy(student),
            criterion=criterion if criterion is not None else KD(temperature=1.0),
            student_ckpt=student_ckpt,
            distill_weight=distill_weight,
            hard_weight=hard_weight,
            teacher_ckpt=None,
            teacher_normalization=None,
            **kwargs,
        )
        self.ema_decay = ema_decay
        self._follow(0.0)  # student_ckpt may have changed the student

    def on_train_epoch_start(self) -> None:
        """Without `ema_decay`, copy the student to the teacher; the checkpoint of an epoch holds its own teacher."""
        if self.ema_decay is None:
            self._follow(0.0)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Perform the optimizer step, then update the moving average."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema_decay is not None:
            self._follow(min(self.ema_decay, 1 - 1 / (self.global_step + 2)))  # global_step excludes this step

    @torch.no_grad()
    def _follow(self, decay: float) -> None:
        teacher = cast("nn.Module", self.teacher)
        tensors, averages = (list(chain(network.parameters(), network.buffers())) for network in (self.model, teacher))
        if decay:
            floats = [pair for pair in zip(tensors, averages, strict=True) if pair[1].is_floating_point()]
            update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            update([average for _, average in floats], [tensor for tensor, _ in floats], 0)
        for tensor, average in zip(tensors, averages, strict=True):
            if not (decay and average.is_floating_point()):
                average.copy_(tensor)

    def on_validation_epoch_end(self) -> None:
        """Skip the warning about the teacher's accuracy, which is near chance before the first epoch."""
        ClassificationModule.on_validation_epoch_end(self)
