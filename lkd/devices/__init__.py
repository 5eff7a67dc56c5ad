"""All decisions that depend on the device. Tests replace these functions to simulate a GPU."""

from __future__ import annotations

import platform
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lkd._compat import cpu_has_amx, cpu_has_avx512_bf16
from lkd.devices.capture import Capture, CudaCapture


def is_gpu(device: torch.device) -> bool:
    """Return whether a device computes asynchronously and should receive whole batches and fused operations.

    Args:
        device: Any device.
    """
    return device.type == "cuda"


def step_capture(device: torch.device) -> Capture | None:
    """Return the mechanism that captures a step on a device for replay; `None` if the device does not support it.

    Args:
        device: Any device.
    """
    return CudaCapture() if device.type == "cuda" else None


def free_memory(device: torch.device) -> int:
    """Return the free memory of a GPU in bytes.

    Args:
        device: The GPU.
    """
    return torch.cuda.mem_get_info(device)[0]


def pins_memory() -> bool:
    """Return whether batches created on the host should be in pinned memory, from which a GPU copies asynchronously."""
    return torch.cuda.is_available()


def has_bf16_units(gpu: bool) -> bool:
    """Return whether the device multiplies faster in bfloat16 than in float32.

    Args:
        gpu: Whether to check the current CUDA device instead of the CPU.
    """
    return torch.cuda.get_device_capability() >= (8, 0) if gpu else cpu_has_avx512_bf16()


def compiles_well(device: torch.device) -> bool:
    """Return whether `torch.compile` is known to be worth its compilation time, as on a CPU with matrix units (AMX).

    Args:
        device: Any device.
    """
    return device.type == "cpu" and cpu_has_amx()


def breaks_channels_last(network: nn.Module, device: torch.device) -> bool:
    """Return whether a convolution of a network corrupts memory on a device if its weights are in channels-last format.

    oneDNN 3.12 (in torch 2.14) writes past its buffers in strided 1x1 convolutions with few input channels (fewer than
    16 with AVX-512, fewer than 8 without): results are wrong, or the process aborts.

    Args:
        network: Any module.
        device: Any device.
    """
    if device.type != "cpu":
        return False
    least = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    convolutions = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return any(max(c.kernel_size) == 1 < max(c.stride) and c.in_channels // c.groups < least for c in convolutions)


def has_fused_optimizers(device: torch.device) -> bool:
    """Return whether PyTorch's fused optimizers run on a device.

    Args:
        device: Any device.
    """
    return device.type == "cpu" or is_gpu(device)


def conv_relu(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute a convolution, add a tensor, and apply ReLU, in the dtype of the weights; one cuDNN operation on CUDA.

    Args:
        input: Input `(B, C, H, W)`.
        weight: Weights `(K, C / groups, h, w)`.
        bias: Bias `(K,)`.
        stride: Stride, as in `torch.conv2d`.
        padding: Zero padding on each side, in pixels.
        dilation: Spacing between the elements of the kernel.
        groups: Number of groups of channels.
        added: Tensor added before the ReLU, in the shape of the result.
    """
    kind = weight.dtype
    input = input.to(kind)
    if not input.is_cuda:
        result = torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return torch.relu(result if added is None else result + added.to(kind))
    if added is None:
        return torch.cudnn_convolution_relu(input, weight, bias, stride, padding, dilation, groups)
    return torch.cudnn_convolution_add_relu(
        input, weight, added.to(kind), None, bias, stride, padding, dilation, groups
    )


def seed(device: torch.device, number: int) -> None:
    """Seed the random number generators of the CPU and of one device.

    `torch.manual_seed` searches for all devices on each call, which takes longer than a small step.

    Args:
        device: Any device.
        number: The seed, 0 to 2^64 - 1.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)


def rng_states(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the random number generators of the CPU and of one device.

    Args:
        device: Any device.
    """
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_rng_states(device: torch.device, states: list[torch.Tensor]) -> None:
    """Restore the states returned by `rng_states`.

    Args:
        device: The same device.
        states: The states.
    """
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def isolated_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that restores the random states of Python, NumPy, PyTorch and a CUDA device on exit.

    Args:
        device: The device that computes.
    """
    from lightning.pytorch.utilities.seed import isolate_rng

    return isolate_rng(include_cuda=device.type == "cuda")


def host_random_states(device: torch.device) -> tuple[object, ...]:
    """Return the states of the generators on the host: Python, NumPy and, with a GPU, PyTorch.

    Args:
        device: The device that computes.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # the global generator, which user code may use
    own = torch.get_rng_state().numpy().tobytes() if device.type == "cuda" else b""
    return random.getstate(), name, np.asarray(keys).tobytes(), tuple(rest), own


def name_of(device: torch.device) -> str:
    """Return the name of the GPU or, for the CPU, of the processor.

    Args:
        device: Any device.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a constant tensor on a device. It is copied only once, as a copy per step would synchronize with the GPU.

    Args:
        values: The values `(N,)`.
        dtype: Type of the tensor.
        device: Device of the tensor.

    Returns:
        Tensor `(N,)`. It is shared and must not be modified.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return _constant(values, dtype, device)


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a constant created during validation is also used in training
        return torch.tensor(values, dtype=dtype).to(device)
