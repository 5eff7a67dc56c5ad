"""Operations on logits and labels: target and non-target classes, means over labelled samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses._checks import check_classes
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.types import IGNORE_INDEX


def label_error(num_classes: int, error: Exception) -> ValueError:
    """What to raise where a label is out of range.

    Args:
        num_classes: How many classes there are.
        error: What PyTorch says of it.
    """
    return ValueError(
        f"a label is out of range ({error}): the network has {num_classes} classes, so labels must lie in "
        f"0..{num_classes - 1}, or be {IGNORE_INDEX} for images without one"
    )


def own_class(target: Tensor, logits: Tensor) -> Tensor:
    """The target as an index; class 0 where there is no label, for `labelled_mean` to drop.

    Args:
        target: `(B,)`; `IGNORE_INDEX` where there is no label.
        logits: `(B, K)`.

    Returns:
        `(B, 1)`.

    Raises:
        ValueError: If a label is out of range (noticed on the CPU; a GPU stops with an assertion).
    """
    own = target.masked_fill(target == IGNORE_INDEX, 0).unsqueeze(1)
    try:
        logits.detach().gather(1, own)  # not by comparing: asking a GPU for the answer would hold the step up
    except (IndexError, RuntimeError) as error:
        raise label_error(logits.shape[1], error) from error
    return own


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

    Raises:
        ValueError: If a label is out of range (noticed on the CPU; a GPU stops with an assertion).
    """
    return labelled_mean(cross_entropies(logits, target, label_smoothing), target)


@check_shapes(logits="B K", target="B")
def cross_entropies(logits: Tensor, target: Tensor, label_smoothing: float = 0.0, reduction: str = "none") -> Tensor:
    """Cross-entropies with the labels; 0 where there is none.

    Args:
        logits: `(B, K)`.
        target: `(B,)`; `IGNORE_INDEX` where there is no label.
        label_smoothing: Share of the target's probability spread over all classes, in [0, 1).
        reduction: `none`, or `sum`.

    Returns:
        `(B,)` in nats, or their sum; float32 for logits in half precision, else the logits' type.

    Raises:
        ValueError: If a label is out of range (noticed on the CPU; a GPU stops with an assertion).
    """
    try:
        return F.cross_entropy(
            wide(logits), target, ignore_index=IGNORE_INDEX, reduction=reduction, label_smoothing=label_smoothing
        )
    except IndexError as error:
        raise label_error(logits.shape[1], error) from error


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
    check_classes(logits, 3, "compares the classes beside the target with one another")
    return F.log_softmax(others(logits, own), dim=1)


def log_binary(logits: Tensor, own: Tensor) -> Tensor:
    """Log-probabilities `(B, 2)` of one class, and of all others together."""
    check_classes(logits, 2, "compares one class with all others")
    log_p = F.log_softmax(logits, dim=1)
    return torch.stack([log_p.gather(1, own).squeeze(1), others(log_p, own).logsumexp(1)], dim=1)
