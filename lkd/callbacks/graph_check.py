"""Comparison of a replayed step with ordinary steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TOLERANCE = 1e-5
"""Relative difference between a replay and an ordinary step accepted as rounding; graphs use float32 learning rates."""

_REPEATABLE = 1e-3
"""Maximum relative difference between two ordinary steps that is accepted as numerical noise."""


class Outcome(NamedTuple):
    """Result of a training step.

    Attributes:
        row: Loss, terms and counts `(C,)`.
        norm: Norm of the gradient.
        state: Weights, buffers and optimizer state after the step, as returned by `flat`.
    """

    row: Tensor
    norm: Tensor
    state: list[Tensor]


def disagreement(ordinary: list[Outcome], replay: Outcome, before: list[Tensor]) -> str:
    """Describe how a replay differs from ordinary steps by more than rounding.

    Args:
        ordinary: Outcomes of two ordinary steps. Their difference is the numerical noise of the device.
        replay: Outcome of the replay from the same state.
        before: State before the steps, as returned by `flat`.

    Returns:
        Description of the difference; empty if there is none.
    """
    first, second = ordinary
    noise = _distances(first, second, before)
    if worst := [name for name, distance in noise.items() if not distance <= _REPEATABLE]:
        name = worst[0]
        return f"two ordinary steps from the same state differ in {name} (relative difference {noise[name]:.1g})"
    found = _distances(first, replay, before)
    for name, distance in found.items():
        if not distance <= max(_TOLERANCE, 10 * noise[name]):
            return f"a replay of the graph differs from an ordinary step in {name} (relative difference {distance:.1g})"
    return ""


def _distances(one: Outcome, other: Outcome, before: list[Tensor]) -> dict[str, float]:
    """Return the relative differences of the loss, the gradient norm, and the update of the state."""
    tiny = 1e-30
    loss = (_gap(one.row, other.row).abs() / (one.row.abs() + tiny)).max()
    norm = _gap(one.norm, other.norm).abs() / (one.norm.abs() + tiny)
    apart, change, size = (torch.zeros((), dtype=torch.float64, device=one.row.device) for _ in range(3))
    for value, other_value, old in zip(one.state, other.state, before, strict=True):
        apart += _gap(value, other_value).square().sum()
        change += _gap(value, old).square().sum()
        size += value.double().nan_to_num().square().sum()
    rounding = 2.0**-22 * size.sqrt()
    update = (apart.sqrt() - rounding).clamp(min=0) / (change.sqrt() + tiny)
    values = torch.stack((loss.double(), norm.double(), update)).tolist()
    return dict(zip(("the loss", "the gradient", "the updated weights"), values, strict=True))


def _gap(one: Tensor, other: Tensor) -> Tensor:
    """Return the difference in float64; 0 where both values are NaN or the same infinity, as in a diverged run."""
    one, other = one.double(), other.double()
    return torch.where((one == other) | (one.isnan() & other.isnan()), torch.zeros_like(one), one - other)
