"""Checks that a network matches its data."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lkd._compat import tree_leaves


def mismatch(network: nn.Module, example: Any) -> str:
    """Describe a mismatch of devices or data types between a network and its input; empty if there is none."""
    inputs = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    tensors = [*network.parameters(), *network.buffers(), *inputs]
    places = sorted({str(tensor.device) for tensor in tensors})
    if len(places) > 1:
        return f"its weights, buffers and input are on different devices ({', '.join(places)}); move them to the same"
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()})
    if len(kinds) > 1:
        return (
            f"its weights and input have different dtypes ({', '.join(kinds)}); convert the network with .float(), and "
            "set the compute precision with --trainer.precision"
        )
    return ""


def warn_of_unused_outputs(trainer: L.Trainer | None, name: str, num_outputs: int, num_classes: int | None) -> bool:
    """Warn before training if a network, such as a pretrained one, has more outputs than the data has classes.

    Args:
        trainer: Trainer of the module, if any.
        name: Name of the network in the message.
        num_outputs: Number of logits.
        num_classes: Number of classes of the data, if known.

    Returns:
        Whether the warning was issued.
    """
    if trainer is None or trainer.state.fn != TrainerFn.FITTING or num_classes is None or num_outputs <= num_classes:
        return False
    rank_zero_warn(
        f"the {name} has {num_outputs:,} outputs, but the data has only {num_classes:,} classes; set num_classes to "
        f"{num_classes:,}, unless you want to keep a pretrained classifier"
    )
    return True
