"""Training a network with early exits: classifiers attached to its shallow stages."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, cast

from torch import Tensor, nn
from torchmetrics import Metric

from lkd.losses import BYOT
from lkd.modules.distill import DistillModule
from lkd.modules.evaluated_distillation import NO_OUTPUTS
from lkd.types import Batch, Outputs


class EarlyExitModule(DistillModule):
    """Train a network with early exits, evaluate each exit, and predict with a selected one.

    Logged metrics, in addition to those of `DistillModule`: `val/acc_exit1`, `val/acc_exit2`, ..., from shallow to
    deep. `val/acc` is the accuracy of the exit selected by `exit`, which `lkd test` and `lkd predict` use as well. The
    whole network is always run, so selecting an exit does not save computation here.

    Args:
        student: Network to train; returns logits `(B, K)`.
        criterion: Criterion that builds and trains the exits. `None` uses `BYOT()`.
        student_ckpt: File with initial weights, in any format that `lkd.models.load_weights` supports.
        exit: Number of the exit, from 1, that provides the logits outside training. `None` uses the network's own
            classifier.
        distill_weight: Weight of the criterion, at least 0.
        hard_weight: Weight of the cross-entropy of the network's own classifier with the labels, at least 0.
        kwargs: Arguments of `ClassificationModule`, except `model` and `model_ckpt`. The optimizer receives the
            trainable parameters of the network and its exits.

    Raises:
        FileNotFoundError: If the file with the weights does not exist.
        ValueError: If the exit does not exist, a weight is negative or both are 0, or the weights in the file do not
            match the network.
    """

    replaced_arguments = ("teacher", "teacher_ckpt", "teacher_normalization")

    def __init__(
        self,
        student: nn.Module,
        criterion: BYOT | None = None,
        student_ckpt: str | None = None,
        exit: int | None = None,
        distill_weight: float = 1.0,
        hard_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            student,
            teacher=None,
            criterion=criterion if criterion is not None else BYOT(),
            student_ckpt=student_ckpt,
            distill_weight=distill_weight,
            hard_weight=hard_weight,
            teacher_ckpt=None,
            teacher_normalization=None,
            **kwargs,
        )
        num_exits = len(self.criterion.student_layers) - 1
        if exit is not None and not 1 <= exit <= num_exits:
            raise ValueError(f"exit must be between 1 and {num_exits}, or null for the final classifier, got {exit}")
        self.exit = exit
        for metrics in self.metrics.values():
            for number in range(1, num_exits + 1):
                own = {f"{name}_exit{number}": metric for name, metric in self.task.metrics().items()}
                cast("nn.ModuleDict", metrics).update(own)

    def exit_logits(self, input: Any) -> list[Tensor]:
        """Compute the logits `(B, K)` of each exit, from shallow to deep, followed by those of the network itself.

        Args:
            input: Input of the network.
        """
        return self._exit_logits(self.student_extractor(input))

    def _exit_logits(self, student: Outputs) -> list[Tensor]:
        exits = cast("BYOT", self.criterion).exit_outputs(student)
        return [*(outputs.logits for outputs in exits), student.logits]

    def forward(self, input: Any) -> Tensor:
        """Compute the logits `(B, K)` of the selected exit."""
        return super().forward(input) if self.exit is None else self.exit_logits(input)[self.exit - 1]

    def update_metrics(self, metrics: MutableMapping[str, Metric], batch: Batch) -> Tensor:
        """Evaluate the selected exit, all exits and the criterion on one batch."""
        student = self.student_extractor(batch.input)
        *exits, own = self._exit_logits(student)
        logits = own if self.exit is None else exits[self.exit - 1]
        self.measure(metrics, logits, batch.target)
        for number, exit_logits in enumerate(exits, 1):
            of_exit = {name: metrics[f"{name}_exit{number}"] for name in self.task_metrics}
            self.task.update(of_exit, exit_logits, batch.target)
        self.measure_criterion(metrics, batch, lambda: self._weighted_terms(student, NO_OUTPUTS, batch))
        return logits
