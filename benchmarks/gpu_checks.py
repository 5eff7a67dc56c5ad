"""Checks and complete run of `python -m benchmarks.gpu`, executed in worker processes."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch.distributed.fsdp import fully_shard

from benchmarks.gpu_runs import (
    Checks,
    Fit,
    NotApplicable,
    command,
    fit,
    has_graph,
    print_to_terminal,
    step_of,
    trained_on,
)
from lkd import DistillModule
from lkd.cli.config_files import configs_folder

METHODS = configs_folder() / "methods"
RANDOM = {
    **dict.fromkeys(("mgd", "mgd_segmentation", "vitkd"), "masks"),
    **dict.fromkeys(("crd", "dkd_crd_at"), "negatives"),
    **dict.fromkeys(("cirkd", "cirkd_channel"), "keys"),
}
"""What a criterion draws from the device's generator; with the same seed, CPU and GPU draw different numbers."""
BEFORE = {"takd": ["assistant"], "multi_teacher": ["assistant"], "born_again_ensemble": ["born_again"] * 2}
"""Runs that a complete config requires."""
PAIRS = {"deit": "resnet56_deit_tiny_100", "vitkd": "deit_small_deit_tiny_100"}
"""Pairs of the methods that need transformers."""
SHORT = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]
SHARDS = json.dumps(
    {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 1, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
    }
)


def overlay_settings(name: str) -> list[str]:
    """Arguments of `lkd fit` that combine an overlay with a small pair and small data.

    Args:
        name: The overlay's name in configs/methods.
    """
    if name in PAIRS and importlib.util.find_spec("timm") is None:
        raise NotApplicable("timm is not installed")
    if "SemanticSegmentation" in (METHODS / f"{name}.yaml").read_text():
        return ["--config=shapes/kd", f"--config=methods/{name}"]
    if name == "transfer_set":
        _unlabelled(Path("data/unlabelled"))
    pair = PAIRS.get(name, "digits")
    data = "digits" if pair == "digits" else "synthetic"
    small = [] if pair == "digits" else ["--data.init_args.num_classes=100", "--data.init_args.batch_size=16"]
    return [f"--config={config}" for config in (f"data/{data}", f"pairs/{pair}", f"methods/{name}")] + small


def _unlabelled(folder: Path) -> None:
    """Write 200 images without labels, unless they exist."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(200):
        pixels = generator.integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def overlay(device: str, name: str) -> Checks:
    """Check that an overlay trains, matches the CPU's losses, and gives the same losses and weights with a CUDA graph.

    Args:
        device: `cuda` or `cpu`.
        name: The overlay's name in configs/methods.
    """
    exact = ["--trainer.precision=32-true", "--trainer.deterministic=warn"]

    @cache
    def run(place: str, folder: str, *settings: str) -> Fit:
        return fit(folder, place, *overlay_settings(name), *SHORT, *settings)

    def as_on_the_cpu() -> str:
        if name in RANDOM:
            raise NotApplicable(f"CPU and GPU draw different {RANDOM[name]}")
        ours, theirs = (run(place, f"{place}_off", *exact, "--speed.graph=off").losses[:2] for place in (device, "cpu"))
        return within(apart(ours, theirs), 1e-3, "the first two losses differ by")

    def as_without_graph() -> str:
        graph, plain = (run(device, f"{device}_{graph}", *exact, f"--speed.graph={graph}") for graph in ("auto", "off"))
        if device == "cuda" and not has_graph(graph.step):
            raise (ValueError if name == "kd" else NotApplicable)(f"the step is not captured: {graph.step}")
        losses = within(apart(graph.losses[:6], plain.losses[:6]), 1e-5, "six losses differ by")
        pairs = [(graph.weights[key].double(), weight.double()) for key, weight in plain.weights.items()]
        gaps = [(ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3) for ours, theirs in pairs]
        return f"{losses}, {within(float(torch.stack(gaps).max()), 1e-4, 'final weights by')}"

    return {
        "trains": lambda: run(device, "plain", "--trainer.deterministic=false").step,
        "equal losses on GPU and CPU": as_on_the_cpu,
        "equal results with and without a graph": as_without_graph,
    }


def apart(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative difference of two lists of losses; infinite if one is empty or not finite."""
    pairs = list(zip(ours, theirs, strict=True))
    worst = max((abs(one - other) / max(abs(other), 1e-6) for one, other in pairs), default=float("inf"))
    return worst if np.isfinite([*ours, *theirs]).all() else float("inf")


