"""Operations on logits and labels: target and non-target classes, means over labelled samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.devices import constant
from lkd.losses._checks import check_classes
from lkd.losses._precision import wide
from lkd.losses._shapes import check_shapes
from lkd.losses._softmax import log_softmax
from lkd.types import IGNORE_INDEX


def label_error(num_classes: int, error: Exception) -> ValueError:
    """Create the exception for a label that is out of range.

    Args:
        num_classes: Number of classes.
        error: Exception raised by PyTorch.
    """
    return ValueError(
        f"a label is out of range ({error}): the network has {num_classes} classes, so labels must lie in "
        f"0..{num_classes - 1}, or be {IGNORE_INDEX} for unlabelled images (in masks: the task's `ignore_index`)"
    )


def own_class(target: Tensor, logits: Tensor) -> Tensor:
    """Return the target as an index for `gather`, with class 0 for samples without a label.

    Args:
        target: Class indices `(B,)`, or `IGNORE_INDEX`.
        logits: Logits `(B, K)`.

    Returns:
        Indices `(B, 1)`; `labelled_mean` excludes the samples without a label.

    Raises:
        ValueError: If a label is out of range (on the CPU; on a GPU, a device-side assertion fails).
    """
    own = target.masked_fill(target == IGNORE_INDEX, 0).unsqueeze(1)
    try:
        logits.detach().gather(1, own)  # a comparison would synchronize with the GPU
    except (IndexError, RuntimeError) as error:
        raise label_error(logits.shape[1], error) from error
    return own


def labelled_mean(values: Tensor, target: Tensor) -> Tensor:
    """Average over the samples with a label; 0 if there are none.

    Args:
        values: One value per sample `(B,)`.
        target: Class indices `(B,)`, or `IGNORE_INDEX`.
    """
    labelled = target != IGNORE_INDEX
    return values.masked_fill(~labelled, 0).sum() / labelled.sum().clamp(min=1)


@check_shapes(logits="B K", target="B")
def labelled_cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy averaged over the samples with a label; 0 if there are none.

    Args:
        logits: Logits `(B, K)`.
        target: Class indices `(B,)`, or `IGNORE_INDEX`.
        label_smoothing: Label smoothing in [0, 1).

    Returns:
        Scalar loss in nats (float32 for half-precision inputs).

    Raises:
        ValueError: If a label is out of range (on the CPU; on a GPU, a device-side assertion fails).
    """
    return labelled_mean(cross_entropies(logits, target, label_smoothing), target)


@check_shapes(logits=("B K", "B K H W"), target=("B", "B H W"))
def cross_entropies(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    reduction: str = "none",
    class_weights: tuple[float, ...] | None = None,
) -> Tensor:
    """Cross-entropy of each sample or pixel; 0 for those without a label.

    Args:
        logits: Logits `(B, K)` or `(B, K, H, W)`.
        target: Class indices `(B,)` or `(B, H, W)`, or `IGNORE_INDEX`.
        label_smoothing: Label smoothing in [0, 1).
        reduction: `none` or `sum`.
        class_weights: Weight of each class (K values); with label smoothing, of each term of the sum over classes.

    Returns:
        Cross-entropies in nats, in the shape of the target, or their sum (float32 for half-precision inputs).

    Raises:
        ValueError: If a label is out of range (on the CPU; on a GPU, a device-side assertion fails).
    """
    logits = wide(logits)
    weights = None if class_weights is None else constant(class_weights, logits.dtype, logits.device)
    try:
        return F.cross_entropy(
            logits, target, weights, ignore_index=IGNORE_INDEX, reduction=reduction, label_smoothing=label_smoothing
        )
    except IndexError as error:
        raise label_error(logits.shape[1], error) from error


def mean_cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float = 0.0, class_weights: tuple[float, ...] | None = None
) -> Tensor:
    """Cross-entropy averaged over the labelled samples or pixels: the sum, divided by the number of labels.

    Args:
        logits: Logits `(B, K)` or `(B, K, H, W)`.
        target: Class indices `(B,)` or `(B, H, W)`; missing labels are `IGNORE_INDEX`.
        label_smoothing: Label smoothing factor, in [0, 1).
        class_weights: Weight of each class (K values). The divisor is then the sum of the weights of the labels.

    Returns:
        Scalar loss in nats, as in `torch.nn.CrossEntropyLoss`; 0 if there are no labels, or all their weights are 0.

    Raises:
        ValueError: If a label is out of range (on the CPU; on a GPU, a device-side assertion fails).
    """
    total = cross_entropies(logits, target, label_smoothing, "sum", class_weights)
    weight = total_weight(target, class_weights)
    if class_weights is None:
        return total / weight.clamp(min=1)
    return torch.where(weight > 0, total, 0) / torch.where(weight > 0, weight, 1)


def total_weight(target: Tensor, class_weights: tuple[float, ...] | None = None) -> Tensor:
    """Return the divisor of `mean_cross_entropy`: the number of labels, or the sum of their weights.

    Args:
        target: Class indices, or `IGNORE_INDEX`.
        class_weights: Weight of each class (K values).

    Returns:
        Scalar, int64 or, with weights, float32.
    """
    labelled = target != IGNORE_INDEX
    if class_weights is None:
        return labelled.sum()
    weights = constant(class_weights, torch.float32, target.device)[target.masked_fill(~labelled, 0)]
    return weights.masked_fill(~labelled, 0).sum()


def others(values: Tensor, own: Tensor) -> Tensor:
    """Remove one class from the values of each sample, keeping the order of the others.

    Args:
        values: One value per class `(B, K)`.
        own: Class to remove `(B, 1)`.

    Returns:
        Values of the remaining classes `(B, K - 1)`.
    """
    classes = torch.arange(values.shape[1] - 1, device=values.device)
    return values.gather(1, classes + (classes >= own))


def log_others(logits: Tensor, own: Tensor) -> Tensor:
    """Log-softmax over all classes except one.

    Args:
        logits: Logits `(B, K)`, with K at least 3.
        own: Class to remove `(B, 1)`.

    Returns:
        Log-probabilities `(B, K - 1)`.

    Raises:
        ValueError: If there are fewer than 3 classes.
    """
    check_classes(logits, 3, "compares the non-target classes")
    return log_softmax(others(logits, own))


def log_binary(logits: Tensor, own: Tensor) -> Tensor:
    """Return the log-probabilities `(B, 2)` of one class and of all other classes together.

    Args:
        logits: Logits `(B, K)`.
        own: Index of the one class `(B, 1)`.

    Raises:
        ValueError: If there are fewer than 2 classes.
    """
    check_classes(logits, 2, "compares one class with all others")
    log_p = log_softmax(logits)
    return torch.stack([log_p.gather(1, own).squeeze(1), others(log_p, own).logsumexp(1)], dim=1)
