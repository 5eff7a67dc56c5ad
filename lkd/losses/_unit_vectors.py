"""Normalization to unit length with a zero gradient at the zero vector."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_vectors(vectors: Tensor, dim: int, p: float = 2.0) -> Tensor:
    """Normalize vectors to unit length; zero vectors remain zero.

    It equals `F.normalize` except for the gradient at zero vectors, which is 0 instead of 1e12 times the incoming
    gradient. Zero vectors occur as differences of equal features and as features without any active neuron.

    Args:
        vectors: Tensor of any shape.
        dim: Dimension along which the vectors lie.
        p: Order of the norm, at least 1.

    Returns:
        Tensor of the same shape; NaN where the norm overflows.

    Example:
        >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), dim=1).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    length: Tensor = torch.linalg.vector_norm(vectors, p, dim, keepdim=True)
    length = length.masked_fill(length.isinf(), torch.nan)  # dividing by infinity would yield zeros
    return vectors / length.clamp(min=1e-12).masked_fill(length == 0, torch.inf)
