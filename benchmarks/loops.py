"""Training loops that benchmarks/speed.py compares. The bare loops use only the networks of lkd."""

from __future__ import annotations

import copy
import ctypes
import os
import pty
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.pacing import Pace
from lkd.models import load_weights, resnet20, resnet56

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 128
Step = Callable[[Tensor, Tensor], None]


def networks(teacher: str) -> tuple[nn.Module, nn.Module]:
    """Create ResNet-20 and the pretrained ResNet-56."""
    big = load_weights(resnet56(num_classes=10, shortcut="A"), teacher)
    return resnet20(num_classes=10), big.eval().requires_grad_(False)


def kd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Compute the loss of KD, with the weights and the temperature of configs/cifar10/kd_resnet56_resnet20.yaml."""
    soft = F.kl_div(
        F.log_softmax(student / 4, 1), F.log_softmax(teacher / 4, 1), reduction="batchmean", log_target=True
    )
    return 0.1 * F.cross_entropy(student, target) + 0.9 * 16 * soft


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    """Create the optimizer of the config."""
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


class InMemory(Dataset[tuple[Tensor, int]]):
    """Decoded images, transformed one at a time with PIL and torchvision."""

    def __init__(self, images: str) -> None:
        self.images = np.load(images).transpose(0, 2, 3, 1)
        self.targets = np.load(images.replace("images", "targets"))
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.targets[index])


def _loader(images: str, workers: int) -> DataLoader[tuple[Tensor, int]]:
    return DataLoader(InMemory(images), BATCH, shuffle=True, num_workers=workers, drop_last=True)


def bare_eager(pace: Pace, images: str, teacher: str, workers: int) -> None:
    """Train with a typical plain loop: eager float32, PIL transforms."""
    student, big = networks(teacher)
    optimizer = sgd(student)
    loader = _loader(images, workers)
    pace.wait()
    while True:
        for image, target in loader:
            with torch.no_grad():
                teacher_logits = big(image)
            optimizer.zero_grad()
            kd(student(image), teacher_logits, target).backward()
            optimizer.step()
            pace.step(len(image))


class Plain(L.LightningModule):
    """Knowledge distillation as a plain LightningModule, as in tutorials."""

    def __init__(self, pace: Pace, teacher: str) -> None:
        super().__init__()
        self.student, self.teacher = networks(teacher)
        self.pace = pace

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute and log the loss of KD and the accuracy."""
        image, target = batch
        with torch.no_grad():
            teacher_logits = self.teacher.eval()(image)
        logits = self.student(image)
        loss = kd(logits, teacher_logits, target)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/acc", (logits.argmax(1) == target).float().mean(), prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step."""
        self.pace.step(len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create the optimizer of the config."""
        return sgd(self.student)


def plain_lightning(pace: Pace, images: str, teacher: str, workers: int) -> None:
    """Train a plain LightningModule with PIL transforms."""
    trainer = L.Trainer(max_epochs=-1, accelerator="cpu", default_root_dir=tempfile.mkdtemp())
    pace.wait()
    trainer.fit(Plain(pace, teacher), _loader(images, workers))


def _batches(images: str, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield whole batches (image, target, index), cropped and flipped by indexing, and normalized."""
    stored, target = torch.from_numpy(np.load(images)), torch.from_numpy(np.load(images.replace("images", "targets")))
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    padded = F.pad(stored, (4, 4, 4, 4))
    rows = torch.arange(32)
    while True:
        for index in torch.randperm(len(stored)).split(size):
            if len(index) < size:
                continue
            top, left = torch.randint(9, (2, size, 1))
            columns = torch.where(torch.rand(size, 1) < 0.5, rows.flip(0), rows) + left
            image = padded[index[:, None, None], :, (top + rows)[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
            yield (image.float() - mean) / std, target[index], index


def bare_lean(pace: Pace, images: str, teacher: str, bf16: bool, kept: bool, size: int = BATCH) -> None:
    """Train with batched augmentation, channels last, a folded teacher and memory reuse; `kept` caches the logits."""
    student, big = (network.to(memory_format=torch.channels_last) for network in networks(teacher))
    big = fuse(big)
    optimizer = sgd(student)
    batches = _batches(images, size)
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):
        ctypes.CDLL(None).mallopt(option, value)
    cached = torch.randn(len(np.load(images, mmap_mode="r")), 10).half()
    pace.wait()
    for image, target, index in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                teacher_logits = cached[index] if kept else big(image)
            logits = student(image)
        optimizer.zero_grad()
        kd(logits.float(), teacher_logits.float(), target).backward()
        optimizer.step()
        pace.step(len(image))


class Paced(L.Callback):
    """Connect a run of lkd to its `Pace`."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Wait for the first request."""
        Pace.current.wait()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step."""
        Pace.current.step(len(batch.target) // batch.views)


def lkd_fit(pace: Pace, settings: list[str]) -> None:
    """Run `lkd fit` as users do, in a terminal, with TensorBoard, progress bar, metrics and checkpoints."""
    from lkd.__main__ import main

    os.chdir(tempfile.mkdtemp())
    ours, theirs = pty.openpty()
    subprocess.Popen(["cat"], stdin=ours, stdout=subprocess.DEVNULL)  # reads what the terminal shows
    os.dup2(theirs, 1)
    code = main(["fit", *settings, "--trainer.callbacks+=benchmarks.loops.Paced"])
    raise RuntimeError(f"lkd fit ended with exit code {code}")


def tiny_networks() -> tuple[nn.Module, nn.Module]:
    """Create two networks so small that a step consists of overhead only."""
    return tiny(32), tiny(64).eval().requires_grad_(False)


def tiny(width: int) -> nn.Module:
    """Create a network with one hidden layer for images of 3x8x8 pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, width), nn.ReLU(), nn.Linear(width, 10))


def bare_tiny(pace: Pace) -> None:
    """Train the tiny networks in a bare loop, with images in memory."""
    student, teacher = tiny_networks()
    optimizer = sgd(student)
    stored, target = torch.randint(256, (25_600, 3, 8, 8), dtype=torch.uint8), torch.randint(10, (25_600,))
    pace.wait()
    while True:
        for index in torch.randperm(len(stored)).split(BATCH):
            image = stored[index].float().div_(255.0).sub_(0.5).div_(0.25)
            with torch.no_grad():
                teacher_logits = teacher(image)
            optimizer.zero_grad()
            kd(student(image), teacher_logits, target[index]).backward()
            optimizer.step()
            pace.step(len(image))


def own(pace: Pace, adapter: str, images: str, teacher: str) -> None:
    """Run another trainer: `adapter` names a factory `file.py:function`.

    The factory is called with the decoded images (N, 3, 32, 32) and targets (N,), the teacher, the student and the
    batch size. It returns a function that takes one step per call and returns the number of images.
    """
    path, _, name = adapter.partition(":")
    sys.path.insert(0, str(Path(path).resolve().parent))
    make = getattr(__import__(Path(path).stem), name)
    student, big = networks(teacher)
    stored, target = (torch.from_numpy(np.load(file)) for file in (images, images.replace("images", "targets")))
    step = make(stored, target, copy.deepcopy(big), student, BATCH)
    pace.wait()
    while True:
        pace.step(step())
