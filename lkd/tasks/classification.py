"""Image classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lkd.features.extractor import logits_of
from lkd.losses._labels import cross_entropies, mean_cross_entropy
from lkd.tasks.base import Task
from lkd.tasks.metrics import Accuracy
from lkd.tasks.visualization import Visualization, class_name
from lkd.types import IGNORE_INDEX, Mixed

_SHOWN = 3
"""Number of most probable classes that are shown for an image."""


class Classification(Task):
    """One class per input: networks return logits `(B, K)`, targets are class indices `(B,)`."""

    caches_logits = True
    pipeline_tag = "image-classification"

    def logits(self, output: Any) -> Tensor:
        """Return the logits `(B, K)`: the output itself, `.logits` or `["logits"]`."""
        return logits_of(output)

    def chance(self, num_classes: int) -> float:
        """Return 1 / K, the expected accuracy of uniformly random predictions."""
        return 1 / num_classes

    def check(self, name: str, logits: Tensor) -> None:
        """Check that a network returns logits `(B, K)`.

        Raises:
            ValueError: If it does not.
        """
        if logits.ndim != 2:
            shape = tuple(logits.shape)
            hint = "; for segmentation, set the task lkd.tasks.SemanticSegmentation" if logits.ndim == 4 else ""
            raise ValueError(
                f"the {name} must return logits of shape (batch, classes), got {shape} for one input{hint}"
            )

    def blank_target(self, logits: Tensor) -> Tensor:
        """Return class 0 for each input `(B,)`."""
        return torch.zeros(len(logits), dtype=torch.int64, device=logits.device)

    def loss(self, logits: Tensor, target: Tensor, label_smoothing: float = 0.0, mixed: Mixed | None = None) -> Tensor:
        """Compute the cross-entropy, averaged over the labelled images.

        The labels of a mixed image and of its partner, if it has one, are weighted accordingly.
        """
        if mixed is None:
            return mean_cross_entropy(logits, target, label_smoothing)
        labelled = target != IGNORE_INDEX
        own = cross_entropies(logits, target, label_smoothing)
        other = cross_entropies(logits, mixed.target, label_smoothing) * labelled
        return (mixed.weight * own + (1 - mixed.weight) * other).sum() / labelled.sum().clamp(min=1)

    def labelled(self, target: Tensor) -> Tensor:
        """Return the number of images with a label."""
        return (target != IGNORE_INDEX).sum()

    def correct(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the number of images that are classified correctly."""
        return (logits.argmax(1) == target).sum()

    def metrics(self) -> dict[str, Metric]:
        """Create the accuracy, `acc`."""
        return {"acc": Accuracy()}

    def update(self, metrics: Mapping[str, Metric], logits: Tensor, target: Tensor) -> None:
        """Update the accuracy."""
        for metric in metrics.values():
            metric.update(logits, target)

    def choice(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the predicted class of each image `(B,)`."""
        return logits.argmax(1).masked_fill(target == IGNORE_INDEX, IGNORE_INDEX)

    def visualize(
        self, target: Tensor, class_names: Sequence[str], logits: Tensor | None = None
    ) -> list[Visualization]:
        """Return the class of each image or, with logits, the most probable classes with their probabilities."""
        if logits is None:
            return [Visualization(class_name(class_names, one) if one >= 0 else "no label") for one in target.tolist()]
        found = logits.float().softmax(1).topk(min(_SHOWN, logits.shape[1]), dim=1)
        rows = zip(found.values.tolist(), found.indices.tolist(), strict=True)
        return [Visualization("\n".join(_line(*one, class_names) for one in zip(*row, strict=True))) for row in rows]


def _line(probability: float, number: int, class_names: Sequence[str]) -> str:
    return f"{100 * probability:.0f}% {class_name(class_names, number)}"


def check_is_classification(module: Any, user: str) -> None:
    """Check that the task of a module is classification, for commands and callbacks that read logits `(B, K)`.

    Args:
        module: A module; one without a task is assumed to be a classifier.
        user: What supports only classification, for the error message.

    Raises:
        ValueError: If it is another task.
    """
    task = getattr(module, "task", None)
    if not isinstance(task, Classification | None):
        raise ValueError(
            f"{user} supports classification only, but the task is {type(task).__name__}; `lkd test` evaluates it"
        )
