"""Checks of a network against its data."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def mismatch(network: nn.Module, example: Any) -> str:
    """Describe tensors of a network and its input that are on different devices or of different types, if there are."""
    inputs = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    tensors = [*network.parameters(), *network.buffers(), *inputs]
    places = sorted({str(tensor.device) for tensor in tensors})
    if len(places) > 1:
        return f"its weights, buffers and input are on several devices ({', '.join(places)}); move the network to one"
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()})
    if len(kinds) > 1:
        return (
            f"its weights and input are of several types ({', '.join(kinds)}); convert the network with .float(), and "
            "choose the type to compute in with --trainer.precision"
        )
    return ""


def warn_of_unused_outputs(trainer: L.Trainer | None, name: str, num_outputs: int, num_classes: int | None) -> bool:
    """Warn, before training, of a network with more outputs than the data has classes, as a pretrained one may have.

    Args:
        trainer: The module's trainer, if it has one.
        name: What the network is called in the message.
        num_outputs: Number of its logits.
        num_classes: Number of classes of the data, if it is known.

    Returns:
        Whether there was a reason to warn.
    """
    if trainer is None or trainer.state.fn != TrainerFn.FITTING or num_classes is None or num_outputs <= num_classes:
        return False
    rank_zero_warn(
        f"the {name} has {num_outputs:,} outputs and the data {num_classes:,} classes, so no image belongs to one of "
        f"the outputs from {num_classes:,} on; set num_classes to {num_classes:,} unless you keep a pretrained "
        "classifier"
    )
    return True
