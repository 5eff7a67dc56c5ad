"""Distillation-oriented trainer (DOT): separate momenta for the task gradient and the distillation gradient."""

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
    r"""SGD with a larger momentum for the distillation gradient than for the task gradient.

    $$ m_{kd} \leftarrow (\mu + \delta) \, m_{kd} + g_{kd}, \quad
       m_{task} \leftarrow (\mu - \delta) \, m_{task} + g - g_{kd} + \lambda \theta, \quad
       \theta \leftarrow \theta - \eta \, (m_{kd} + m_{task}) $$

    Here $g$ is the gradient of the total loss, stored in `Parameter.grad` as usual. Its distillation part $g_{kd}$ is
    passed to `add_distill_gradients` before each step, as `lkd.DOTModule` does. Parameters without a distillation part,
    such as those of adapters, or of the classifier if features are compared, use the momentum $\mu$. With `delta=0`
    this is equivalent to `torch.optim.SGD`.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, at least 0.
        momentum: Mean of the two momenta.
        delta: Half the difference between the two momenta. The authors use 0.075 for CIFAR and Tiny-ImageNet, and 0.09
            for ImageNet.
        weight_decay: Weight decay, at least 0; it belongs to the task gradient.

    Raises:
        ValueError: If a value is negative, or momentum - delta or momentum + delta is outside [0, 1).

    References:
        Zhao et al.: DOT: A Distillation-Oriented Trainer, ICCV 2023 (arXiv 2307.08436). As in the authors' code, weight
        decay is part of the task momentum, and parameters that only one loss reaches use the momentum $\mu$. In the
        authors' code, parameters that only the distillation reaches have no weight decay in the first step.
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
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        if not 0 <= momentum - delta <= momentum + delta < 1:
            raise ValueError(
                f"momentum - delta and momentum + delta must be in [0, 1), got momentum {momentum} and delta {delta}; "
                "typical values are 0.9 and 0.075"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})
        self.distill_gradients: dict[Tensor, Tensor] = {}

    def add_distill_gradients(self, parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
        """Accumulate the distillation part of the gradients; `zero_grad` clears it.

        Args:
            parameters: Parameters.
            gradients: One gradient per parameter; None if the distillation loss does not depend on it.
        """
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                before = self.distill_gradients.get(parameter)
                self.distill_gradients[parameter] = gradient if before is None else before + gradient

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, including their distillation part."""
        super().zero_grad(set_to_none)
        self.distill_gradients = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: Function that computes the loss and its gradients.

        Returns:
            The return value of the closure, or None without one.
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
            parameter.sub_(_accumulate(state, "momentum", momentum, gradient), alpha=group["lr"])
            return
        distill = torch.zeros_like(parameter) if distill is None else distill
        parameter.sub_(
            _accumulate(state, "momentum", momentum - delta, gradient - distill)
            + _accumulate(state, "distill_momentum", momentum + delta, distill),
            alpha=group["lr"],
        )


def _accumulate(state: dict[str, Tensor], name: str, momentum: float, gradient: Tensor) -> Tensor:
    """Update and return a momentum buffer, which starts as the first gradient."""
    state[name] = state[name].mul_(momentum).add_(gradient) if name in state else gradient.clone()
    return state[name]


class DOTModule(DistillModule):
    """A `DistillModule` trained with the optimizer `DOT`, which requires the gradient of the distillation loss.

    Each step computes the gradient of all terms except `hard`, then that of the total loss, so it needs a second
    backward pass. Gradient accumulation, mixed precision, clipping by norm and DDP apply to both gradients. Strategies
    that shard parameters (FSDP) and `torch.compile` of the whole module are not supported; compile the networks
    instead, with `torch._functorch.config.donated_buffer = False`.

    The arguments are those of `DistillModule`; `optimizer` must be `lkd.DOT`.

    Raises:
        ValueError: In training, if another optimizer is used or gradients are clipped by value.

    References:
        Zhao et al.: DOT: A Distillation-Oriented Trainer, ICCV 2023 (arXiv 2307.08436).
    """

    _distill_terms: Sequence[Tensor] = ()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Create the optimizer of the trainable parameters and the scheduler.

        Raises:
            ValueError: If the optimizer is not `DOT`.
        """
        made = super().configure_optimizers()
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        if not isinstance(optimizer, DOT):
            raise ValueError(
                f"DOTModule requires the optimizer lkd.DOT, got {type(optimizer).__name__}; set `optimizer` of the "
                "module as in configs/methods/dot.yaml"
            )
        return made

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the student's logits `(B, K)` and the weighted terms of the loss."""
        logits, terms = super().losses(batch)
        self._distill_terms = [term for name, term in terms.items() if name != "hard" and term.requires_grad]
        return logits, terms

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the distillation gradient, without touching `grad` or DDP's hooks, then that of the total loss."""
        terms, self._distill_terms = self._distill_terms, ()
        if terms:
            student = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            factors = torch.autograd.grad(loss, terms, retain_graph=True)  # of accumulation and of the gradient scaler
            gradients = torch.autograd.grad(terms, student, factors, retain_graph=True, allow_unused=True)
            scale = factors[0] * self.trainer.accumulate_grad_batches  # the gradient scaler unscales `grad` only
            unscaled = [None if gradient is None else gradient / scale for gradient in gradients]
            self._dot.add_distill_gradients(student, unscaled)
        super().backward(loss, *args, **kwargs)

    @property
    def _dot(self) -> DOT:
        return cast("DOT", self.optimizers(use_pl_optimizer=False))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Average the distillation gradients over the processes, as DDP does for the gradients of the total loss."""
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
        """Clip the gradient of the total loss by its norm, and scale its distillation part by the same factor.

        Raises:
            ValueError: If gradients are to be clipped by value.
        """
        if gradient_clip_val:
            if gradient_clip_algorithm == "value":
                raise ValueError("DOTModule cannot clip gradients by value; set --trainer.gradient_clip_algorithm norm")
            gradients = [
                parameter.grad
                for group in optimizer.param_groups
                for parameter in group["params"]
                if parameter.grad is not None
            ]
            factor = (gradient_clip_val / (get_total_norm(gradients) + 1e-6)).clamp(max=1.0)  # as in clip_grad_norm_
            for part in self._dot.distill_gradients.values():
                part.mul_(factor)
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
