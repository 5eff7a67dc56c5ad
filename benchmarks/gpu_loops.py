"""What the processes of benchmarks/gpu.py run: checks of lkd on a GPU, and loops that are timed there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.fx.experimental.optimization import fuse
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.loops import BATCH, MEAN, STD, kd, networks
from benchmarks.pacing import Pace
from benchmarks.speed import decoded, machine
from lkd import CIFAR10DataModule, DistillModule
from lkd.models import resnet56

Checks = dict[str, Callable[[], str]]
"""Title of each check to the function that does it, which returns a remark or raises an exception."""

RANDOM = {"mgd": "masks", "vitkd": "masks", "crd": "negatives", "dkd_crd_at": "negatives"}
"""What a criterion draws from the device's generator: with the same seed, CPU and GPU draw different numbers."""
BEFORE = {"takd": ["assistant"], "multi_teacher": ["assistant"], "born_again_ensemble": ["born_again"] * 2}
"""Runs that a complete config starts from."""
PAIRS = {"deit": "resnet56_deit_tiny_100", "vitkd": "deit_small_deit_tiny_100"}
"""Pairs of the methods that need transformers."""
ARRAYS = ("images", "targets")
ON_CPU = ["--trainer.accelerator=cpu", "--speed.channels_last=false"]
"""With AVX2 alone, torch 2.14 gets gradients of channels-last convolutions with 1x1 kernels and strides wrong."""
SHORT = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]
SHARDS = json.dumps(
    {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 1, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
    }
)


class NotApplicable(Exception):  # noqa: N818  # not an error
    """Why a check does not apply."""


def serve_checks(pipe: Connection, folder: str, threads: int) -> None:
    """Run checks until the pipe is closed, each in a folder of its own.

    Args:
        pipe: Receives `(number, module:function, arguments)`; sends the titles, then each result.
        folder: Where the folders are created.
        threads: Number of CPU threads.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    warnings.simplefilter("always")  # each run's, not only those of a process's first
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    while True:
        try:
            number, function, arguments = pipe.recv()
        except EOFError:
            return
        place = Path(folder, f"check_{number}")
        place.mkdir(parents=True)
        os.chdir(place)
        os.environ["LKD_CACHE"] = str(place / "cache")
        with Path("log.txt").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        module, _, name = function.partition(":")
        try:
            checks = getattr(importlib.import_module(module), name)(**arguments)
        except Exception as error:
            checks = {"preparation": partial(_raise, error)}
        pipe.send(list(checks))
        for check in checks.values():
            pipe.send(_result(check))


def _raise(error: Exception) -> str:
    raise error


def _result(check: Callable[[], str]) -> tuple[str, str, str]:
    """Outcome, remark and traceback of a check."""
    try:
        return "ok", check(), ""
    except NotApplicable as reason:
        return "left out", str(reason), ""
    except BaseException as error:  # SystemExit, too
        sentence = " ".join(f"{type(error).__name__}: {error}".split())
        log = Path("log.txt").read_text(errors="replace")[-4000:]
        return "FAILED", sentence[:250], f"{traceback.format_exc()}\nend of the log:\n{log}\n"


def command(*args: str) -> str:
    """Run one command of lkd in this process.

    Args:
        args: The arguments after `lkd`.

    Returns:
        What it printed.

    Raises:
        RuntimeError: If its exit code is not 0.
    """
    from lkd.__main__ import main

    log = Path("log.txt")
    before = log.stat().st_size
    code = main([*args, "--debug"])
    sys.stdout.flush()
    text = log.read_bytes()[before:].decode(errors="replace")
    if code:
        raise RuntimeError(f"lkd {args[0]} ended with exit code {code}: {text.strip().splitlines()[-1:]}")
    return text


def trained_on(device: str) -> list[str]:
    """Settings of a short run on a device."""
    there = ["--trainer.accelerator=gpu"] if device == "cuda" else ON_CPU
    return [*there, "--trainer.devices=1", "--trainer.num_sanity_val_steps=0"]


class Fit(NamedTuple):
    """One run of `lkd fit`: its optimizations, its losses, the student's final weights, and what it printed."""

    step: str
    losses: list[float]
    weights: dict[str, Tensor]
    text: str


