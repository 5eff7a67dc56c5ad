"""Optimizations do not change the arithmetic; those that do not apply are disabled and reported."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from benchmarks import warm
from lkd import ClassificationModule, DistillModule, PastTeacherModule, devices
from lkd.__main__ import main
from lkd.callbacks import Speed
from lkd.callbacks.graph_constants import constants_of
from lkd.callbacks.optimizers import fuse
from lkd.callbacks.speed import fitting_precision
from lkd.losses import AT, DistillLoss
from lkd.models import CIFARResNet, mobilenetv2, resnet8, resnet20, torchvision_model
from lkd.models.fusion import fold_batch_norms


class ChannelsFirst(nn.Module):
    """A network whose code requires channels-first tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 8 * 8, 4)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(image).view(len(image), -1))
        return logits


class Untraceable(nn.Module):
    """A teacher that cannot be traced, because its control flow depends on values."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image if image.sum() > 0 else 1.0 * image)
        return logits


class MyAT(DistillLoss):
    """A user's criterion."""

    def __init__(self) -> None:
        super().__init__(["layer1"], ["layer1"])

    def forward(self, student: Any, teacher: Any, batch: Any) -> Tensor:
        (ours,), (theirs,) = student.features.values(), teacher.features.values()
        loss: Tensor = (ours.view(len(ours), -1) - theirs.view(len(theirs), -1)).pow(2).mean()
        return loss


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """Return a function that creates networks with enough channels for channels-last on every CPU."""

    def make(seed: int = 0, num_classes: int = 4, in_channels: int = 3) -> nn.Module:
        torch.manual_seed(seed)
        return CIFARResNet(8, (16, 16, 16, 16), num_classes, in_channels)

    return make


@pytest.fixture
def fit(trainer, data, capfd) -> Callable[..., str]:
    """Return a function that trains a module and returns the reported optimizations."""

    def make(module: L.LightningModule, *speed: Speed, **settings: Any) -> str:
        capfd.readouterr()
        trainer(callbacks=list(speed), **settings).fit(module, data)
        report = [line for line in capfd.readouterr().out.splitlines() if line.startswith("Optimizations:")]
        return report[0] if report else ""

    return make


def weights(module: DistillModule) -> list[Tensor]:
    return [tensor.clone() for tensor in module.student.state_dict().values()]


