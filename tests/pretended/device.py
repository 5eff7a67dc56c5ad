"""Tensors that hold real numbers in CPU memory and report another device.

PyTorch separates devices as it does for a GPU: an operation on tensors of two devices is an error, results are exact,
autograd and optimizers work. Everything for which a GPU would make the host wait is counted in `waits`, by operation.
While a `Tape` records, each of those is an error, as it is during the capture of a CUDA graph.

It is built on PyTorch's Python backend for the device type PrivateUse1. It has no kernels, streams, pinned memory,
autocast or random generators of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretended"
T = TypeVar("T")
waits: Counter[str] = Counter()
"""What a GPU would have made the host wait for, by the name of the operation."""

_MOVES = ("_to_copy", "copy_", "lift_fresh")
_READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount", "repeat_interleave")
_READS += ("_linalg_svd", "_linalg_eigh", "linalg_qr")  # their libraries look at what they find
_READS += ("unique2", "_unique2", "unique_dim", "unique_consecutive")
_tape: list[tuple[Any, Any, Any, Any]] | None = None


class _Backend(_DummyBackendModule):
    """What autocast and forked random states need of a backend."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_autocast_enabled(self) -> bool:
        return False

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)
torch.accelerator.synchronize = lambda *_: None  # PyTorch now asks this backend, whatever a test runs on


class There(torch.Tensor):
    """A tensor that reports the pretended device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"There({self.inner})"

    def tolist(self) -> Any:
        _wait("tolist")
        return self.detach().inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Within it, tensors can be created on, and moved to, the pretended device."""

    def __enter__(self) -> Pretend:
        self._before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        waits.clear()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(self._before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Tape:
    """The pretended device's captured graph: operations with their arguments, executed again on the same tensors.

    As in a CUDA graph, Python numbers are constants, tensors are addresses, and nothing of Python runs in a replay.
    """

    scalar = torch.float64  # the CPU's fused optimizers read a learning rate as a double

    def warm_up(self, function: Callable[[], T]) -> T:
        return function()

    def capture(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        global _tape
        tape: list[tuple[Any, Any, Any, Any]] = []
        _tape = tape
        try:
            result = function()
        finally:
            _tape = None
        return result, lambda: _play(tape)


def _play(tape: list[tuple[Any, Any, Any, Any]]) -> None:
    with _disable_current_modes(), torch.no_grad():
        for func, args, kwargs, recorded in tape:
            for old, new in zip(recorded, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _as_now(tree: Any) -> Any:
    """Tensors of the same memory that keep their present shape, whatever becomes of the others (`squeeze_`)."""
    with _disable_current_modes():
        return tree_map_only(torch.Tensor, torch.Tensor.detach, tree)


def _is_view(func: Any, args: Any, result: Any) -> bool:
    """Whether the results are memory of the arguments, which needs no second execution."""
    if func._schema.is_mutable:
        return False
    places = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return bool(made) and all(leaf.untyped_storage().data_ptr() in places for leaf in made)


def _wait(name: str) -> None:
    if _tape is not None:
        raise RuntimeError(f"{name}: operation not permitted while a graph is captured")
    waits[name] += 1


def _makes_wait(name: str, args: Any, kwargs: Any, target: torch.device | None, here: list[torch.Tensor]) -> bool:
    """Whether a GPU would make the host wait for an operation."""
    if name in _READS:
        return True
    if name == "_to_copy":  # between the devices: from the device always, to it unless told otherwise
        from_device, to_device = isinstance(args[0], There), target is not None and target.type == NAME
        return target is not None and from_device != to_device and not (to_device and kwargs.get("non_blocking"))
    if name == "copy_":
        apart = isinstance(args[0], There) != isinstance(args[1], There)
        waiting = not isinstance(args[0], There) or not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        return apart and waiting
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
        fills = name != "index" and args[2].numel() == 1  # a mask with one value fills, and need not be counted
        return bool(here) or (bool(masks) and not fills)
    return name.startswith("index") and isinstance(args[0], There) and bool(here)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    if func is torch.ops.aten.to.device:  # `x.to(y)` in inference mode
        settings = zip(("device", "dtype", "non_blocking", "copy"), args[1:], strict=False)
        func, args, kwargs = torch.ops.aten.to.dtype_layout, args[:1], {**dict(settings), **kwargs}
    if func is torch.ops.aten.to.dtype_layout and kwargs.get("device") != args[0].device:
        func = torch.ops.aten._to_copy.default  # in inference mode, a move between devices arrives like this
    if func is torch.ops.aten.to.device:  # and so does `tensor.to(other)`
        func, args, kwargs = torch.ops.aten._to_copy.default, args[:1], {"device": args[1], "dtype": args[2]}
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    there: list[There] = []
    here: list[torch.Tensor] = []
    args_ = [_inner(value, there, here) for value in args]
    kwargs_ = {key: _inner(value, there, here) for key, value in kwargs.items()}
    if not there and not (target is not None and target.type == NAME):
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    here = [tensor for tensor in here if tensor.dim()]
    indexes = name.startswith("index") and isinstance(args[0], There)  # indices may be on the CPU
    if there and here and name not in _MOVES and not indexes:
        shapes = [tuple(tensor.shape) for tensor in here]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {DEVICE} and cpu {shapes}")
    if _makes_wait(name, args, kwargs, target, here):
        _wait(name)
    if target is not None:
        kwargs_["device"] = torch.device("cpu")
    kwargs_.pop("pin_memory", None)
    result = func(*args_, **kwargs_)
    if _tape is not None and not _is_view(func, args_, result):
        _tape.append((func, *_as_now((args_, kwargs_)), tree_leaves(_as_now(result))))
    if func._schema.is_mutable and not func._schema.name.endswith("batch_norm"):
        return kwargs["out"] if "out" in kwargs else args[0] if func._schema.returns else None
    to_host = name == "_to_copy" and target is not None and target.type == "cpu"
    return result if to_host else _outer(result)


def _inner(value: Any, there: list[There], here: list[torch.Tensor]) -> Any:
    """What a value is on the host; tensors of both places are added to the lists."""
    if isinstance(value, torch.Tensor):
        if isinstance(value, There):
            there.append(value)
            return value.inner
        here.append(value)
        return value
    if type(value) in (list, tuple):
        return [_inner(part, there, here) for part in value]
    return value


def _outer(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return There(result)
    return type(result)(map(_outer, result)) if type(result) in (list, tuple) else result


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
    return There(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
    return There(torch.empty(size, dtype=dtype))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if isinstance(source, There) != isinstance(target, There) and not (non_blocking and isinstance(target, There)):
        _wait("torch.tensor")
    ours, theirs = (tensor.inner if isinstance(tensor, There) else tensor for tensor in (source, target))
    theirs.copy_(ours)
    return target


_library = torch.library.Library("aten", "IMPL")  # what `torch.tensor(..., device=...)` calls in the backend
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
