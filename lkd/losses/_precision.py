"""Numerical precision of losses under autocast and for half-precision inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.losses._shapes import check_shapes

_P = ParamSpec("_P")
_R = TypeVar("_R")


def wide(tensor: Tensor) -> Tensor:
    """Convert half precision to float32, so that sums and small probabilities keep their digits.

    Args:
        tensor: Tensor of any shape.

    Returns:
        The tensor itself, or its float32 copy.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def full_precision(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator that evaluates a function in single precision or higher.

    Half-precision arguments are converted to float32, and autocast is disabled inside the function. It is used for
    losses with matrix products, which autocast would evaluate in half precision.

    Args:
        function: Function of at least one tensor or sequence of tensors.

    Returns:
        The decorated function with the same signature.
    """

    @wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        widened, named = [_widened(arg) for arg in args], {name: _widened(arg) for name, arg in kwargs.items()}
        with torch.autocast(_device_of([*widened, *named.values()]), enabled=False):
            return function(*widened, **named)  # type: ignore[arg-type]

    return wrapped


@check_shapes(student="*", teacher="*")
@full_precision
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error in single precision or higher.

    Args:
        student: Student tensor `(*)`.
        teacher: Teacher tensor `(*)` of the same shape.

    Returns:
        Scalar loss.
    """
    return F.mse_loss(student, teacher)


def _device_of(args: list[object]) -> str:
    flat = [part for arg in args for part in (arg if isinstance(arg, (list, tuple)) else [arg])]
    return next(part.device.type for part in flat if isinstance(part, Tensor))


def _widened(arg: object) -> object:
    if isinstance(arg, Tensor):
        return wide(arg)
    return [_widened(part) for part in arg] if isinstance(arg, (list, tuple)) else arg