def test_optimizations_do_not_change_the_result(distill, fit) -> None:
    plain, lean = distill(), distill()
    assert fit(plain) == ""
    before = [tensor.clone() for tensor in lean.teacher.state_dict().values()]
    report = fit(lean, Speed())
    assert report.startswith("Optimizations: 32-true, channels last, teacher batch norms folded")
    assert lean.student.conv1.weight.is_contiguous()  # as before the run
    for one, other in zip(weights(plain), weights(lean), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    after = lean.teacher.state_dict().values()
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert lean.teacher_extractor.network is lean.teacher


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_fused_optimizers_give_the_same_result_and_resume(distill, data, trainer, tmp_path: Path, kind: type) -> None:
    """Runs also resume from checkpoints of runs without fused optimizers."""

    def fit(epochs: int, fuse: bool, ckpt: Path | None = None) -> DistillModule:
        module = distill(optimizer=lambda parameters: kind(parameters, lr=0.01))
        run = trainer(callbacks=[Speed(fuse_optimizer=fuse, channels_last=False)], max_epochs=epochs)
        run.fit(module, data, ckpt_path=ckpt)
        run.save_checkpoint(tmp_path / f"{fuse}{epochs}.ckpt")
        return module

    expected = weights(fit(4, fuse=False))
    fit(2, fuse=True)
    fit(2, fuse=False)
    runs = [fit(4, True), fit(4, True, tmp_path / "True2.ckpt"), fit(4, True, tmp_path / "False2.ckpt")]
    for module in runs:
        for one, other in zip(expected, weights(module), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_explicit_optimizer_settings_are_kept(distill, fit) -> None:
    optimizers = [
        lambda parameters: SGD(parameters, lr=0.1, foreach=False),
        lambda parameters: SGD(parameters, lr=0.1, fused=False),
        lambda parameters: RMSprop(parameters),
    ]
    for make in optimizers:
        assert "fused" not in fit(distill(optimizer=make), Speed())


class Listener(L.Callback):
    """A callback that uses one hook of a step."""

    calls = 0

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("fails", [False, True])
def test_empty_hooks_are_skipped_during_training(distill, data, trainer, monkeypatch, fails: bool) -> None:
    listener = Listener()
    run = trainer(callbacks=[Speed(), listener], max_epochs=1)
    skipped = []

    class Spy(DistillModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            skipped.append([name for name, hook in vars(listener).items() if hook is None])
            if fails and batch_idx == 2:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    try:
        run.fit(distill(Spy), data)
    except RuntimeError:
        assert fails
    assert listener.calls == (2 if fails else 3)
    assert len(skipped[0]) == 5
    assert "on_after_backward" not in skipped[0]
    assert not any(
        value is None for callback in run.callbacks for name, value in vars(callback).items() if "on_" in name
    )
    assert "profile" not in vars(run.profiler)


def test_hooks_of_an_instance_are_called(distill, fit, data, trainer) -> None:
    calls = []
    own = LambdaCallback(on_train_batch_end=lambda *args: calls.append(1))
    trainer(callbacks=[Speed(), own], max_epochs=1).fit(distill(), data)
    assert len(calls) == 3
    assert callable(own.on_train_batch_end)


def test_modified_teacher_is_not_replaced(distill, data, trainer) -> None:
    class Change(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            folded.append(pl_module.teacher_extractor.network is not pl_module.teacher)
            pl_module.teacher.conv1.weight.mul_(2)

    folded: list[bool] = []
    trainer(callbacks=[Change(), Speed()], max_epochs=2).fit(distill(), data)
    assert folded == [True, False]


def test_teacher_with_hooks_is_not_folded(distill, fit) -> None:
    module = distill()
    module.teacher.layer3.register_forward_hook(lambda *args: None)
    assert "fold" not in fit(module, Speed())


def test_all_optimizations_can_be_disabled(distill, fit) -> None:
    plain, off = distill(), distill()
    fit(plain)
    report = fit(
        off, Speed(channels_last=False, fold_teacher=False, compile="off", keep_memory=False, fuse_optimizer=False)
    )
    assert report == "Optimizations: 32-true, torch.compile off"
    assert all(torch.equal(*pair) for pair in zip(weights(plain), weights(off), strict=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="requires the allocator of glibc")
def test_freed_memory_is_reused() -> None:
    """Otherwise, each block of 64 MiB is allocated by the system page by page, and returned to it."""
    program = """
import resource, sys, torch
from lkd.callbacks.speed import _keep_memory
if sys.argv[1] == "keep":
    assert _keep_memory()
for _ in range(3):
    torch.ones(2**24)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(3)))  # the least, as a busy system may take pages away meanwhile
"""
    Path("faults.py").write_text(program)
    faults = [int(warm.Forked(warm.script, "faults.py", way).wait().stdout) for way in ("keep", "return")]
    assert 20 * faults[0] < faults[1]


def test_compiled(distill, fit) -> None:
    plain, compiled = distill(), distill()
    fit(plain)
    assert "torch.compile default" in fit(compiled, Speed(compile="default"))
    for one, other in zip(weights(plain), weights(compiled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert compiled.student._compiled_call_impl is None


def test_compilation_failure_is_reported(distill, fit, monkeypatch, tmp_path: Path) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    plain, module = distill(), distill()
    report = fit(module, Speed(compile="default", channels_last=False, fold_teacher=False, fuse_optimizer=False))
    assert "torch.compile off (failed: " in report
    assert "compiler" in report
    fit(plain)
    assert all(torch.equal(*pair) for pair in zip(weights(plain), weights(module), strict=True))


def test_network_that_requires_channels_first(fit) -> None:
    assert "channels first (a network fails with channels last: view size" in fit(
        ClassificationModule(ChannelsFirst()), Speed()
    )


def test_own_criteria_get_channels_first(distill, fit) -> None:
    assert "channels last" not in fit(distill(criterion=MyAT()), Speed())
    assert "channels last" in fit(distill(criterion=AT(["layer1"], ["layer1"])), Speed())


def test_teacher_that_cannot_be_folded(distill, tiny, fit) -> None:
    module = distill(teacher=Untraceable(tiny(seed=2)))
    assert "teacher batch norms not folded (it cannot be traced: symbolically traced variables" in fit(module, Speed())


def test_folding_is_disabled_for_features_and_changing_teachers(distill, tiny, fit) -> None:
    assert "fold" not in fit(distill(criterion=AT(["layer1"], ["layer1"])), Speed())
    assert "fold" not in fit(PastTeacherModule(tiny(seed=1)), Speed())


@pytest.mark.parametrize("make", [lambda: resnet8(num_classes=5), lambda: torchvision_model("resnet18", num_classes=5)])
def test_folded_networks_give_the_same_logits(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    network = make()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    network.eval()
    image = torch.randn(4, 3, 32, 32)
    folded = fold_batch_norms(network, image)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules() if layer in _called(folded))
    with torch.no_grad():
        torch.testing.assert_close(folded(image), network(image), rtol=1e-4, atol=1e-4)


def _called(network: Any) -> list[nn.Module]:
    return [network.get_submodule(node.target) for node in network.graph.nodes if node.op == "call_module"]


def test_shared_convolution() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
            for number, norm in enumerate(self.norms):
                nn.init.constant_(norm.running_mean, 1.0 + number)
                nn.init.constant_(norm.running_var, 2.0 + number)

        def forward(self, image: Tensor) -> Tensor:
            for norm in self.norms:
                image = norm(self.conv(image))
            logits: Tensor = self.head(image.mean((2, 3)))
            return logits

    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"its logits differ by .* after folding"):
        fold_batch_norms(Shared().eval(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("network", "has_units", "precision"),
    [
        pytest.param(resnet20, True, "bf16-mixed", id="large enough"),
        pytest.param(resnet20, False, "32-true", id="no units"),
        pytest.param(mobilenetv2, True, "32-true", id="depthwise convolutions"),
    ],
)
def test_precision(monkeypatch, network, has_units: bool, precision: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_units)
    module = ClassificationModule(network(num_classes=10))
    assert fitting_precision(module, torch.zeros(1, 3, 32, 32), gpu=False) == precision
    assert fitting_precision(module, torch.zeros(1, 3, 4, 4), gpu=False) == "32-true"
    assert fitting_precision(module, None, gpu=False) == "32-true"


@pytest.mark.parametrize(
    ("capability", "channels", "unsafe"),
    [("AVX2", 4, True), ("AVX2", 8, False), ("AVX512", 8, True), ("AVX512", 16, False)],
)
def test_channels_last_is_disabled_for_the_onednn_bug(
    monkeypatch, fit, capability: str, channels: int, unsafe: bool
) -> None:
    network = CIFARResNet(8, (channels, channels, 16, 16), num_classes=4)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert devices.breaks_channels_last(network, torch.device("cpu")) == unsafe
    assert not devices.breaks_channels_last(network, torch.device("meta"))
    if unsafe:
        assert "channels first (channels last is disabled due to a bug in oneDNN on this CPU)" in fit(
            ClassificationModule(network), Speed(channels_last=True)
        )


@pytest.mark.parametrize(("settings", "precision"), [([], "bf16-mixed"), (["--trainer.precision=32-true"], "32-true")])
def test_command_line(monkeypatch, capfd, settings: list[str], precision: str) -> None:
    monkeypatch.setattr("lkd.callbacks.speed._MEGAFLOPS", 0.01)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert main(["fit", "--config", "digits/kd", "--trainer.fast_dev_run=2", *settings]) == 0
    assert f"Optimizations: {precision}, channels " in capfd.readouterr().out  # "last", or "first" if that is unsafe
    assert main(["fit", "--config", "digits/kd", "--trainer.max_steps=2", *settings]) == 0
    (saved,) = Path("runs").rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["trainer"]["precision"] == precision


@pytest.mark.parametrize(
    ("precision", "fused"), [("32-true", True), ("bf16-mixed", True), ("16-mixed", False), ("16-true", False)]
)
def test_optimizers_are_not_fused_with_gradient_scaling(precision: str, fused: bool) -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert fuse(optimizer, precision) is fused
    assert optimizer.param_groups[0]["fused"] == (True if fused else None)


def test_constants_of_a_graph(distill) -> None:
    module = distill()
    before = constants_of(module)
    assert constants_of(module) == before
    changes = [
        lambda: module.student.bn1.eval(),
        lambda: module.student.conv1.weight.requires_grad_(False),
        lambda: setattr(module.student.bn1, "momentum", 0.2),
        lambda: setattr(module.criterion, "temperature", 3.0),
        lambda: setattr(module.student.fc.weight, "data", module.student.fc.weight.data.clone()),
    ]
    for change in changes:
        change()
        after = constants_of(module)
        assert after != before
        before = after
