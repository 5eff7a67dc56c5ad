"""Gradients of the labels and of the teacher, each with a momentum of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lkd.modules.distill import DistillModule
from lkd.types import Batch


class DOT(Optimizer):
    r"""SGD that remembers the gradient of the distillation longer than that of the task.

    $$ m_{kd} \leftarrow (\mu + \delta) \, m_{kd} + g_{kd}, \quad
       m_{task} \leftarrow (\mu - \delta) \, m_{task} + g - g_{kd} + \lambda \theta, \quad
       \theta \leftarrow \theta - \eta \, (m_{kd} + m_{task}) $$

    g is the gradient of the whole loss, as ever in `Parameter.grad`; the part of it that is the distillation's is added
    before the step by `add_distill_gradients`, which `lkd.DOTModule` does. A parameter without such a part, as an
    adapter's, or a classifier's where features are compared, has the plain momentum. With delta 0 it is
    `torch.optim.SGD`.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate, at least 0.
        momentum: The momentum around which the two lie.
        delta: How far they lie from it; 0.075 is the authors' for CIFAR and Tiny-ImageNet, 0.09 for ImageNet.
        weight_decay: Factor of the parameter in its gradient, at least 0; it belongs to the task.

    Raises:
        ValueError: If a value is negative, or momentum - delta or momentum + delta is outside [0, 1).

    References:
        Zhao et al.: DOT: A Distillation-Oriented Trainer, ICCV 2023 (arXiv 2307.08436). As in the authors' code, weight
        decay enters the task's momentum, and parameters that only one loss reaches have the plain one; there, those of
        the distillation alone have no weight decay in the first step.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.05,
        momentum: float = 0.9,
        delta: float = 0.075,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("delta", delta), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must not be negative, got {value}; take a finite number from 0 on")
        if not 0 <= momentum - delta <= momentum + delta < 1:
            raise ValueError(
                f"momentum - delta and momentum + delta must lie in [0, 1), got {momentum} and {delta}; 0.9 and 0.075 "
                "are usual"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})
        self.distill_gradients: dict[Tensor, Tensor] = {}

    def add_distill_gradients(self, parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
        """Add to the part of the gradients that is the distillation's; it is forgotten with the gradients.

        Args:
            parameters: The parameters.
            gradients: One for each; None where the distillation does not reach it.
        """
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                before = self.distill_gradients.get(parameter)
                self.distill_gradients[parameter] = gradient if before is None else before + gradient

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        super().zero_grad(set_to_none)
        self.distill_gradients = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Args:
            closure: Computes the loss and its gradients.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, momentum, delta = self.state[parameter], group["momentum"], group["delta"]
        gradient = cast("Tensor", parameter.grad).add(parameter, alpha=group["weight_decay"])
        distill = self.distill_gradients.get(parameter)
        if distill is None and "distill_momentum" not in state:
            parameter.sub_(_remembered(state, "momentum", momentum, gradient), alpha=group["lr"])
            return
        distill = torch.zeros_like(parameter) if distill is None else distill
        parameter.sub_(
            _remembered(state, "momentum", momentum - delta, gradient - distill)
            + _remembered(state, "distill_momentum", momentum + delta, distill),
            alpha=group["lr"],
        )


def _remembered(state: dict[str, Tensor], name: str, momentum: float, gradient: Tensor) -> Tensor:
    """The momentum after one more gradient; the first is taken as it is."""
    state[name] = state[name].mul_(momentum).add_(gradient) if name in state else gradient.clone()
    return state[name]


class DOTModule(DistillModule):
    """Train a student as `DistillModule` does, with the optimizer `DOT`, which needs the distillation's gradient alone.

    That is computed first, of all terms but `hard`, and then, as ever, that of the whole loss: a step costs a second
    backward pass. Accumulation, mixed precision, clipping by norm and DDP do what they do for one gradient; what splits
    parameters over processes (FSDP) has no place for the second, nor has a module compiled as a whole (compile the
    networks, with `torch._functorch.config.donated_buffer = False`).

    Args are those of `DistillModule`; `optimizer` must be given: `lkd.DOT`.

    Raises:
        ValueError: In training, if the optimizer is another one, or gradients are to be clipped by value.

    References:
        Zhao et al.: DOT: A Distillation-Oriented Trainer, ICCV 2023 (arXiv 2307.08436).
    """

    _distill_terms: Sequence[Tensor] = ()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over what trains, and the schedule."""
        made = super().configure_optimizers()
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        if not isinstance(optimizer, DOT):
            raise ValueError(
                f"DOTModule needs the optimizer lkd.DOT, got {type(optimizer).__name__}; set the module's `optimizer`, "
                "as configs/methods/dot.yaml does"
            )
        return made

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits `(B, K)`, and the weighted terms."""
        logits, terms = super().losses(batch)
        self._distill_terms = [term for name, term in terms.items() if name != "hard" and term.requires_grad]
        return logits, terms

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """First the distillation's gradient, which touches no `grad` and no hook of DDP; then the loss's."""
        terms, self._distill_terms = self._distill_terms, ()
        if terms:
            student = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            factors = torch.autograd.grad(loss, terms, retain_graph=True)  # accumulation's, and the loss scaler's
            gradients = torch.autograd.grad(terms, student, factors, retain_graph=True, allow_unused=True)
            scale = factors[0] * self.trainer.accumulate_grad_batches  # the scaler takes its own out of `grad` alone
            unscaled = [None if gradient is None else gradient / scale for gradient in gradients]
            self._dot.add_distill_gradients(student, unscaled)
        super().backward(loss, *args, **kwargs)

    @property
    def _dot(self) -> DOT:
        return cast("DOT", self.optimizers(use_pl_optimizer=False))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Average the distillation's gradients over the processes, as DDP has averaged the loss's."""
        gradients = self._dot.distill_gradients
        if gradients and self.trainer.world_size > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
            mean = cast("Tensor", self.trainer.strategy.reduce(flat, reduce_op="mean"))
            parts = torch.split(mean, [gradient.numel() for gradient in gradients.values()])
            for (parameter, gradient), part in zip(gradients.items(), parts, strict=True):
                gradients[parameter] = part.view_as(gradient)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the loss's gradient by its norm, and scale the distillation's part of it alike."""
        if gradient_clip_val:
            if gradient_clip_algorithm == "value":
                raise ValueError("DOTModule cannot clip gradients by value; set --trainer.gradient_clip_algorithm norm")
            gradients = [
                parameter.grad
                for group in optimizer.param_groups
                for parameter in group["params"]
                if parameter.grad is not None
            ]
            factor = (gradient_clip_val / (get_total_norm(gradients) + 1e-6)).clamp(max=1.0)  # as torch clips
            for part in self._dot.distill_gradients.values():
                part.mul_(factor)
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