def within(worst: float, limit: float, what: str) -> str:
    """Return the remark on a difference.

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


def resumed(device: str, name: str) -> Checks:
    """Check that a run resumed within an epoch ends with the weights of an uninterrupted run.

    Args:
        device: `cuda` or `cpu`.
        name: An overlay's name in configs/methods.
    """

    def check() -> str:
        limits = ["--trainer.deterministic=true", "--trainer.max_epochs=2", "--trainer.limit_train_batches=5"]
        settings = [*overlay_settings(name), *limits]
        whole = fit("whole", device, *settings)
        fit("parts", device, *settings, "--trainer.max_steps=7")
        (last,) = Path("parts").rglob("last.ckpt")
        same(fit("parts", device, *settings, f"--ckpt_path={last}"), whole)
        return whole.step

    return {"the resumed run equals the uninterrupted one": check}


def cached(device: str) -> Checks:
    """Check that a run with cached logits equals the run that filled the cache."""

    def check() -> str:
        settings = ["--config=digits/kd", "--trainer.max_epochs=2", "--trainer.deterministic=true"]
        runs = [fit(folder, device, *settings, "--teacher_cache.versions=1") for folder in ("filling", "filled")]
        found = [re.findall(r"\b([01]) of 1\b", run.text)[:1] for run in runs]
        if found != [["0"], ["1"]]:
            raise ValueError(f"the runs found {found} of 1 variants in the cache instead of 0, then 1")
        same(*runs)
        return runs[1].step

    return {"a run that finds cached logits equals the one that computed them": check}


class NoWaiting(L.Callback):
    """Raise an error if steps 5 to 9 synchronize with the GPU, as PyTorch detects it; nothing is logged in them."""

    watched = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Make synchronization an error."""
        if trainer.global_step == 5:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Allow synchronization again."""
        if trainer.global_step == 10:
            torch.cuda.set_sync_debug_mode("default")
            self.watched = True

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check that these steps were taken."""
        if not self.watched:
            raise RuntimeError(f"the run ended after {trainer.global_step} steps, before step 10")


def unsynchronized(device: str, name: str, graph: str = "auto") -> Checks:
    """Check that training in a terminal does not synchronize with the GPU.

    Args:
        device: `cuda` or `cpu`.
        name: An overlay's name in configs/methods.
        graph: The value of `--speed.graph`.
    """

    def check() -> str:
        if device != "cuda":
            raise NotApplicable("needs CUDA")
        print_to_terminal("log.txt")
        watch = [f"--trainer.callbacks+={__name__}.NoWaiting", "--trainer.log_every_n_steps=1000"]
        settings = [*overlay_settings(name), f"--speed.graph={graph}", "--trainer.max_epochs=1", *watch]
        return fit("run", device, *settings, bar=True).step

    return {"none within a step": check}


def commands(device: str, reduced: bool) -> Checks:
    """Check all commands after a run on the device.

    Args:
        device: `cuda` or `cpu`.
        reduced: Whether to run only two of them.
    """
    best = "--ckpt_path=runs/digits/kd/version_0/checkpoints/best.ckpt"
    onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    there = [*SHORT, *trained_on(device), "--trainer.enable_progress_bar=false"]
    compared = [f"--accelerator={'gpu' if device == 'cuda' else device}", "--seconds=0.05"]
    calls = {
        "fit with a teacher": ["fit", "--config=digits/kd", *there],
        "predict": ["predict", best],
        "fit without": ["fit", "--config=digits/student", *there],
        "validate": ["validate", best],
        "test": ["test", best],
        "compare": ["compare", "runs/digits/kd", "alone=runs/digits/student", *compared],
        "export": ["export", "runs/digits/kd", f"--format=safetensors,torch{',onnx' * onnx}"],
    }
    chosen = list(calls)[:2] if reduced else list(calls)
    return {name: partial(_optimizations, *calls[name]) for name in chosen}


def _optimizations(*args: str) -> str:
    return step_of(command(*args))


def complete(device: str, name: str) -> Checks:
    """Check that a complete config of configs/digits trains, after the runs that it requires."""

    def check() -> str:
        text, small = "", ["--data.init_args.batch_size=8", "--trainer.enable_progress_bar=false"]
        for config in (*BEFORE.get(name, []), name):
            generated = [f"--data.init_args.extra.init_args.{size}" for size in ("number=20", "steps=2")]
            extra = generated if config == "data_free" else []
            text = command("fit", f"--config=digits/{config}", *SHORT, *small, *extra, *trained_on(device))
        return step_of(text)

    return {"trains": check}


class Sharded(DistillModule):
    """Distillation module whose student is sharded with FSDP2."""

    def configure_model(self) -> None:
        """Shard the student."""
        super().configure_model()
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def parallel(device: str, strategy: str | None) -> Checks:
    """Check that a strategy for several processes trains with one process.

    Args:
        device: `cuda` or `cpu`.
        strategy: Name of the strategy; `None` selects FSDP2.
    """
    settings = [f"--trainer.strategy={strategy or SHARDS}"]
    settings += [] if strategy else [f"--model.class_path={__name__}.Sharded"]
    return {"trains": lambda: fit("run", device, "--config=digits/kd", *settings, *SHORT).step}


def full(device: str, settings: list[str], seconds: int) -> Checks:
    """Train a complete run and test its best checkpoint.

    Args:
        device: `cuda` or `cpu`.
        settings: Arguments of `lkd fit`.
        seconds: Time limit of the run.
    """

    def check() -> str:
        from benchmarks.lives import curves

        start = time.monotonic()
        limit = f"--trainer.max_time=00:{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        text = command("fit", *settings, *trained_on(device), limit, "--trainer.enable_progress_bar=false")
        wall = time.monotonic() - start
        (best,) = Path("runs").rglob("best.ckpt")
        found = curves(best.parent.parent)
        accuracies, epochs = [value for _, value in found["val/acc"]], int(found["epoch"][-1][1]) + 1
        (accuracy,) = re.findall(r"test/acc\W+([\d.]+)", command("test", f"--ckpt_path={best}"))
        return (
            f"{epochs} epochs in {wall:.0f} s, {wall / epochs:.2f} s per epoch; validation accuracy "
            f"{max(accuracies):.2%} (best), {accuracies[-1]:.2%} (last); test accuracy {float(accuracy):.2%} (best "
            f"checkpoint); {step_of(text)}"
        )

    return {"trains": check}
