"""Validation of tensor shapes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from lkd.types import Predictions

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Sizes = dict[str, int | torch.Size]
Form = str | tuple[str, ...]


class _Shape(NamedTuple):
    """Parsed shape: factor and name of each size, and an optional trailing `...` or `*`."""

    dims: tuple[tuple[int, str], ...]
    rest: str

    def __str__(self) -> str:
        names = [f"{factor} * {name}" if factor > 1 and name else name or str(factor) for factor, name in self.dims]
        names += [self.rest] if self.rest else []
        return f"({names[0]},)" if len(names) == 1 else f"({', '.join(names)})"

    def of_item(self, number: int) -> _Shape:
        """Return the shape of one item of a list, in which sizes whose names end with `_l` are specific to the item."""
        dims = ((factor, f"{name[:-1]}{number}" if name.endswith("_l") else name) for factor, name in self.dims)
        return self._replace(dims=tuple(dims))

    def fits(self, shape: torch.Size, sizes: _Sizes) -> bool:
        """Check whether a shape matches and agrees with the sizes found so far; add its own sizes to them."""
        given = len(self.dims)
        if len(shape) < given or (len(shape) > given and not self.rest):
            return False
        if self.rest == "*" and sizes.setdefault("*", shape[given:]) != shape[given:]:
            return False
        for (factor, name), size in zip(self.dims, shape[:given], strict=True):
            if size % factor or (sizes.setdefault(name, size // factor) if name else 1) != size // factor:
                return False
        return True


def check_shapes(**forms: Form) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator that checks the shapes of a function's tensors.

    It compares Python numbers only, so it never waits for the device, and it works under `torch.compile` and `vmap`.

    Args:
        forms: Expected shapes by argument name. Sizes are separated by spaces. A name such as `B` stands for the same
            size wherever it occurs, `4B` for four times that size, and `1` for itself. A final `...` stands for any
            further dimensions, and a final `*` for further dimensions that are the same wherever `*` occurs. A tuple
            lists alternatives with different numbers of dimensions. If the argument is a list, each item has this
            shape, and names that end with `_l` stand for sizes of the l-th item. Arguments that are not tensors are
            not checked.

    Returns:
        The decorator. The decorated function raises a `ValueError` for any other shape.

    Example:
        >>> @check_shapes(logits="B K", target="B")
        ... def loss(logits, target): ...
        >>> loss(torch.zeros(2, 3), torch.zeros(4))
        Traceback (most recent call last):
        ValueError: loss expects target of shape (B,) with B = 2, got (4,); make the shapes agree
    """
    parsed = {
        name: [_parsed(one) for one in ((form,) if isinstance(form, str) else form)] for name, form in forms.items()
    }

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        names = list(inspect.signature(function).parameters)
        arguments = [(name, names.index(name), shapes) for name, shapes in parsed.items()]
        owner = function.__name__.lstrip("_")

        @wraps(function)
        def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            sizes: _Sizes = {}
            for name, place, shapes in arguments:
                value = args[place] if place < len(args) else kwargs.get(name)
                if isinstance(value, Tensor):
                    _check(owner, name, value.shape, shapes, sizes)
                elif isinstance(value, (list, tuple)):
                    _check_items(owner, name, value, shapes, sizes)
            return function(*args, **kwargs)

        return wrapped

    return decorate


def _parsed(form: str) -> _Shape:
    names = form.split()
    rest = names.pop() if names and names[-1] in ("...", "*") else ""
    parts = [re.findall(r"^(\d*)(.*)$", name)[0] for name in names]
    return _Shape(tuple((int(factor or 1), name) for factor, name in parts), rest)


def _check_items(owner: str, name: str, values: Sequence[object], shapes: Sequence[_Shape], sizes: _Sizes) -> None:
    if isinstance(values, Predictions):
        raise ValueError(
            f"{owner} expects {name} as a tensor, got the predictions of a detector; to apply the criterion to each "
            "anchor, use lkd.losses.PerAnchor"
        )
    number = sizes.setdefault("number of layers", len(values))
    if number != len(values):
        raise ValueError(f"{owner} expects {number} {name}, one for each layer, got {len(values)}")
    for item, value in enumerate(values):
        if isinstance(value, Tensor):
            _check(owner, f"{name}[{item}]", value.shape, [shape.of_item(item) for shape in shapes], sizes)


def _check(owner: str, name: str, shape: torch.Size, shapes: Sequence[_Shape], sizes: _Sizes) -> None:
    known = dict(sizes)
    if any(form.fits(shape, sizes) for form in shapes):
        return
    read = {dim for form in shapes for _, dim in form.dims} | {form.rest for form in shapes}
    found = [
        f"{dim} = {tuple(size) if isinstance(size, torch.Size) else size}" for dim, size in known.items() if dim in read
    ]
    wanted = " or ".join(map(str, shapes)) + (f" with {', '.join(found)}" if found else "")
    same_rank = len(shape) in {len(form.dims) for form in shapes}
    remedy = "make the shapes agree" if same_rank else "reshape it"
    if len(shape) == 4 and name.endswith("_logits"):
        remedy = "to apply the criterion to each pixel, use lkd.losses.PerPixel"
    if len(shape) == 3 and name == "target":
        remedy = "the function requires one class per image and does not apply to masks"
    raise ValueError(f"{owner} expects {name} of shape {wanted}, got {tuple(shape)}; {remedy}")
