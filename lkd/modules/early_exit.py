"""A network with classifiers behind its shallow stages."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, cast

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import SGD
from torchmetrics import Metric

from lkd.losses import BYOT
from lkd.modules.distill import DistillModule
from lkd.modules.evaluated_distillation import NO_ANSWER
from lkd.modules.meter import Accuracy
from lkd.schedules.relative import Interval
from lkd.types import Batch, Outputs


class EarlyExitModule(DistillModule):
    """Train a network with exits behind its shallow stages, measure each of them, and let one answer.

    Beside `DistillModule`'s curves: `val/acc_exit1`, `val/acc_exit2`, ..., from shallow to deep; `val/acc` is that of
    what answers, which `exit` chooses, in `lkd test` and `lkd predict` too. The network is still run to its end: what
    an exit saves is not saved here.

    Args:
        student: The network in training; returns logits `(B, K)`.
        criterion: Makes the exits, and what they learn; None: `BYOT()`.
        student_ckpt: File with weights to start from: anything that `lkd.models.load_weights` reads.
        exit: Which exit answers, from 1, in all but training; None: the network itself.
        distill_weight: Weight of the criterion, at least 0.
        hard_weight: Weight of the network's own cross-entropy with the labels, at least 0.
        optimizer: Makes the optimizer from the parameters that train (the network's and the exits').
        lr_scheduler: Makes the learning rate's schedule from the optimizer; None: constant. `lkd.schedules` has
            schedules that follow the length of the run.
        label_smoothing: Share of the target's probability spread over all classes, in [0, 1).
        lr_scheduler_interval: Whether the schedule is stepped after each `epoch` or each optimizer `step`.

    Raises:
        ValueError: If there is no such exit, a weight is negative, or the file's weights do not fit.
    """

    def __init__(
        self,
        student: nn.Module,
        criterion: BYOT | None = None,
        student_ckpt: str | None = None,
        exit: int | None = None,
        distill_weight: float = 1.0,
        hard_weight: float = 1.0,
        optimizer: OptimizerCallable = lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        lr_scheduler_interval: Interval = "epoch",
    ) -> None:
        super().__init__(
            student,
            criterion=criterion if criterion is not None else BYOT(),
            student_ckpt=student_ckpt,
            distill_weight=distill_weight,
            hard_weight=hard_weight,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            label_smoothing=label_smoothing,
            lr_scheduler_interval=lr_scheduler_interval,
        )
        num_exits = len(self.criterion.student_layers) - 1
        if exit is not None and not 1 <= exit <= num_exits:
            raise ValueError(f"exit must be one of 1 to {num_exits}, or null for the network itself, got {exit}")
        self.exit = exit
        for metrics in self.metrics.values():
            for number in range(1, num_exits + 1):
                cast("nn.ModuleDict", metrics)[f"acc_exit{number}"] = Accuracy()

    def exit_logits(self, input: Any) -> list[Tensor]:
        """Logits `(B, K)` of each exit, from shallow to deep, and, last, of the network itself.

        Args:
            input: What the network takes.
        """
        return self._exit_logits(self.student_taps(input))

    def _exit_logits(self, student: Outputs) -> list[Tensor]:
        exits = cast("BYOT", self.criterion).exit_outputs(student)
        return [*(answer.logits for answer in exits), student.logits]

    def forward(self, input: Any) -> Tensor:
        """Logits `(B, K)` of the exit that answers."""
        return super().forward(input) if self.exit is None else self.exit_logits(input)[self.exit - 1]

    def update_metrics(self, metrics: MutableMapping[str, Metric], batch: Batch) -> Tensor:
        """Measure what answers, all exits, and the criterion on one batch."""
        student = self.student_taps(batch.input)
        *exits, own = self._exit_logits(student)
        logits = own if self.exit is None else exits[self.exit - 1]
        self.measure(metrics, logits, batch.target)
        for number, exit_logits in enumerate(exits, 1):
            metrics[f"acc_exit{number}"].update(exit_logits, batch.target)
        self.measure_criterion(metrics, batch, lambda: self._weighted_terms(student, NO_ANSWER, batch))
        return logits
