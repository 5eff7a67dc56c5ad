"""The small things that everything passes around."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100
"""The target of an image that has no label: it counts in no hard loss and in no metric."""


class Mixed(NamedTuple):
    """With what each image of a batch is mixed.

    Attributes:
        target: Class of each image's partner `(B,)`, int64; `IGNORE_INDEX` where it has no label, or there is none.
        weight: The image's own share `(B,)`, float32, 0.5 to 1; the partner has the rest.
    """

    target: Tensor
    weight: Tensor

    @classmethod
    def none(cls, like: Tensor) -> Mixed:
        """For images that are not mixed.

        Args:
            like: Their classes `(B,)`.
        """
        return cls(torch.full_like(like, IGNORE_INDEX), torch.ones_like(like, dtype=torch.float32))


class Batch(NamedTuple):
    """What one step sees.

    Attributes:
        input: What the networks take: images `(B, C, H, W)`, float, normalised; or, for other data, whatever
            the user's networks are called with.
        target: Classes `(B,)`, int64; `IGNORE_INDEX` where there is no label.
        index: Position of each sample in its data set `(B,)`, int64; None if the data does not tell.
        views: How many views of each image there are, one behind the other: `input` is then `(views * B, ...)`, first
            all first views, and so are `target` and `index`. A view that is not to be classified has the target
            `IGNORE_INDEX`.
        version: Which of an image's augmented versions this is `(B,)`, int64: version and index decide every pixel.
            None if the data does not tell.
        mixed: With what the images are mixed; `target` is then their own, heavier label. None if they are not.
    """

    input: Any
    target: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    views: int = 1
    version: Tensor | None = None
    mixed: Mixed | None = None


class Outputs(NamedTuple):
    """What one network answers.

    Attributes:
        logits: `(B, K)`, before softmax.
        features: Layer name to what that layer returned.
    """

    logits: Tensor
    features: Mapping[str, Any]


class Probe(NamedTuple):
    """A network and its `Outputs` for one blank input: what a criterion needs to build its adapters."""

    network: nn.Module
    outputs: Outputs


@dataclass(frozen=True)
class Normalization:
    """How images are normalised for a network: `(image - mean) / std` per channel, image in [0, 1].

    Args:
        mean: One value per channel.
        std: One positive value per channel.

    Raises:
        ValueError: If the lengths differ or a standard deviation is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(f"normalization needs as many means as stds, got {len(self.mean)} and {len(self.std)}")
        if min(self.std) <= 0:
            raise ValueError(f"normalization needs positive stds, got {self.std}")
