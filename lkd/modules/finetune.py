"""Fine-tuning of a pretrained network on new classes."""

from __future__ import annotations

import difflib
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import SGD, Optimizer

from lkd.features.layers import feature_layers, resolve_layers
from lkd.modules.classification import ClassificationModule


class FineTuneModule(ClassificationModule):
    """Fine-tune a pretrained network, with a lower learning rate for the backbone or a frozen backbone.

    The head is the last linear layer of the network; the backbone is everything else. Frozen layers have no gradient
    and stay in eval mode, so that their BatchNorm uses its running statistics. (With Lightning's `BaseFinetuning`, it
    uses those of the batch.)

    Args:
        model: Network to train, usually with pretrained weights and a new head; returns logits `(B, K)`.
        frozen: Layers to freeze: names, as listed by `lkd layers`, or groups such as `@stage1`. Submodules of a frozen
            layer are frozen as well.
        backbone_lr_factor: Learning rate of the backbone as a multiple of the head's, at least 0. With 0 the backbone
            is frozen.
        optimizer: Function that creates the optimizer from two parameter groups, head and backbone. Its learning rate
            is that of the head.
        kwargs: Arguments of `ClassificationModule`.

    Raises:
        FileNotFoundError: If the file with the weights does not exist.
        ValueError: If the network has no linear layer, a layer to freeze does not exist, no trainable parameters
            remain, a number is out of range, or the weights in the file do not match the network.
    """

    _frozen: tuple[nn.Module, ...] = ()  # a tuple, since PyTorch does not register layers in tuples

    def __init__(
        self,
        model: nn.Module,
        frozen: list[str] | None = None,
        backbone_lr_factor: float = 0.1,
        optimizer: OptimizerCallable = lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, optimizer, **kwargs)
        if not 0 <= backbone_lr_factor < float("inf"):
            raise ValueError(f"backbone_lr_factor must be a finite number of at least 0, got {backbone_lr_factor}")
        self.backbone_lr_factor = backbone_lr_factor
        self.head = feature_layers(self.model).head
        if not self.head:
            raise ValueError(f"{type(self.model).__name__} has no linear layer to fine-tune; use ClassificationModule")
        self._frozen = self._freeze(frozen or [])
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"frozen={frozen} leaves no trainable parameters; do not freeze the head, {self.head}")
        for layer in self._frozen:  # the other layers keep their modes
            layer.training = False

    def _freeze(self, names: list[str]) -> tuple[nn.Module, ...]:
        """Freeze the parameters of the named layers, and return these layers and all their submodules."""
        layers = dict(self.model.named_modules())
        found: list[nn.Module] = []
        for name in resolve_layers(self.model, names):
            if name not in layers or not name:
                near = difflib.get_close_matches(name, layers, n=3) or [name for name in layers if "." not in name][1:9]
                raise ValueError(f"cannot freeze {name!r}: no such layer; closest matches: {', '.join(near)}")
            found += layers[name].modules()
        if not self.backbone_lr_factor:
            head = set(layers[self.head].modules())
            found += [layer for layer in layers.values() if layer not in head]
        for layer in found:
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)
        return tuple(found)

    def train(self, mode: bool = True) -> FineTuneModule:
        """Set training or eval mode, except for the frozen layers, which stay in eval mode."""
        super().train(mode)
        for layer in self._frozen:
            layer.training = False
        return self

    def make_optimizer(self) -> Optimizer:
        """Create the optimizer with two parameter groups, `head` and `backbone`, each with its own learning rate."""
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
        """Create the optimizer and the scheduler.

        Raises:
            ValueError: If the scheduler makes the learning rates of head and backbone equal.
        """
        made = super().configure_optimizers()
        optimizer: Any = made["optimizer"] if isinstance(made, dict) else made
        rates = [group["lr"] for group in optimizer.param_groups]
        if len(rates) == 2 and rates[0] == rates[1] != 0 and self.backbone_lr_factor != 1:
            raise ValueError(
                "the scheduler sets the same learning rate for head and backbone and thus overrides "
                "backbone_lr_factor; set one rate for each, as in max_lr: [0.1, 0.01]"
            )
        return made
