"""Visualizations of targets and predictions: texts and colored masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lkd.types import Batch

Color = tuple[int, int, int]

UNLABELLED: Color = (224, 224, 192)
"""Color of pixels without a label, as in PASCAL VOC."""


class Visualization(NamedTuple):
    """Text, image or both that show a target or a prediction.

    Attributes:
        text: Short text; lines are separated by line breaks.
        image: Image `(3, H, W)`, uint8.
        legend: Meaning of the colors in the image.
    """

    text: str = ""
    image: Tensor | None = None
    legend: Mapping[str, Color] = {}


def class_color(number: int) -> Color:
    """Return the color of a class in the colormap of PASCAL VOC; class 0 is black.

    Args:
        number: Class, from 0 to 255.
    """
    channels = [sum((number >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
    return channels[0], channels[1], channels[2]


def colored(mask: Tensor) -> Tensor:
    """Color a mask.

    Args:
        mask: Classes `(H, W)`; negative for pixels without a label.

    Returns:
        Image `(3, H, W)`, uint8, on the CPU.
    """
    palette = torch.tensor([*map(class_color, range(256)), UNLABELLED], dtype=torch.uint8)
    mask = mask.cpu()
    return palette[torch.where(mask < 0, 256, mask % 256)].permute(2, 0, 1)


def class_name(names: Sequence[str], number: int) -> str:
    """Return the name of a class, or its number if the names are unknown or too few.

    Args:
        names: Names of the classes.
        number: Class, at least 0.
    """
    return str(names[number]) if number < len(names) else str(number)


def displayable(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Undo the normalization of images, for display.

    Args:
        image: Normalized images `(B, C, H, W)`.
        mean: Mean of each channel. Without it, each image is rescaled to the full range.
        std: Standard deviation of each channel.

    Returns:
        Images `(B, 1, H, W)` or `(B, 3, H, W)` with values in [0, 1].
    """
    if mean is None or std is None:
        low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
        plain = (image - low) / (high - low).clamp(min=1e-9)
    else:
        mean_of, std_of = (torch.as_tensor(values, device=image.device).view(1, -1, 1, 1) for values in (mean, std))
        plain = image * std_of + mean_of
    return plain[:, : 3 if image.shape[1] >= 3 else 1].clamp(0, 1)


def visualize_inputs(batch: Batch, mean: Sequence[float] | None, std: Sequence[float] | None) -> list[Visualization]:
    """Return a visualization of each input of a batch: the image and its dataset index; other inputs are only named.

    Args:
        batch: The batch.
        mean: Mean of each channel, as in `displayable`.
        std: Standard deviation of each channel.
    """
    texts = [""] * len(batch.target) if batch.index is None else [f"no. {one:,}" for one in batch.index.tolist()]
    if not isinstance(batch.input, Tensor) or batch.input.dim() != 4:
        return [Visualization(text or "sample") for text in texts]
    plain = displayable(batch.input.float(), mean, std)
    images = (255 * plain).round().to(torch.uint8).expand(-1, 3, -1, -1).cpu()
    return [Visualization(text, image) for text, image in zip(texts, images, strict=True)]
