"""Conversion of transformer tokens to feature maps."""

from __future__ import annotations

from math import isqrt

from torch import Tensor


def tokens_to_map(owner: str, role: str, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """The tokens of a square grid of patches as a feature map.

    Args:
        owner: The criterion's name.
        role: Whose tokens they are, `student` or `teacher`.
        tokens: `(B, N, C)`, row by row.
        num_prefix_tokens: How many of them, at the beginning, are of no patch (class tokens, registers).

    Returns:
        `(B, C, side, side)`.

    Raises:
        ValueError: If the patches are no square.
    """
    patches = tokens[:, num_prefix_tokens:]
    num_patches = patches.shape[1]
    side = isqrt(num_patches)
    if num_prefix_tokens < 0 or side == 0 or side * side != num_patches:
        raise ValueError(
            f"{owner} reads tokens of a square grid of patches; a layer of the {role} returns {tokens.shape[1]}, which "
            f"are {num_patches} without {num_prefix_tokens} class tokens: set the number of class tokens "
            f"({role}_prefix_tokens), or name another layer"
        )
    return patches.mT.reshape(len(tokens), -1, side, side)
