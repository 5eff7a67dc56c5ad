"""Reasons why a training step cannot be captured as a graph, or must be checked again."""

from __future__ import annotations

from itertools import chain
from typing import Any

import lightning as L
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lkd._compat import detects_anomalies

_WITHIN_STEP = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
"""Hooks that Lightning calls inside a step, which a graph cannot call."""

_OF_MODULE = (
    *("training_step", "backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping"),
    *_WITHIN_STEP,
)
_KNOWN = {"lkd", "torch", "torchvision", "timm", "torchmetrics", "lightning"}
"""Packages whose modules do not read the number of the step or epoch."""


def obstacle(trainer: L.Trainer, module: Any) -> str:
    """Return the reason why the step of a run cannot be captured as a graph; empty if none is known.

    Args:
        trainer: Trainer with its optimizers.
        module: The trained module.
    """
    if not hasattr(module, "training_values"):
        return f"{type(module).__name__} is not an lkd module"
    if module.task.graph_obstacle:
        return str(module.task.graph_obstacle)
    if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
        return "several processes or sharded weights"
    if trainer.accumulate_grad_batches > 1:
        return "gradients are accumulated"
    if str(trainer.precision).startswith("16"):
        return "float16 gradient scaling runs on the host"
    if len(trainer.optimizers) != 1 or not module.automatic_optimization:
        return "several optimizers or manual optimization"
    if detects_anomalies(trainer):
        return "detect_anomaly checks each operation"
    if own := [name for name in _OF_MODULE if name in vars(module) or not _is_known(type(module), name)]:
        return f"{type(module).__name__} overrides {own[0]}"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for name in _WITHIN_STEP:
            own_hook = vars(callback).get(name)  # for example in a LambdaCallback
            if own_hook is not None or getattr(type(callback), name) is not getattr(L.Callback, name):
                return f"{type(callback).__name__} uses {name}"
    return ""


def has_foreign_code(module: nn.Module) -> bool:
    """Return whether a module contains parts that are not from lkd or known network libraries.

    Args:
        module: A `ClassificationModule`.
    """
    teacher = getattr(module, "teacher", None)
    parts = chain(module.modules(), () if teacher is None else teacher.modules())
    return not {type(part).__module__.partition(".")[0] for part in parts} <= _KNOWN


def _is_known(kind: type, name: str) -> bool:
    """Return whether a hook of a module is defined by Lightning or lkd."""
    owner = next(base for base in kind.__mro__ if name in vars(base))
    return owner.__module__.partition(".")[0] in ("lightning", "lkd")
