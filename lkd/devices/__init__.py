"""Every decision that depends on the device. Tests replace these functions to stand in for a GPU."""

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

from lkd.devices.capture import Capture, CudaCapture


def is_gpu(device: torch.device) -> bool:
    """Whether a device computes while the host goes on, and is to be given whole batches and fused operations.

    Args:
        device: Any device.
    """
    return device.type == "cuda"


def step_capture(device: torch.device) -> Capture | None:
    """What captures a step on a device so that it can be replayed; `None` if the device has nothing of that kind.

    Args:
        device: Any device.
    """
    return CudaCapture() if device.type == "cuda" else None


def free_memory(device: torch.device) -> int:
    """Free memory of a GPU, in bytes.

    Args:
        device: The GPU.
    """
    return torch.cuda.mem_get_info(device)[0]


def pins_memory() -> bool:
    """Whether batches made on the host belong in page-locked memory, from which a GPU fetches them on its own."""
    return torch.cuda.is_available()


def has_bf16_units(gpu: bool) -> bool:
    """Whether the device multiplies in bfloat16 faster than in float32.

    Args:
        gpu: Whether the current CUDA device is meant rather than the CPU.
    """
    return torch.cuda.get_device_capability() >= (8, 0) if gpu else torch.cpu._is_avx512_bf16_supported()


def compiles_well(device: torch.device) -> bool:
    """Whether `torch.compile` can repay its time: on a GPU, and on a CPU with matrix units (AMX).

    Args:
        device: Any device.
    """
    return is_gpu(device) or (device.type == "cpu" and torch.cpu._is_amx_tile_supported())


def breaks_channels_last(network: nn.Module, device: torch.device) -> bool:
    """Whether a convolution of a network damages memory on a device if its weights have the channels last.

    Without AVX-512, oneDNN 3.12 (in torch 2.14) writes past its buffers in 1x1 convolutions with a stride that have
    fewer than 8 input channels: results are wrong, or the process aborts.

    Args:
        network: Any module.
        device: Any device.
    """
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512":
        return False
    convolutions = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return any(max(c.kernel_size) == 1 < max(c.stride) and c.in_channels // c.groups < 8 for c in convolutions)


def has_fused_optimizers(device: torch.device) -> bool:
    """Whether PyTorch's fused optimizers run on a device.

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
    """A convolution, plus another tensor, and ReLU: on CUDA one operation of cuDNN, in the weights' type.

    Args:
        input: `(B, C, H, W)`.
        weight: `(K, C / groups, h, w)`.
        bias: `(K,)`.
        stride: As for `torch.conv2d`, as are `padding`, `dilation` and `groups`.
        padding: Pixels of zeros on each side.
        dilation: Distance between the pixels that meet neighbouring weights.
        groups: Number of groups of channels.
        added: What is added before the ReLU, of the shape of the result.
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
    """Seed the random numbers of the CPU and of one device.

    `torch.manual_seed` looks for all devices each time, which takes longer than a small step.

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
    """The states of the random number generators of the CPU and of one device.

    Args:
        device: Any device.
    """
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_rng_states(device: torch.device, states: list[torch.Tensor]) -> None:
    """Restore what `rng_states` returned.

    Args:
        device: The same device.
        states: The states.
    """
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def isolated_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """A context that leaves the random numbers of Python, NumPy, PyTorch and a CUDA device as they were before it.

    Args:
        device: The device that computes.
    """
    from lightning.pytorch.utilities.seed import isolate_rng

    return isolate_rng(include_cuda=device.type == "cuda")


def host_random_states(device: torch.device) -> tuple[object, ...]:
    """What Python's, NumPy's and, beside a GPU, PyTorch's generators on the host have come to.

    Args:
        device: The device that computes.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # the generator that users' code draws from
    own = torch.get_rng_state().numpy().tobytes() if device.type == "cuda" else b""
    return random.getstate(), name, np.asarray(keys).tobytes(), tuple(rest), own


def name_of(device: torch.device) -> str:
    """The name of the GPU or, for the CPU, of the processor.

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
    """A constant tensor on a device, copied there once: a copy in each step would make the host wait for the GPU.

    Args:
        values: Its numbers `(N,)`.
        dtype: Its type.
        device: Where it is needed.

    Returns:
        `(N,)`; shared, so not to be changed.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return _constant(values, dtype, device)


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a constant first needed in validation serves in training, too
        return torch.tensor(values, dtype=dtype).to(device)
