"""Softmax over the classes."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

_FEW_CLASSES, _MANY_SAMPLES = 16, 4096


def softmax(logits: Tensor) -> Tensor:
    """Compute the probabilities of the classes.

    Args:
        logits: Logits `(B, K)`.

    Returns:
        Probabilities `(B, K)`.
    """
    return _over_classes(F.softmax, logits)


def log_softmax(logits: Tensor) -> Tensor:
    """Compute the log-probabilities of the classes.

    Args:
        logits: Logits `(B, K)`.

    Returns:
        Log-probabilities `(B, K)`.
    """
    return _over_classes(F.log_softmax, logits)


def _over_classes(function: Callable[..., Tensor], logits: Tensor) -> Tensor:
    """Apply a function to dimension 1.

    The logits of pixels are stored by class, so they are processed in this order. Moreover, PyTorch's CPU kernels for
    the last dimension are slow if it is small, so the logits of many samples with few classes are transposed first.
    """
    is_narrow = len(logits) >= _MANY_SAMPLES and logits.shape[1] < _FEW_CLASSES
    if is_narrow or (len(logits) > 1 and logits.t().is_contiguous()):
        return function(logits.t().contiguous(), dim=0).t()
    return function(logits, dim=1)
