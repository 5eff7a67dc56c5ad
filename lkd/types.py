"""Basic types: batches, network outputs and input normalization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lkd._compat import tree_leaves, tree_map_only

IGNORE_INDEX = -100
"""Label of images or pixels without a label, which are excluded from the cross-entropy and from the metrics."""


class Mixed(NamedTuple):
    """Partners and weights of mixed images (Mixup, CutMix).

    Attributes:
        target: Classes of the partners `(B,)`, int64; `IGNORE_INDEX` if a partner has no label or does not exist.
        weight: Weight of the image itself `(B,)`, float32, between 0.5 and 1; the partner has the remaining weight.
    """

    target: Tensor
    weight: Tensor

    @classmethod
    def none(cls, like: Tensor) -> Mixed:
        """Create the entry of images that are not mixed.

        Args:
            like: Classes of the images `(B,)`.
        """
        return cls(torch.full_like(like, IGNORE_INDEX), torch.ones_like(like, dtype=torch.float32))


class Batch(NamedTuple):
    """Input of a training or evaluation step.

    Attributes:
        input: Input of the networks: normalized float images `(B, C, H, W)`, for detection a list of images
            `(C, H_i, W_i)`, or any other input of custom networks.
        target: Class indices `(B,)`, int64; `IGNORE_INDEX` for samples without a label. Other tasks define their own,
            for example a list with one entry per image.
        index: Position of each sample in its dataset `(B,)`, int64; None if unknown.
        views: Number of views of each image. With several views, `input` is `(views * B, ...)`, starting with the first
            view of all images; `target` and `index` have the same order. Views that should not be classified have the
            target `IGNORE_INDEX`.
        version: Augmented variant of each image `(B,)`, int64. Variant and index determine all pixels. None if unknown.
        mixed: Partners and weights of mixed images; `target` then holds the classes of the images themselves, which
            have the larger weights. None if the images are not mixed.
    """

    input: Any
    target: Any
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which is not needed
    views: int = 1
    version: Tensor | None = None
    mixed: Mixed | None = None

    @property
    def size(self) -> int:
        """Number of samples, in all views together."""
        if self.index is not None:
            return len(self.index)
        if type(self.target) in (list, tuple):
            return len(self.target)
        return len(next(leaf for leaf in tree_leaves(self.target) if isinstance(leaf, Tensor)))

    def rows(self, rows: Sequence[int]) -> Batch:
        """Return some samples of a batch with one view: rows of tensors, and entries of a list of images or targets.

        Args:
            rows: Positions of the samples in the batch.
        """
        listed = type(self.target) in (list, tuple)

        def select(value: Any) -> Any:
            if listed and isinstance(value, (list, tuple)):
                return [value[row] for row in rows]
            return tree_map_only(Tensor, lambda leaf: leaf[torch.tensor(rows, device=leaf.device)], value)

        return Batch(select(self.input), select(self.target), select(self.index), version=select(self.version))


class Outputs(NamedTuple):
    """Outputs of a network.

    Attributes:
        logits: Logits `(B, K)`, or what the task defines, such as `Predictions` for detection.
        features: Mapping from layer names to the outputs of these layers.
        raw: Unprocessed output of the network, which may contain auxiliary outputs; None if unknown, as with cached
            logits.
    """

    logits: Any
    features: Mapping[str, Any]
    raw: Any = None


class Probe(NamedTuple):
    """A network and its outputs for a blank input, from which a criterion builds its adapters.

    Attributes:
        network: The network.
        outputs: Its outputs for one blank input.
    """

    network: nn.Module
    outputs: Outputs


class Predictions(NamedTuple):
    """Predictions of a detector for a batch of images, before boxes are selected.

    Losses and detections are computed from them on demand, so a teacher computes neither during training.

    Attributes:
        detector: The detector, an `lkd.models.Detector`.
        num_classes: Number of classes K, including class 0, the background.
        areas: Height and width of the area that the feature maps cover, in pixels of each input image.
        class_logits: Class logits of all anchors `(B, N, K)`; `None` for two-stage detectors.
        values: Tensors from which the detector computes its losses and detections.
    """

    detector: Any
    num_classes: int
    areas: tuple[tuple[float, float], ...]
    class_logits: Tensor | None
    values: Mapping[str, Any]

    def losses(self, target: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Compute the terms of the detector's own loss.

        Args:
            target: `boxes` `(N_i, 4)`, x1, y1, x2, y2 in pixels, and `labels` `(N_i,)`, int64, of each image.
        """
        losses: dict[str, Tensor] = self.detector.losses(self, target)
        return losses

    def detections(self) -> list[dict[str, Tensor]]:
        """Select the best boxes of each image: `boxes` `(M_i, 4)` in pixels, `scores` and `labels` `(M_i,)`."""
        found: list[dict[str, Tensor]] = self.detector.detections(self)
        return found


@dataclass(frozen=True)
class Normalization:
    """Normalization of images with values in [0, 1]: `(image - mean) / std` per channel.

    Args:
        mean: Mean of each channel.
        std: Standard deviation of each channel, greater than 0.

    Raises:
        ValueError: If the lengths differ or a standard deviation is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have the same length, got {len(self.mean)} and {len(self.std)}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
