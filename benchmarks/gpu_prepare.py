"""Preparation of benchmarks/gpu.py: images, a teacher, and a description of the machine."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_runs import Checks
from benchmarks.loops import networks
from benchmarks.speed import decoded, machine
from lkd import CIFAR10DataModule
from lkd.models import resnet56

ARRAYS = ("images", "targets")


class ArrayDataModule(CIFAR10DataModule):
    """Images of CIFAR-10's shape from `images.npy` and `targets.npy`, which are also the test images."""

    def read(self, train: bool, download: bool) -> TensorDataset:
        """See `ArchiveDataModule.read`."""
        return TensorDataset(*(torch.from_numpy(np.load(Path(self.root, f"{name}.npy"))) for name in ARRAYS))


def prepare(device: str | None, folder: str, images: str | None, teacher: str | None, number: int) -> Checks:
    """Write images, teacher and `images.yaml` to a folder, and describe the machine in JSON.

    Args:
        device: `cuda` or `cpu`; `None` chooses CUDA if there is a GPU.
        folder: The folder.
        images: Folder with the images of CIFAR-10; `None` generates synthetic images.
        teacher: Weights of a ResNet-56 with shortcut A; `None` uses untrained weights.
        number: Number of synthetic images.
    """

    def check() -> str:
        if images:
            decoded(images, folder)
        else:
            _generate(folder, number)
        if teacher:
            shutil.copy(teacher, f"{folder}/teacher.pth")
        else:
            _initial_teacher(folder)
        count = len(np.load(f"{folder}/targets.npy"))
        arguments = {"root": folder, "val_size": max(10, count // 10)}
        data = {"class_path": f"{__name__}.ArrayDataModule", "init_args": arguments}
        Path(folder, "images.yaml").write_text(json.dumps({"data": data}))
        return json.dumps({"number": count, **_described(device, f"{folder}/teacher.pth")})

    return {"preparation": check}


def _described(device: str | None, teacher: str) -> dict[str, Any]:
    """Describe device, versions, peak performance, and FLOPs of one image's forward pass."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    student, big = networks(teacher)
    found = {"device": chosen, "machine": machine(), "peak": _matmul(chosen), "gpu": "no GPU"}
    found["flops"] = {"student": _flops(student), "teacher": _flops(big)}
    if chosen == "cuda":
        versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        found["gpu"] = f"{torch.cuda.get_device_name()}, {versions}"
    return found


def _generate(folder: str, number: int) -> None:
    """Write synthetic images: one pattern per class, with noise."""
    generator = np.random.default_rng(0)
    pattern = generator.integers(192, size=(10, 3, 4, 4), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
    target = np.arange(number) % 10
    noise = generator.integers(64, size=(number, 3, 32, 32), dtype=np.uint8)
    np.save(f"{folder}/images.npy", noise + pattern[target])
    np.save(f"{folder}/targets.npy", target)


def _initial_teacher(folder: str) -> None:
    """Write untrained weights with BatchNorm statistics of the images; otherwise, activations would explode."""
    torch.manual_seed(0)
    network = resnet56(num_classes=10, shortcut="A").train()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        network((torch.from_numpy(np.load(f"{folder}/images.npy")[:64]).float() / 255 - 0.5) / 0.25)
    torch.save(network.state_dict(), f"{folder}/teacher.pth")


def _flops(network: nn.Module) -> int:
    """Count the FLOPs of one image's forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops()


def _matmul(device: str) -> float:
    """Measure the FLOP/s of a large matrix product, in bfloat16 on a GPU."""
    size, times, kind = (8192, 20, torch.bfloat16) if device == "cuda" else (256, 3, torch.float32)
    ours, theirs = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    for _ in range(3):
        ours @ theirs
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        ours @ theirs
    synchronize()
    return 2 * size**3 * times / (time.perf_counter() - start)


def synchronize() -> None:
    """Wait for the GPU, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
