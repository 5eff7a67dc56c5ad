"""Attention of feature maps: softmax of mean absolute activations."""

from __future__ import annotations

from torch import Tensor


def spatial_attention(feature: Tensor, temperature: float) -> Tensor:
    """Return the attention of each pixel: H * W times the softmax of the mean absolute activation over the channels.

    Args:
        feature: Feature map `(B, C, H, W)`.
        temperature: Softmax temperature, greater than 0.

    Returns:
        Attention `(B, H, W)`, with mean 1.
    """
    mean = feature.abs().mean(1)
    return mean[0].numel() * (mean.flatten(1) / temperature).softmax(1).view_as(mean)


def channel_attention(feature: Tensor, temperature: float) -> Tensor:
    """Return the attention of each channel: C times the softmax of the mean absolute activation over the pixels.

    Args:
        feature: Feature map `(B, C, H, W)`.
        temperature: Softmax temperature, greater than 0.

    Returns:
        Attention `(B, C)`, with mean 1.
    """
    return feature.shape[1] * (feature.abs().mean((2, 3)) / temperature).softmax(1)
