"""Training a pretrained network on classes of one's own."""

from __future__ import annotations

import difflib
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import SGD, Optimizer

from lkd.features.layers import feature_layers, resolve_layers
from lkd.modules.classification import ClassificationModule
from lkd.schedules.relative import Interval


class FineTuneModule(ClassificationModule):
    """Train the head of a pretrained network, and the layers before it more slowly or not at all.

    The head is the network's last linear layer; the backbone is everything else. Frozen layers have no gradient and
    stay in eval mode, so that their BatchNorm keeps its statistics. (Lightning's `BaseFinetuning` normalises with those
    of the batch.)

    Args:
        model: The network, usually with pretrained weights and a new head; returns logits `(B, K)`.
        frozen: Layers that do not train: names, as `lkd layers` lists them, or groups such as `@stage1`. What a layer
            contains is frozen with it.
        backbone_lr_factor: Learning rate of the backbone, as a multiple of the head's, at least 0; 0: the backbone is
            frozen.
        optimizer: Makes the optimizer from two groups of parameters, head and backbone; its learning rate is that of
            the head.
        lr_scheduler: Makes the learning rate's schedule from the optimizer; None: constant.
        label_smoothing: Share of the target's probability spread over all classes, in [0, 1).
        model_ckpt: File with weights to start from: anything that `lkd.models.load_weights` reads.
        lr_scheduler_interval: Whether the schedule is stepped after each `epoch` or each optimizer `step`.

    Raises:
        ValueError: If the network has no linear layer, or no layer of a name; nothing is left to train; a number is out
            of range; or the file's weights do not fit.
    """

    _frozen: tuple[nn.Module, ...] = ()  # a tuple, in which PyTorch looks for no layers

    def __init__(
        self,
        model: nn.Module,
        frozen: list[str] | None = None,
        backbone_lr_factor: float = 0.1,
        optimizer: OptimizerCallable = lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        model_ckpt: str | None = None,
        lr_scheduler_interval: Interval = "epoch",
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler, label_smoothing, model_ckpt, lr_scheduler_interval)
        if not 0 <= backbone_lr_factor < float("inf"):
            raise ValueError(f"backbone_lr_factor must be a finite number from 0 on, got {backbone_lr_factor}")
        self.backbone_lr_factor = backbone_lr_factor
        self.head = feature_layers(self.model).head
        if not self.head:
            raise ValueError(f"{type(self.model).__name__} has no linear layer to fine-tune; use ClassificationModule")
        self._frozen = self._freeze(frozen or [])
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"frozen {frozen} leaves nothing to train; leave out the head, {self.head}")
        for layer in self._frozen:  # the others keep the modes that they have
            layer.training = False

    def _freeze(self, names: list[str]) -> tuple[nn.Module, ...]:
        """Takes the gradient from frozen layers; returns them with all layers in them."""
        layers = dict(self.model.named_modules())
        found: list[nn.Module] = []
        for name in resolve_layers(self.model, names):
            if name not in layers or not name:
                near = difflib.get_close_matches(name, layers, n=3) or [name for name in layers if "." not in name][1:9]
                raise ValueError(f"there is no layer {name!r} to freeze; the nearest are {', '.join(near)}")
            found += layers[name].modules()
        if not self.backbone_lr_factor:
            head = set(layers[self.head].modules())
            found += [layer for layer in layers.values() if layer not in head]
        for layer in found:
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)
        return tuple(found)

    def train(self, mode: bool = True) -> FineTuneModule:
        """Set the mode of everything but the frozen layers, which stay in eval mode."""
        super().train(mode)
        for layer in self._frozen:
            layer.training = False
        return self

    def make_optimizer(self) -> Optimizer:
        """The optimizer of two groups of parameters, `head` and `backbone`, each with its learning rate."""
        head = list(self.model.get_submodule(self.head).parameters())
        others = set(self.parameters()) - set(head)
        groups: list[dict[str, Any]] = [
            {"name": "head", "params": [parameter for parameter in head if parameter.requires_grad]},
            {"name": "backbone", "params": [p for p in self.parameters() if p in others and p.requires_grad]},
        ]
        optimizer = self._make_optimizer([group for group in groups if group["params"]])
        for group in optimizer.param_groups:
            if group["name"] == "backbone":
                group["lr"] = group["lr"] * self.backbone_lr_factor
        return optimizer

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and the schedule.

        Raises:
            ValueError: If the schedule makes the learning rates of head and backbone equal.
        """
        made = super().configure_optimizers()
        optimizer: Any = made["optimizer"] if isinstance(made, dict) else made
        rates = [group["lr"] for group in optimizer.param_groups]
        if len(rates) == 2 and rates[0] == rates[1] != 0 and self.backbone_lr_factor != 1:
            raise ValueError(
                "the schedule sets one learning rate for head and backbone, whatever backbone_lr_factor is; give it a "
                "rate for each, as in max_lr: [0.1, 0.01]"
            )
        return made