def fit(folder: str, device: str, *settings: str, bar: bool = False) -> Fit:
    """Train with `lkd fit`.

    Args:
        folder: Where the run is saved.
        device: `cuda` or `cpu`.
        settings: Arguments of `lkd fit`.
        bar: Whether the progress bar is on.
    """
    losses = {"class_path": "benchmarks.gpu_loops.Losses", "init_args": {"path": f"{folder}.json"}}
    always = [f"--trainer.default_root_dir={folder}", f"--trainer.enable_progress_bar={bar}".lower()]
    text = command("fit", *settings, *trained_on(device), *always, f"--trainer.callbacks+={json.dumps(losses)}")
    last = max(Path(folder).rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    state = torch.load(last, map_location="cpu", weights_only=True)["state_dict"]
    weights = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
    return Fit(step_of(text), json.loads(Path(f"{folder}.json").read_text()), weights, text)


def step_of(text: str) -> str:
    """The line in which a run lists its optimizations, without its first word, and why it gave up its graph.

    Args:
        text: What the run printed.
    """
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    found = re.search(r"^\s*(?:Step|Optimizations): (.*?)\s*$", plain, re.MULTILINE)
    failed = re.search(r"step runs without a graph: (.*?)(?:; --speed|$)", plain, re.MULTILINE)
    return (found[1] if found else "") + (f"; no CUDA graph ({failed[1]})" if failed else "")


def has_graph(step: str) -> bool:
    """Whether a list of optimizations says that the step is a CUDA graph."""
    return "CUDA graph" in step and "no CUDA graph" not in step


class Losses(L.Callback):
    """Write the loss of every training step to a JSON file.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path, self.losses = Path(path), list[float]()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the loss, unless waiting for the GPU is forbidden."""
        if not (torch.cuda.is_available() and torch.cuda.get_sync_debug_mode()):
            self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the file."""
        self.path.write_text(json.dumps(self.losses))


class NoWaiting(L.Callback):
    """Raise an error if anything in steps 5 to 9 makes the host wait for the GPU: loading, hooks, loggers, the step."""

    watched = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Forbid to wait."""
        if trainer.global_step == 5:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Allow it again."""
        if trainer.global_step == 10:
            torch.cuda.set_sync_debug_mode("default")
            self.watched = True

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check that these steps were taken."""
        if not self.watched:
            raise RuntimeError(f"the run ended after {trainer.global_step} steps, before step 10")


class Sharded(DistillModule):
    """A module whose student is sharded by FSDP2."""

    def configure_model(self) -> None:
        """Shard the student."""
        super().configure_model()
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def overlay_settings(name: str) -> list[str]:
    """Arguments that combine an overlay of configs/methods with a small pair and small data."""
    pair = PAIRS.get(name, "digits")
    if name in PAIRS and importlib.util.find_spec("timm") is None:
        raise NotApplicable("timm is not installed")
    if name == "transfer_set" and not Path("data").exists():
        Path("data/unlabelled").mkdir(parents=True)
        generator = np.random.default_rng(0)
        for number in range(200):
            pixels = generator.integers(256, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"data/unlabelled/{number}.png")
    data = ["data/digits"] if pair == "digits" else ["data/synthetic"]
    classes = [] if pair == "digits" else ["--data.init_args.num_classes=100", "--data.init_args.batch_size=16"]
    return [f"--config={config}" for config in (*data, f"pairs/{pair}", f"methods/{name}")] + classes


def overlay(name: str, device: str) -> Checks:
    """An overlay trains; losses equal the CPU's; losses and weights with a CUDA graph equal those without.

    Args:
        name: The overlay's name in configs/methods.
        device: `cuda` or `cpu`.
    """
    exact = ["--trainer.precision=32-true", "--trainer.deterministic=warn"]

    @cache
    def run(place: str, folder: str, *settings: str) -> Fit:
        return fit(folder, place, *overlay_settings(name), *SHORT, *settings)

    def as_on_the_cpu() -> str:
        if name in RANDOM:
            raise NotApplicable(f"CPU and GPU draw different {RANDOM[name]}")
        off = "--speed.graph=off"
        ours, theirs = (run(place, f"{place}_off", *exact, off).losses[:2] for place in (device, "cpu"))
        return within(apart(ours, theirs), 1e-3, "the first two losses differ by")

    def as_without_graph() -> str:
        graph, plain = (run(device, f"{device}_{graph}", *exact, f"--speed.graph={graph}") for graph in ("auto", "off"))
        if device == "cuda" and not has_graph(graph.step):
            raise NotApplicable(f"the step is not captured: {graph.step}")
        losses = within(apart(graph.losses[:6], plain.losses[:6]), 1e-5, "six losses differ by")
        pairs = [(graph.weights[key].double(), weight.double()) for key, weight in plain.weights.items()]
        worst = max(float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)) for ours, theirs in pairs)
        return f"{losses}, {within(worst, 1e-4, 'final weights by')}"

    return {
        "trains": lambda: run(device, "plain", "--trainer.deterministic=false").step,
        "the GPU's losses are the CPU's": as_on_the_cpu,
        "with a graph as without": as_without_graph,
    }


