"""Logits and labels: the target class and all others, and means over the images that have a label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses.precision import wide
from lkd.types import IGNORE_INDEX


def own_class(target: Tensor) -> Tensor:
    """The target as an index; class 0 where there is no label, for `labelled_mean` to drop.

    Args:
        target: `(B,)`; `IGNORE_INDEX` where there is no label.

    Returns:
        `(B, 1)`.
    """
    return target.clamp(min=0).unsqueeze(1)


def labelled_mean(values: Tensor, target: Tensor) -> Tensor:
    """Mean over the samples with a label; 0 if there is none.

    Args:
        values: `(B,)`.
        target: `(B,)`; `IGNORE_INDEX` where there is no label.
    """
    labelled = target != IGNORE_INDEX
    return values.masked_fill(~labelled, 0).sum() / labelled.sum().clamp(min=1)


def labelled_cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of the samples with a label; 0 if there is none.

    Args:
        logits: `(B, K)`.
        target: `(B,)`; `IGNORE_INDEX` where there is no label.
        label_smoothing: Share of the target's probability spread over all classes, in [0, 1).

    Returns:
        A scalar in nats; float32 for logits in half precision, else the logits' type.
    """
    values = F.cross_entropy(
        wide(logits), target, ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=label_smoothing
    )
    return labelled_mean(values, target)


def others(values: Tensor, own: Tensor) -> Tensor:
    """The values of all classes but one, in their order.

    Args:
        values: `(B, K)`.
        own: The class to leave out `(B, 1)`.

    Returns:
        `(B, K - 1)`.
    """
    classes = torch.arange(values.shape[1] - 1, device=values.device)
    return values.gather(1, classes + (classes >= own))


def log_others(logits: Tensor, own: Tensor) -> Tensor:
    """Log-probabilities of all classes but one, among themselves.

    Args:
        logits: `(B, K)`, K at least 3.
        own: The class to leave out `(B, 1)`.

    Returns:
        `(B, K - 1)`.

    Raises:
        ValueError: If there are fewer than 3 classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(
            "this criterion compares the classes beside the target with one another, which needs at least 3 classes; "
            f"the logits have {logits.shape[1]}: take KD"
        )
    return F.log_softmax(others(logits, own), dim=1)
