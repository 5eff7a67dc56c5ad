"""Training loops that benchmarks/gpu_speed.py times: a bare PyTorch loop, and `lkd fit`."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Collection
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.optimization import fuse

from benchmarks.gpu_prepare import ARRAYS, synchronize
from benchmarks.gpu_runs import print_to_terminal, step_of, trained_on
from benchmarks.gpu_workers import function_at
from benchmarks.loops import BATCH, MEAN, STD, kd, networks
from benchmarks.pacing import Pace


class GpuPace(Pace):
    """A `Pace` that synchronizes before it reads the clock, and reports GPU memory and optimizations.

    Attributes:
        log: Output file of a run of `lkd fit`, which lists its optimizations.
    """

    log: Path | None = None

    def step(self, images: int) -> None:
        """Count one step; after the last, wait for the GPU.

        Args:
            images: Number of images of the step.
        """
        if self._left == 1:
            synchronize()
        super().step(images)

    def wait(self) -> None:
        """Report the peak GPU memory and the optimizations after each request; wait for the next one."""
        if self._images:
            memory = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
            self._pipe.send((memory, step_of(self.log.read_text(errors="replace")) if self.log else ""))
        super().wait()


def serve_loop(pipe: Connection, loop: str, arguments: dict[str, Any]) -> None:
    """Run a loop that is timed.

    Args:
        pipe: See `Pace`.
        loop: `module:function`.
        arguments: Keyword arguments of the loop, after the pace.
    """
    try:
        pace = Pace.current = GpuPace(pipe)
        function_at(loop)(pace, **arguments)
        pipe.send(("failed", "the loop ended"))
    except EOFError:  # no more requests
        return
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


class Bare:
    """A step of knowledge distillation in plain PyTorch, from the positions of the images to the optimizer's update.

    Args:
        images: File of the decoded images.
        teacher: File of the teacher's weights.
        device: `cuda` or `cpu`.
        how: Optimizations to enable. `bf16`: bfloat16 and channels last. `compiled`: both networks are compiled.
            `folded`: the teacher's BatchNorm layers are folded into its convolutions. `kept`: the teacher's logits are
            cached. `graph`: the step can be captured, so SGD is fused and its learning rate is on the device.
    """

    def __init__(self, images: str, teacher: str, device: str, how: Collection[str]) -> None:
        self.device, self.bf16, graph = torch.device(device), "bf16" in how, "graph" in how
        stored, target = (torch.from_numpy(np.load(images.replace("images", name))) for name in ARRAYS)
        self.stored, self.target = F.pad(stored, (4, 4, 4, 4)).to(device), target.to(device)
        self.layout = torch.channels_last if self.bf16 else torch.contiguous_format
        student, big = networks(teacher)
        big = fuse(big) if "folded" in how else big
        self.student, self.teacher = (one.to(device).to(memory_format=self.layout) for one in (student, big))
        for network in (self.student, self.teacher) if "compiled" in how else ():
            network.compile()
        self.logits = torch.randn(len(stored), 10, device=device).half() if "kept" in how else None
        self.mean, self.std = (255 * torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        rate = torch.tensor(0.1, device=device) if graph else 0.1
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4, fused=graph or None
        )

    def _images(self, index: Tensor) -> Tensor:
        """Crop, flip and normalize images."""
        size, rows = len(index), torch.arange(32, device=self.device)
        top, left = torch.randint(9, (2, size, 1), device=self.device)
        columns = torch.where(torch.rand(size, 1, device=self.device) < 0.5, rows.flip(0), rows) + left
        image = self.stored[index[:, None, None], :, (top + rows)[:, :, None], columns[:, None, :]]
        return ((image.permute(0, 3, 1, 2).float() - self.mean) / self.std).contiguous(memory_format=self.layout)

    def __call__(self, index: Tensor) -> None:
        """Take a step.

        Args:
            index: Positions of the images `(B,)`.
        """
        image = self._images(index)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            with torch.no_grad():
                teacher_logits = self.teacher(image) if self.logits is None else self.logits[index]
            logits = self.student(image)
        self.optimizer.zero_grad()
        kd(logits.float(), teacher_logits.float(), self.target[index]).backward()
        self.optimizer.step()


def bare(pace: Pace, images: str, teacher: str, device: str, how: Collection[str], size: int = BATCH) -> None:
    """Run the bare loop (see `Bare`). With `graph` in `how`, its step is one CUDA graph."""
    step, index = Bare(images, teacher, device, how), torch.arange(size, device=device)
    run = _captured(step, index) if "graph" in how else partial(step, index)
    pace.wait()
    while True:
        for chosen in torch.randperm(len(step.target), device=device).split(size):
            if len(chosen) == size:
                index.copy_(chosen)
                run()
                pace.step(size)


def _captured(step: Bare, index: Tensor) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(index)
    return graph.replay


def lkd_fit(pace: GpuPace, settings: list[str], folder: str, device: str) -> None:
    """Run `lkd fit` as users do, in a terminal, with TensorBoard, progress bar, metrics and checkpoints."""
    from lkd.__main__ import main

    Path(folder).mkdir()
    os.chdir(folder)
    print_to_terminal("log.txt")
    pace.log = Path("log.txt")
    paced = "--trainer.callbacks+=benchmarks.loops.Paced"
    code = main(["fit", *settings, *trained_on(device), paced, "--debug"])
    raise RuntimeError(f"lkd fit ended with exit code {code}")