def apart(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference between two lists of losses; infinite if one is not finite, or too short."""
    pairs = list(zip(ours, theirs, strict=True))
    worst = max((abs(one - other) / max(abs(other), 1e-6) for one, other in pairs), default=float("inf"))
    return worst if np.isfinite([*ours, *theirs]).all() else float("inf")


def within(worst: float, limit: float, what: str) -> str:
    """The remark on a difference.

    Raises:
        ValueError: If the difference is above the limit.
    """
    if not worst <= limit:
        raise ValueError(f"{what} {worst:.1e}, more than {limit:.0e}")
    return f"{what} {worst:.1e}"


def same(ours: Fit, theirs: Fit) -> None:
    """Check that the weights of two runs are equal, bit by bit.

    Raises:
        ValueError: If they differ.
    """
    differing = [name for name, weight in ours.weights.items() if not torch.equal(weight, theirs.weights[name])]
    if differing:
        raise ValueError(f"{len(differing)} of {len(ours.weights)} tensors differ, the first is {differing[0]}")


def resumed(device: str, settings: list[str]) -> Checks:
    """A run that stops within an epoch, and is resumed, ends with the weights of an uninterrupted one."""

    def check() -> str:
        limits = ["--trainer.deterministic=true", "--trainer.max_epochs=2", "--trainer.limit_train_batches=5"]
        whole = fit("whole", device, *settings, *limits)
        fit("parts", device, *settings, *limits, "--trainer.max_steps=7")
        (last,) = Path("parts").rglob("last.ckpt")
        same(fit("parts", device, *settings, *limits, f"--ckpt_path={last}"), whole)
        return whole.step

    return {"the resumed run equals the whole one": check}


def cached(device: str) -> Checks:
    """Three epochs with cached logits; the same again with the cache filled."""

    def check() -> str:
        settings = ["--config=digits/kd", "--trainer.max_epochs=3", "--trainer.deterministic=true"]
        runs = [fit(folder, device, *settings, "--teacher_cache.versions=1") for folder in ("filling", "filled")]
        found = [re.findall(r"\b([01]) of 1\b", run.text)[:1] for run in runs]
        if found != [["0"], ["1"]]:
            raise ValueError(f"the runs found {found} of 1 variants in the cache instead of 0, then 1")
        same(*runs)
        return runs[1].step

    return {"a run that finds cached logits equals the one that computed them": check}


def unsynchronized(device: str, settings: list[str]) -> Checks:
    """Five steps in a terminal, in which nothing may wait for the GPU."""

    def check() -> str:
        if device != "cuda":
            raise NotApplicable("needs CUDA")
        in_a_terminal("log.txt")
        watch = ["--trainer.callbacks+=benchmarks.gpu_loops.NoWaiting", "--trainer.log_every_n_steps=1000"]
        return fit("run", device, *settings, "--trainer.max_epochs=1", *watch, bar=True).step

    return {"nothing in a step waits for the GPU": check}


def commands(device: str, few: bool) -> Checks:
    """All commands after a run on the device; `few`: without those that take long."""
    best = "--ckpt_path=runs/digits/kd/version_0/checkpoints/best.ckpt"
    onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    there = [*SHORT, *trained_on(device), "--trainer.enable_progress_bar=false"]
    accelerator = "gpu" if device == "cuda" else device
    calls = {
        "fit with a teacher": ["fit", "--config=digits/kd", *there],
        "fit without": ["fit", "--config=digits/student", *there],
        **{name: [name, best] for name in ("validate", "test", "predict")},
        "compare": ["compare", "runs/digits/kd", "alone=runs/digits/student", f"--accelerator={accelerator}"],
        "export": ["export", "runs/digits/kd", f"--format=safetensors,torch{',onnx' * onnx}"],
    }
    calls["compare"] += ["--seconds=0.05"]
    chosen = list(calls)[:-2] if few else list(calls)
    return {name: lambda name=name: step_of(command(*calls[name])) for name in chosen}


def complete(name: str, device: str) -> Checks:
    """A complete config of configs/digits, after those that it starts from."""

    def check() -> str:
        text, small = "", ["--data.init_args.batch_size=8", "--trainer.enable_progress_bar=false"]
        for config in (*BEFORE.get(name, []), name):
            made = [f"--data.init_args.extra.init_args.{size}" for size in ("number=20", "steps=2")]
            extra = made if config == "data_free" else []
            text = command("fit", f"--config=digits/{config}", *SHORT, *small, *extra, *trained_on(device))
        return step_of(text)

    return {"trains": check}


def parallel(device: str, strategy: str | None) -> Checks:
    """A strategy for several processes, with one: by default FSDP2."""
    settings = [f"--trainer.strategy={strategy or SHARDS}"]
    settings += [] if strategy else ["--model.class_path=benchmarks.gpu_loops.Sharded"]
    return {"trains": lambda: fit("run", device, "--config=digits/kd", *settings, *SHORT).step}


def full(device: str, settings: list[str], seconds: int) -> Checks:
    """A whole run of configs/cifar10/kd_resnet56_resnet20.yaml, and the test of its best checkpoint.

    Args:
        device: `cuda` or `cpu`.
        settings: Arguments of `lkd fit`.
        seconds: After how many seconds it is stopped.
    """

    def check() -> str:
        from benchmarks.lives import curves

        start = time.monotonic()
        limit = f"--trainer.max_time=00:{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        text = command("fit", *settings, *trained_on(device), limit, "--trainer.enable_progress_bar=false")
        wall = time.monotonic() - start
        (best,) = Path("runs").rglob("best.ckpt")
        accuracies = [value for _, value in curves(best.parent.parent)["val/acc"]]
        tested = command("test", f"--ckpt_path={best}")
        (accuracy,) = re.findall(r"test/acc\W+([\d.]+)", tested)
        return (
            f"{len(accuracies)} epochs in {wall:.0f} s, {wall / len(accuracies):.2f} s per epoch; validation accuracy "
            f"{max(accuracies):.2%} (best), {accuracies[-1]:.2%} (last); test accuracy {float(accuracy):.2%} (best "
            f"checkpoint); {step_of(text)}"
        )

    return {"trains": check}


class ArrayDataModule(CIFAR10DataModule):
    """CIFAR-10, or images of its shape, from `images.npy` and `targets.npy`; they serve as test images, too."""

    def read(self, train: bool, download: bool) -> TensorDataset:
        """See `ArchiveDataModule.read`."""
        return TensorDataset(*(torch.from_numpy(np.load(Path(self.root, f"{name}.npy"))) for name in ARRAYS))


def prepare(device: str | None, folder: str, images: str | None, teacher: str | None, number: int) -> Checks:
    """Write what all rows share to a folder, and describe the machine.

    Args:
        device: `cuda` or `cpu`; `None`: what there is.
        folder: The folder.
        images: A folder of CIFAR-10's images; `None`: generated ones.
        teacher: Weights of a ResNet-56 with shortcut A; `None`: initial ones, normalized on the images.
        number: How many images are generated.
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
        data = {
            "class_path": f"{__name__}.ArrayDataModule",
            "init_args": {"root": folder, "val_size": max(10, count // 10)},
        }
        Path(folder, "images.yaml").write_text(json.dumps({"data": data}))
        student, big = networks(f"{folder}/teacher.pth")
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        found = {"device": chosen, "number": count, "machine": machine(), "peak": _matmul(chosen), "gpu": "no GPU"}
        found["flops"] = {"student": _flops(student), "teacher": _flops(big)}
        if chosen == "cuda":
            versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
            found["gpu"] = f"{torch.cuda.get_device_name()}, {versions}"
        return json.dumps(found)

    return {"preparation": check}


def _generate(folder: str, number: int) -> None:
    """A pattern for each class, and noise."""
    generator = np.random.default_rng(0)
    pattern = generator.integers(192, size=(10, 3, 4, 4), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
    target = np.arange(number) % 10
    noise = generator.integers(64, size=(number, 3, 32, 32), dtype=np.uint8)
    np.save(f"{folder}/images.npy", noise + pattern[target])
    np.save(f"{folder}/targets.npy", target)


def _initial_teacher(folder: str) -> None:
    """Without training, its BatchNorms would let 27 blocks blow the activations up."""
    torch.manual_seed(0)
    network = resnet56(num_classes=10, shortcut="A").train()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        network((torch.from_numpy(np.load(f"{folder}/images.npy")[:64]).float() / 255 - 0.5) / 0.25)
    torch.save(network.state_dict(), f"{folder}/teacher.pth")


def _flops(network: nn.Module) -> int:
    """Operations of one image's forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops()


def _matmul(device: str) -> float:
    """Operations per second of a large product of matrices; in bfloat16 on a GPU."""
    size, times, kind = (8192, 20, torch.bfloat16) if device == "cuda" else (256, 3, torch.float32)
    ours, theirs = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    for _ in range(3):
        ours @ theirs
    _wait()
    start = time.perf_counter()
    for _ in range(times):
        ours @ theirs
    _wait()
    return 2 * size**3 * times / (time.perf_counter() - start)


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class GpuPace(Pace):
    """A `Pace` that waits for the GPU before it reads the clock, and reports the peak of the GPU's memory.

    Attributes:
        log: The file that gets what a run of `lkd fit` prints, which lists its optimizations.
    """

    log: Path | None = None

    def step(self, images: int) -> None:
        """One step was taken.

        Args:
            images: How many it trained on.
        """
        self._left -= 1
        self._images += images
        if self._left == 0:
            _wait()
            seconds = time.perf_counter() - self._since
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if torch.cuda.is_initialized():
                peak = torch.cuda.max_memory_allocated()
            step = step_of(self.log.read_text(errors="replace")) if self.log else ""
            self._pipe.send(("done", self._images, seconds, peak, step))
            self.wait()


def serve_loop(pipe: Connection, loop: str, arguments: dict[str, Any]) -> None:
    """Run a loop that is timed.

    Args:
        pipe: See `Pace`.
        loop: `module:function`.
        arguments: What it is called with after the pace.
    """
    module, _, name = loop.partition(":")
    try:
        pace = Pace.current = GpuPace(pipe)
        getattr(importlib.import_module(module), name)(pace, **arguments)
        pipe.send(("FAILED", "the loop has ended"))
    except EOFError:  # no more orders
        return
    except NotApplicable as reason:
        pipe.send(("left out", str(reason)))
    except BaseException:
        pipe.send(("FAILED", traceback.format_exc()))


class Bare:
    """A step of knowledge distillation in plain PyTorch, from the positions of the images to the optimizer's update.

    Args:
        images: File of the decoded images.
        teacher: File of the teacher's weights.
        device: `cuda` or `cpu`.
        how: What is on. `bf16`: bfloat16, channels last. `compiled`: both networks are. `folded`: the teacher's
            BatchNorms are folded into its convolutions. `kept`: the teacher's logits are there already. `graph`: the
            step is captured, so SGD is fused, with its learning rate on the device.
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
                answer = self.teacher(image) if self.logits is None else self.logits[index]
            logits = self.student(image)
        self.optimizer.zero_grad()
        kd(logits.float(), answer.float(), self.target[index]).backward()
        self.optimizer.step()


def bare(pace: Pace, images: str, teacher: str, device: str, how: Collection[str], size: int = BATCH) -> None:
    """The bare loop; see `Bare`. With `graph` in `how`, its step is one CUDA graph."""
    if "graph" in how and device != "cuda":
        raise NotApplicable("needs CUDA")
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


def in_a_terminal(log: str) -> None:
    """Let this process print to a terminal, whose contents are appended to a file."""
    ours, theirs = pty.openpty()
    with Path(log).open("a") as file:
        subprocess.Popen(["cat"], stdin=ours, stdout=file, stderr=subprocess.DEVNULL)
    os.dup2(theirs, 1)
    os.dup2(theirs, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))


class Paced(L.Callback):
    """Paces a run of lkd."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Wait for the first order."""
        Pace.current.wait()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report the step; all training batches are full."""
        Pace.current.step(trainer.datamodule.batch_size)


def lkd_fit(pace: GpuPace, settings: list[str], folder: str, device: str) -> None:
    """`lkd fit` as its users run it, in a terminal: TensorBoard, progress bar, metrics and checkpoints on."""
    from lkd.__main__ import main

    Path(folder).mkdir()
    os.chdir(folder)
    in_a_terminal("log.txt")
    pace.log = Path("log.txt")
    paced = "--trainer.callbacks+=benchmarks.gpu_loops.Paced"
    code = main(["fit", *settings, *trained_on(device), paced, "--debug"])
    raise RuntimeError(f"lkd fit ended with exit code {code}")
