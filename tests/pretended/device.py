"""Tensors whose values are in CPU memory and which report another device, the simulated one.

PyTorch separates devices as it does for a GPU: an operation on tensors of two devices is an error. Results are exact,
and autograd and optimizers work. Operations for which the host would wait for a GPU are counted in `waits`, by name.
While a `Tape` records, each of them is an error, as during the capture of a CUDA graph.

The device uses PyTorch's Python backend for the device type PrivateUse1. It has no kernels, streams, pinned memory,
autocast or random number generators of its own.
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
"""Number of times the host would have waited for a GPU, by name of the operation."""

_MOVES = ("_to_copy", "copy_", "lift_fresh")
_READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount", "repeat_interleave")
_READS += ("_linalg_svd", "_linalg_eigh", "linalg_qr")  # their libraries read results on the host
_READS += ("unique2", "_unique2", "unique_dim", "unique_consecutive")
_tape: list[tuple[Any, Any, Any, Any]] | None = None


class _Backend(_DummyBackendModule):
    """Backend functions that autocast and `fork_rng` require."""

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
torch.accelerator.synchronize = lambda *_: None  # PyTorch now calls this backend for every device


class DeviceTensor(torch.Tensor):
    """A tensor that wraps a CPU tensor and reports the simulated device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> DeviceTensor:
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
        return f"DeviceTensor({self.inner})"

    def tolist(self) -> Any:
        _record_wait("tolist")
        return self.detach().inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Mode in which tensors can be created on the simulated device and moved to it."""

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
    """Captured graph of the simulated device: operations that are executed again on the same tensors.

    As in a CUDA graph, Python numbers are constants, tensors are addresses, and replays run no Python code of the step.
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
        return result, lambda: _replay(tape)


def _replay(tape: list[tuple[Any, Any, Any, Any]]) -> None:
    with _disable_current_modes(), torch.no_grad():
        for func, args, kwargs, recorded in tape:
            for old, new in zip(recorded, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _aliases(tree: Any) -> Any:
    """Return tensors that share memory but keep their current shape if the originals are changed (`squeeze_`)."""
    with _disable_current_modes():
        return tree_map_only(torch.Tensor, torch.Tensor.detach, tree)


def _is_view(func: Any, args: Any, result: Any) -> bool:
    """Return whether the results are views of the arguments, which replays need not compute."""
    if func._schema.is_mutable:
        return False
    places = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return bool(made) and all(leaf.untyped_storage().data_ptr() in places for leaf in made)


def _record_wait(name: str) -> None:
    if _tape is not None:
        raise RuntimeError(f"{name}: operation not permitted while a graph is captured")
    waits[name] += 1


def _waits(name: str, args: Any, kwargs: Any, target: torch.device | None, host: list[torch.Tensor]) -> bool:
    """Return whether the host would wait for a GPU in an operation."""
    if name in _READS:
        return True
    if name == "_to_copy":  # copies from the device always wait, others unless non-blocking
        from_device, to_device = isinstance(args[0], DeviceTensor), target is not None and target.type == NAME
        return target is not None and from_device != to_device and not (to_device and kwargs.get("non_blocking"))
    if name == "copy_":
        apart = isinstance(args[0], DeviceTensor) != isinstance(args[1], DeviceTensor)
        waiting = not isinstance(args[0], DeviceTensor) or not (
            kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        )
        return apart and waiting
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
        fills = name != "index" and args[2].numel() == 1  # filling a mask does not require its count
        return bool(host) or (bool(masks) and not fills)
    return name.startswith("index") and isinstance(args[0], DeviceTensor) and bool(host)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    if func is torch.ops.aten.to.device:  # `x.to(y)` in inference mode
        settings = zip(("device", "dtype", "non_blocking", "copy"), args[1:], strict=False)
        func, args, kwargs = torch.ops.aten.to.dtype_layout, args[:1], {**dict(settings), **kwargs}
    if func is torch.ops.aten.to.dtype_layout and kwargs.get("device") != args[0].device:
        func = torch.ops.aten._to_copy.default  # in inference mode, a move between devices arrives like this
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    device: list[DeviceTensor] = []
    host: list[torch.Tensor] = []
    args_ = [_unwrap(value, device, host) for value in args]
    kwargs_ = {key: _unwrap(value, device, host) for key, value in kwargs.items()}
    if not device and not (target is not None and target.type == NAME):
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    host = [tensor for tensor in host if tensor.dim()]
    indexes = name.startswith("index") and isinstance(args[0], DeviceTensor)  # indices may be on the CPU
    if device and host and name not in _MOVES and not indexes:
        shapes = [tuple(tensor.shape) for tensor in host]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {DEVICE} and cpu {shapes}")
    if _waits(name, args, kwargs, target, host):
        _record_wait(name)
    if target is not None:
        kwargs_["device"] = torch.device("cpu")
    kwargs_.pop("pin_memory", None)
    result = func(*args_, **kwargs_)
    if _tape is not None and not _is_view(func, args_, result):
        _tape.append((func, *_aliases((args_, kwargs_)), tree_leaves(_aliases(result))))
    if func._schema.is_mutable and not func._schema.name.endswith("batch_norm"):
        return kwargs["out"] if "out" in kwargs else args[0] if func._schema.returns else None
    to_host = name == "_to_copy" and target is not None and target.type == "cpu"
    return result if to_host else _wrap(result)


def _unwrap(value: Any, device: list[DeviceTensor], host: list[torch.Tensor]) -> Any:
    """Return a value with unwrapped tensors; append the tensors of each device to its list."""
    if isinstance(value, torch.Tensor):
        if isinstance(value, DeviceTensor):
            device.append(value)
            return value.inner
        host.append(value)
        return value
    if type(value) in (list, tuple):
        return [_unwrap(part, device, host) for part in value]
    return value


def _wrap(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return DeviceTensor(result)
    return type(result)(map(_wrap, result)) if type(result) in (list, tuple) else result


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
    return DeviceTensor(torch.empty(size, dtype=dtype))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if isinstance(source, DeviceTensor) != isinstance(target, DeviceTensor) and not (
        non_blocking and isinstance(target, DeviceTensor)
    ):
        _record_wait("torch.tensor")
    ours, theirs = (tensor.inner if isinstance(tensor, DeviceTensor) else tensor for tensor in (source, target))
    theirs.copy_(ours)
    return target


_library = torch.library.Library("aten", "IMPL")  # called by `torch.tensor(..., device=...)`
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
