"""Optimizations that run the same training step faster on the available device."""

from __future__ import annotations

import ctypes
import platform
from contextlib import nullcontext
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lkd import devices
from lkd._compat import AnyBatchNorm, has_forward_hooks, remove_compiled_call, tree_map
from lkd.callbacks.eval_graph import EvalGraph
from lkd.callbacks.graph_obstacles import obstacle
from lkd.callbacks.monitor import fitting, network_size
from lkd.callbacks.optimizers import count_on_device, count_on_host, fuse
from lkd.callbacks.step_graph import StepGraph
from lkd.datamodules import ImageDataModule
from lkd.features.extractor import FeatureExtractor
from lkd.features.layers import evaluating
from lkd.io.refused import first_line
from lkd.models.fusion import fold_batch_norms

CompileMode = Literal["auto", "off", "default", "reduce-overhead", "max-autotune"]
GraphMode = Literal["auto", "off"]

_LONG = 2000
"""Number of steps that amortizes compilation on a CPU with matrix units; compilation takes up to a minute."""

_MALLOPT = {-4: 0, -1: 2**31 - 1, -2: 2**26}
"""From malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD."""

_WITH_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes of `torch.compile` that capture CUDA graphs, which cannot be part of another graph."""

_HOOKS = (
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end"),
)
"""Hooks that Lightning calls on each callback in each step."""

_NOTHING = nullcontext()

_SHARDING = (FSDPStrategy, ModelParallelStrategy)
"""Strategies with sharded weights, which have no memory format."""

_MEGAFLOPS = 5.0
"""Operations per image above which bfloat16 is faster on a CPU; below, conversions dominate."""


class Speed(L.Callback):
    """Run the same training step faster.

    Results differ from those without this callback by rounding only. The active optimizations are printed when `fit`
    starts.

    Args:
        channels_last: Whether convolution weights, and thus the outputs of convolutions, use the channels-last memory
            format. If `None`, it is used on a CPU, where it is 1.3 times as fast, and on a GPU with 16-bit precision,
            but not for a custom criterion that reads features, since it may depend on their memory format, nor with
            sharded weights.
        fold_teacher: Whether to fold the frozen teacher's batch norms into its convolutions if only its logits are
            read.
        compile: Mode of `torch.compile` for student and teacher in training. `auto` selects `default` on a CPU with
            matrix units (AMX) for runs of at least 2,000 steps, which amortize the compilation, and `off` elsewhere: on
            a GPU, compilation gained nothing in the measured runs (benchmarks/gpu.md). If compilation fails, the
            network runs uncompiled.
        keep_memory: Whether, on a CPU, the process keeps freed memory for later steps (glibc's `mallopt`, in effect
            until the process ends). Otherwise most memory is returned to the system after each step and allocated again
            page by page, filled with zeros, which takes a fifth of the step time. Peak memory is the same.
        fuse_optimizer: Whether to use the fused implementation of SGD, Adam and AdamW, unless an implementation is
            selected explicitly, or fp16 gradient scaling or sharded weights are used.
        graph: `auto` runs the whole training step as one CUDA graph, which is checked against the ordinary step before
            it is used. This requires a single CUDA device and a single optimizer, without gradient accumulation,
            float16 gradient scaling, or hooks of callbacks or modules inside the step. The line printed when `fit`
            starts states whether a graph is used, or why not. `off` launches each operation separately.
    """

    def __init__(
        self,
        channels_last: bool | None = None,
        fold_teacher: bool = True,
        compile: CompileMode = "auto",
        keep_memory: bool = True,
        fuse_optimizer: bool = True,
        graph: GraphMode = "auto",
    ) -> None:
        self.graph = graph
        self._step_graph: StepGraph | None = None
        self._eval_graph: EvalGraph | None = None
        self.channels_last, self.fold_teacher, self.compile = channels_last, fold_teacher, compile
        self.keep_memory, self.fuse_optimizer = keep_memory, fuse_optimizer
        self._compiled: list[nn.Module] = []
        self._own_extractor: FeatureExtractor | None = None
        self._version = 0  # teacher version at the time of folding
        self._applied: list[str] = []
        self._no_graph = ""
        self._data: ImageDataModule | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Set the memory format before optimizers and other processes use the weights."""
        self._applied = [str(trainer.precision)]
        gpu = devices.is_gpu(trainer.strategy.root_device)
        wanted = self.channels_last
        if wanted is None:
            wanted = not gpu or str(trainer.precision).startswith(("16", "bf16"))
            sharded = isinstance(trainer.strategy, _SHARDING)
            wanted = wanted and not sharded and not _custom_code_reads_features(pl_module)
        networks = [getattr(pl_module, name) for name in getattr(pl_module, "network_names", ())]
        if wanted and any(devices.breaks_channels_last(network, trainer.strategy.root_device) for network in networks):
            self._applied.append("channels first (channels last is disabled due to a bug in oneDNN on this CPU)")
            return
        if not wanted or not sum(_lay_out(network, torch.channels_last) for network in networks):
            return
        try:
            for network in networks:
                _try(network, pl_module.example_input())
        except RuntimeError as error:
            for network in networks:
                _lay_out(network, torch.contiguous_format)
            self._applied.append(f"channels first (a network fails with channels last: {first_line(error)[:100]})")
        else:
            self._applied.append("channels last")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Fold the teacher's batch norms, and compile the networks."""
        self._no_graph = self._why_no_graph(trainer, pl_module)
        self._data = trainer.datamodule if isinstance(trainer.datamodule, ImageDataModule) else None  # type: ignore[attr-defined]
        if self._data is not None:
            self._data.uses_graphs = not self._no_graph
        self._fold(trainer, pl_module)
        if self.keep_memory and trainer.strategy.root_device.type == "cpu" and _keep_memory():
            self._applied.append("freed memory reused")
        self._compile(trainer, pl_module)

    def _fold(self, trainer: L.Trainer, module: Any) -> None:
        extractor, example = getattr(module, "teacher_extractor", None), module.example_input()
        if (
            not self.fold_teacher
            or extractor is None
            or extractor.layers
            or module.teacher_changes
            or not _is_image(example)
        ):
            return
        layers = list(module.teacher.modules())
        read = any(has_forward_hooks(layer) for layer in layers)
        if read or not any(isinstance(layer, AnyBatchNorm) for layer in layers):
            return
        generator = torch.Generator().manual_seed(0)
        noise = fitting(torch.randn((2, *example.shape[1:]), generator=generator), module.teacher)
        join = devices.is_gpu(trainer.strategy.root_device) and self._mode(trainer, module)[0] is None
        low = torch.bfloat16 if str(trainer.precision) == "bf16-mixed" else None
        try:
            folded = fold_batch_norms(module.teacher, noise, low, join, module.task.logits)
        except ValueError as error:
            self._applied.append(f"teacher batch norms not folded ({error})")
        else:
            module.teacher_extractor = FeatureExtractor(folded, read=module.task.logits)
            self._own_extractor, self._version = extractor, module.teacher_version
            self._applied.append("teacher batch norms folded")

    def _compile(self, trainer: L.Trainer, module: Any) -> None:
        mode, reason = self._mode(trainer, module)
        if mode is None:
            self._applied.append(f"torch.compile off{reason}")
            return
        extractor = getattr(module, "teacher_extractor", None)
        networks = [module.model, *([] if extractor is None or module.saves_teacher else [extractor.network])]
        for network in networks:
            network.compile(mode=mode)
        self._compiled = networks
        try:
            self._try_compiled(trainer, module)
        except Exception as error:  # compilers and custom networks may raise anything
            self._uncompile()
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
            self._applied.append(f"torch.compile off (failed: {reason})")
        else:
            self._applied.append(f"torch.compile {mode}")

    def _mode(self, trainer: L.Trainer, module: Any) -> tuple[str | None, str]:
        if self.compile != "off" and not _is_image(module.example_input()):
            return None, " (supported for image inputs only)"
        task = getattr(module, "task", None)
        if self.compile != "off" and task is not None and task.graph_obstacle:
            return None, f" ({task.graph_obstacle})"
        if self.compile != "auto":
            return (None, "") if self.compile == "off" else (self.compile, "")
        device = trainer.strategy.root_device
        if not devices.compiles_well(device):
            return None, " (no gain on this device)"
        if (steps := trainer.estimated_stepping_batches) < _LONG:
            return None, f" (not worthwhile for {steps:,} steps)"
        return "default", ""

    def _try_compiled(self, trainer: L.Trainer, module: Any) -> None:
        """Run a forward and a backward pass of a full batch, and undo all side effects."""
        example, model = module.example_input(), module.model
        size = getattr(trainer.datamodule, "batch_size", 2)  # type: ignore[attr-defined]
        batch = fitting(torch.zeros((size, *example.shape[1:])), model)
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
        modes = {layer: layer.training for layer in model.modules()}
        random = devices.rng_states(batch.device)
        try:
            with trainer.precision_plugin.forward_context():
                torch.autograd.backward(module.task.logits(model(batch)).float().sum())
                with torch.no_grad():
                    for network in self._compiled[1:]:
                        network(batch)
        finally:
            for layer, training in modes.items():
                layer.training = training
            model.zero_grad(set_to_none=True)
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])
            devices.set_rng_states(batch.device, random)

    def _uncompile(self) -> None:
        for network in self._compiled:
            remove_compiled_call(network)
        self._compiled = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Fuse the optimizer, print the active optimizations, and make Lightning skip callback hooks that do nothing.

        Of about 80 hooks of callbacks per step, 7 do something. The pass-through profiler is skipped as well.
        """
        if self.fuse_optimizer and [o for o in trainer.optimizers if fuse(o, str(trainer.precision))]:
            self._applied.append("optimizer fused")
        self._prepare_graph(trainer, pl_module)
        pl_module.print(f"Optimizations: {', '.join(self._applied)}")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for name in _HOOKS:
                if name not in vars(callback) and getattr(type(callback), name) is getattr(L.Callback, name):
                    setattr(callback, name, None)  # Lightning skips hooks that are not callable
        profiler = trainer.profiler  # type: ignore[attr-defined]
        if type(profiler) is PassThroughProfiler:
            vars(profiler)["profile"] = lambda name: _NOTHING

    def _why_no_graph(self, trainer: L.Trainer, module: Any) -> str:
        """Return why the step is not captured as a graph; empty if it is."""
        if devices.step_capture(trainer.strategy.root_device) is None:
            return "not on this device"
        if self.graph == "off":
            return "off"
        if self.compile in _WITH_GRAPHS:
            return f"torch.compile {self.compile} uses its own graphs"
        return obstacle(trainer, module)

    def _prepare_graph(self, trainer: L.Trainer, module: Any) -> None:
        capture = devices.step_capture(trainer.strategy.root_device)
        if capture is None:
            for optimizer in trainer.optimizers:
                count_on_host(optimizer)
            return
        for optimizer in trainer.optimizers:
            count_on_device(optimizer)
        self._applied.append(f"no CUDA graph ({self._no_graph})" if self._no_graph else "whole step as a CUDA graph")
        if not self._no_graph:
            self._step_graph = module.step_graph = StepGraph(trainer, module, capture)
            self._eval_graph = module.eval_graph = EvalGraph(module, capture)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Revert the changes made in `on_train_start`."""
        if self._step_graph is not None:
            pl_module.step_graph = self._step_graph = None
            pl_module.eval_graph = self._eval_graph = None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for name in _HOOKS:
                if vars(callback).get(name, callback) is None:
                    delattr(callback, name)
        vars(trainer.profiler).pop("profile", None)  # type: ignore[attr-defined]

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Revert all changes if the run fails."""
        self.on_train_end(trainer, pl_module)
        self.teardown(trainer, pl_module, "fit")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Mark the beginning of a step for the CUDA graphs of `torch.compile`, which may then reuse their memory."""
        if self._compiled and self.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Recheck the constants of the graph, and use the original teacher if it has changed since it was folded."""
        if self._step_graph is not None:
            self._step_graph.recheck()
        if self._own_extractor is not None and pl_module.teacher_version != self._version:
            pl_module.teacher_extractor, self._own_extractor = self._own_extractor, None

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Disable compiled networks in validation, as other batch sizes and modes would cause recompilation."""
        if self._eval_graph is not None:
            self._eval_graph.begin()
        if self._compiled:
            torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Enable compiled networks again for training."""
        if self._step_graph is not None:
            self._step_graph.recheck()
        if self._compiled:
            torch.compiler.set_stance("default")

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Restore the original networks."""
        if self._data is not None:
            self._data.uses_graphs, self._data = False, None
        if self._compiled:
            torch.compiler.set_stance("default")
        self._uncompile()
        if self._own_extractor is not None:
            pl_module.teacher_extractor, self._own_extractor = self._own_extractor, None
        if "channels last" in self._applied:
            for name in pl_module.network_names:
                _lay_out(getattr(pl_module, name), torch.contiguous_format)


