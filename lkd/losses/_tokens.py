"""Conversion of transformer tokens to feature maps."""

from __future__ import annotations

from math import isqrt

from torch import Tensor


def tokens_to_map(owner: str, role: str, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """Reshape the tokens of a square grid of patches to a feature map.

    Args:
        owner: Name of the criterion, for the error message.
        role: `student` or `teacher`, for the error message.
        tokens: Tokens in row-major order `(B, N, C)`.
        num_prefix_tokens: Number of leading tokens that are not patches (class tokens, registers).

    Returns:
        Feature map `(B, C, side, side)`.

    Raises:
        ValueError: If the patches do not form a square grid.
    """
    patches = tokens[:, num_prefix_tokens:]
    num_patches = patches.shape[1]
    side = isqrt(num_patches)
    if num_prefix_tokens < 0 or side == 0 or side * side != num_patches:
        raise ValueError(
            f"{owner} requires tokens of a square grid of patches, but a {role} layer returns {tokens.shape[1]} "
            f"tokens, {num_patches} without the {num_prefix_tokens} class tokens; set the number of class tokens "
            f"({role}_prefix_tokens) or use another layer"
        )
    return patches.mT.reshape(len(tokens), -1, side, side)
