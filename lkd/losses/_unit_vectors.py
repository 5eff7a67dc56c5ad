"""Normalization to unit length with a zero gradient at the zero vector."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_vectors(vectors: Tensor, dim: int, p: float = 2.0) -> Tensor:
    """Vectors divided by their length; zeros stay zeros.

    It is `F.normalize`, but for the gradient at zeros, which have no direction: 0, not 1e12 times what comes in. Images
    that a network sees alike, and features that no neuron is active for, are such zeros.

    Args:
        vectors: Of any shape.
        dim: Along which dimension a vector lies.
        p: Power of the length, at least 1.

    Returns:
        As many vectors; NaN where the length overflows.

    Example:
        >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), dim=1).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    length: Tensor = torch.linalg.vector_norm(vectors, p, dim, keepdim=True)
    length = length.masked_fill(length.isinf(), torch.nan)  # divided by infinity, they would pass for zeros
    return vectors / length.clamp(min=1e-12).masked_fill(length == 0, torch.inf)
