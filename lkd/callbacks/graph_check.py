"""Whether the replay of a captured step does what an ordinary step does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TOLERANCE = 1e-5
"""Relative difference between a replay and an ordinary step that is rounding: a graph's learning rate is a float32."""

_REPEATABLE = 1e-3
"""Relative difference between two ordinary steps up to which the step counts as the same computation."""


class Outcome(NamedTuple):
    """What a step did.

    Attributes:
        row: Loss, terms and counts `(C,)`.
        norm: The norm of the gradient.
        state: Weights, buffers and optimizer state after the step, as `flat` joins them.
    """

    row: Tensor
    norm: Tensor
    state: list[Tensor]


def disagreement(ordinary: list[Outcome], replay: Outcome, before: list[Tensor]) -> str:
    """Describe in what a replay differs from ordinary steps by more than rounding; empty if it does not.

    Args:
        ordinary: The outcomes of two ordinary steps: in what they differ is noise of the device.
        replay: The outcome of the replay, from the same state.
        before: That state, as `flat` joins it.
    """
    first, second = ordinary
    noise = _distances(first, second, before)
    if worst := [name for name, distance in noise.items() if not distance <= _REPEATABLE]:
        return f"two ordinary steps from the same state differ in {worst[0]} (by {noise[worst[0]]:.1g})"
    found = _distances(first, replay, before)
    for name, distance in found.items():
        if not distance <= max(_TOLERANCE, 10 * noise[name]):
            return f"a replay of the graph differs from an ordinary step in {name} (by {distance:.1g} of it)"
    return ""


def _distances(one: Outcome, other: Outcome, before: list[Tensor]) -> dict[str, float]:
    """Relative differences of the losses, the gradients' norms and the updates of all state."""
    tiny = 1e-30
    loss = (_gap(one.row, other.row).abs() / (one.row.abs() + tiny)).max()
    norm = _gap(one.norm, other.norm).abs() / (one.norm.abs() + tiny)
    apart, change, size = (torch.zeros((), dtype=torch.float64, device=one.row.device) for _ in range(3))
    for ours, theirs, old in zip(one.state, other.state, before, strict=True):
        apart += _gap(ours, theirs).square().sum()
        change += _gap(ours, old).square().sum()
        size += ours.double().nan_to_num().square().sum()
    rounding = 2.0**-22 * size.sqrt()
    update = (apart.sqrt() - rounding).clamp(min=0) / (change.sqrt() + tiny)
    values = torch.stack((loss.double(), norm.double(), update)).tolist()
    return dict(zip(("the loss", "the gradient", "the updated weights"), values, strict=True))


def _gap(one: Tensor, other: Tensor) -> Tensor:
    """The difference, in float64; 0 where both are NaN, or infinite, as in a run that has diverged."""
    one, other = one.double(), other.double()
    return torch.where((one == other) | (one.isnan() & other.isnan()), torch.zeros_like(one), one - other)