def fitting_precision(module: Any, example: Tensor | None, gpu: bool) -> Literal["bf16-mixed", "32-true"]:
    """Return the default training precision: bfloat16 if the device supports it natively and it is faster.

    Losses are computed in float32 in any case.

    Args:
        module: A `ClassificationModule`.
        example: One blank input on the CPU.
        gpu: Whether the module is trained on a GPU.
    """
    networks = [getattr(module, name) for name in getattr(module, "network_names", ())]
    if not networks or not _is_image(example):
        return "32-true"
    if not devices.has_bf16_units(gpu):
        return "32-true"
    if gpu:
        return "bf16-mixed"
    convolutions = [layer for layer in networks[0].modules() if isinstance(layer, nn.Conv2d)]
    if any(layer.groups > 1 for layer in convolutions):  # depthwise convolutions in bfloat16 are slow on a CPU
        return "32-true"
    try:
        flops = network_size("", networks[0], example).flops or 0
    except RuntimeError:  # the network does not accept the input; setup reports it
        return "32-true"
    return "bf16-mixed" if flops > 1e6 * _MEGAFLOPS else "32-true"


def _keep_memory() -> bool:
    """Make glibc neither map large blocks separately nor trim its heap; return False for other C libraries."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) for option, value in _MALLOPT.items())


def _custom_code_reads_features(module: Any) -> bool:
    """Return whether custom code reads features and may depend on their memory format."""
    criterion = getattr(module, "criterion", None)
    if criterion is None or not (criterion.student_layers or criterion.teacher_layers):
        return False
    parts = [*criterion.modules(), module]
    return not all(type(part).__module__.startswith(("lkd.", "torch.")) for part in parts)


def _lay_out(network: nn.Module, memory_format: torch.memory_format) -> int:
    convolutions = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    for layer in convolutions:
        layer.weight.data = layer.weight.data.contiguous(memory_format=memory_format)
    return len(convolutions)


def _try(network: nn.Module, example: Any) -> None:
    if example is not None:
        twice = tree_map(lambda leaf: torch.cat((leaf, leaf)) if isinstance(leaf, Tensor) else leaf, example)
        with torch.no_grad(), evaluating(network):
            network(fitting(twice, network))  # view() of a single image would not fail with channels last


def _is_image(example: Any) -> bool:
    return isinstance(example, Tensor) and example.dim() == 4
