"""Optimizer settings that make an update faster or compatible with CUDA graphs."""

from __future__ import annotations

from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lkd import devices

_FUSIBLE = (SGD, Adam, AdamW)


def fuse(optimizer: Optimizer, precision: str) -> bool:
    """Enable the fused implementation of an optimizer if it is supported and no implementation was selected.

    Args:
        optimizer: The optimizer, before its first step in this process.
        precision: Precision of the trainer.

    Returns:
        Whether the optimizer is fused.
    """
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    is_chosen = any(group.get("foreach") is not None or group.get("fused") is not None for group in groups)
    if all(group.get("fused") for group in groups):  # as in a resumed run
        return True
    if type(optimizer) not in _FUSIBLE or is_chosen or precision.startswith("16"):
        return False
    if any(group.get("differentiable") or group.get("capturable") for group in groups):
        return False
    if any(isinstance(parameter, DTensor) for parameter in parameters):  # not supported for sharded parameters
        return False
    if not all(one.is_floating_point() and devices.has_fused_optimizers(one.device) for one in parameters):
        return False
    counted = any("step" in state for state in optimizer.state.values())
    if counted and any(devices.is_gpu(one.device) for one in parameters):  # resumed: its step counts are on the CPU
        return False
    for group in groups:
        group["fused"] = True
    return True


def count_on_device(optimizer: Optimizer) -> None:
    """Make a new PyTorch optimizer keep its step count on the device, as CUDA graphs require, if it supports this.

    The setting is applied with and without graphs, so that both give the same results.

    Args:
        optimizer: The optimizer.
    """
    if type(optimizer).__module__.startswith("torch.optim.") and not optimizer.state:
        for group in optimizer.param_groups:
            if "capturable" in group and not group.get("fused"):
                group["capturable"] = True


def count_on_host(optimizer: Optimizer) -> None:
    """Revert `count_on_device` on the CPU, for a run that was started on a GPU.

    Args:
        optimizer: The optimizer.
    """
    for group in optimizer.param_groups:
        if group.get("capturable") and all(parameter.is_cpu for parameter in group["params"]):
            group["capturable"] = False
