from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD

from lkd import DOT, DistillModule, DOTModule
from lkd.__main__ import main
from lkd.losses import KD, FitNet

LR, MOMENTUM, DELTA, DECAY = 0.05, 0.9, 0.075, 5e-3


def _dot(parameters, **settings) -> DOT:
    return DOT(parameters, **{"lr": LR, "momentum": MOMENTUM, "delta": DELTA, "weight_decay": DECAY, **settings})


class PlainDOT:
    """DOT implemented independently of lkd's optimizer, with two backward passes and two momenta."""

    def __init__(self, parameters: list[Tensor], delta: float = DELTA) -> None:
        self.parameters, self.delta = parameters, delta
        self.task = [torch.zeros_like(parameter) for parameter in parameters]
        self.distill = [torch.zeros_like(parameter) for parameter in parameters]

    def step(self, hard: Tensor, soft: Tensor, factor: float = 1.0) -> None:
        both = [torch.autograd.grad(loss, self.parameters, retain_graph=True) for loss in (hard, soft)]
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters):
                task, distill = (factor * gradient[number] for gradient in both)
                self.task[number] = (MOMENTUM - self.delta) * self.task[number] + task + DECAY * parameter
                self.distill[number] = (MOMENTUM + self.delta) * self.distill[number] + distill
                parameter -= LR * (self.task[number] + self.distill[number])


def _losses(weight: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, other = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    logits = image @ weight
    return F.cross_entropy(logits, torch.arange(5) % 3), F.mse_loss(logits, other[:, :3])


def _weight() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()


def test_optimizer_equals_the_paper() -> None:
    ours, theirs = _weight(), _weight()
    optimizer, plain = _dot([ours]), PlainDOT([theirs])
    for seed in range(5):
        optimizer.zero_grad()
        hard, soft = _losses(ours, seed)
        weight = seed != 3  # in a step without distillation, the distillation momentum still decays
        if weight:
            optimizer.add_distill_gradients([ours], torch.autograd.grad(soft, [ours], retain_graph=True))
        (hard + weight * soft).backward()
        optimizer.step()
        hard, soft = _losses(theirs, seed)
        plain.step(hard, weight * soft)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_without_delta_it_is_sgd(told: bool) -> None:
    """This also holds with any delta for a parameter that gets a gradient from only one of the losses."""
    ours, theirs = _weight(), _weight()
    optimizer = _dot([ours], delta=0.0) if told else _dot([ours])
    sgd = SGD([theirs], lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    for seed in range(5):
        for parameter, stepper in ((ours, optimizer), (theirs, sgd)):
            stepper.zero_grad()
            hard, soft = _losses(parameter, seed)
            if told and parameter is ours:
                optimizer.add_distill_gradients([ours], torch.autograd.grad(soft, [ours], retain_graph=True))
            (hard + soft).backward()
            stepper.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_optimizer_state_is_restored() -> None:
    ours, again = _weight(), _weight()
    optimizer = _dot([ours])
    for seed in range(2):
        _step(optimizer, ours, seed)
    later = _dot([again])
    with torch.no_grad():
        again.copy_(ours)
    later.load_state_dict(deepcopy(optimizer.state_dict()))
    for stepper, parameter in ((optimizer, ours), (later, again)):
        _step(stepper, parameter, 5)
    assert torch.equal(ours, again)


def _step(optimizer: DOT, parameter: Tensor, seed: int) -> None:
    optimizer.zero_grad()
    hard, soft = _losses(parameter, seed)
    optimizer.add_distill_gradients([parameter], torch.autograd.grad(soft, [parameter], retain_graph=True))
    (hard + soft).backward()
    optimizer.step()


def _flat(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8), nn.Tanh(), nn.Linear(8, 4))


class RecordBatches(L.Callback):
    """Records the batches of training."""

    def __init__(self) -> None:
        self.batches: list = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append(batch)


@pytest.mark.parametrize(
    ("settings", "delta"),
    [
        ({}, DELTA),
        ({}, 0.0),
        ({"accumulate_grad_batches": 3}, DELTA),
        ({"gradient_clip_val": 0.05}, DELTA),
    ],
    ids=["plain", "without delta", "accumulated", "clipped"],
)
def test_module_equals_a_plain_loop(data, trainer, settings, delta: float) -> None:
    """Training with Lightning in float64 equals a plain loop over the same batches."""
    keep, student, own, teacher = RecordBatches(), _flat(1), _flat(1).double(), _flat(2)
    module = DOTModule(
        student, teacher, KD(2.0), distill_weight=0.6, hard_weight=0.3, optimizer=lambda p: _dot(p, delta=delta)
    )
    engine = trainer(max_epochs=2, precision="64-true", callbacks=[keep], num_sanity_val_steps=0, **settings)
    engine.fit(module, data)
    plain, many = PlainDOT(list(own.parameters()), delta), settings.get("accumulate_grad_batches", 1)
    groups = [keep.batches[start : start + many] for start in range(0, len(keep.batches), many)]
    assert len(groups) == (6 if many == 1 else 2)
    for batches in groups:
        hard = soft = 0.0
        for batch in batches:
            logits = own(batch.input)
            with torch.no_grad():
                p = (teacher(batch.input) / 2).softmax(1)
            hard = hard + 0.3 * F.cross_entropy(logits, batch.target) / many
            soft = soft + 0.6 * 4 * (p * (p.log() - (logits / 2).log_softmax(1))).sum(1).mean() / many
        gradients = torch.autograd.grad(hard + soft, list(own.parameters()), retain_graph=True)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        clip = settings.get("gradient_clip_val")
        factor = 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6))
        assert clip is None or factor < 0.9
        plain.step(hard, soft, factor)
    for ours, theirs in zip(student.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_without_delta_it_is_a_distill_module(distill, data, trainer) -> None:
    """The modules have BatchNorm, adapters, and a criterion that gives the classifier no gradient."""
    kinds = {DOTModule: lambda p: _dot(p, delta=0.0), DistillModule: lambda p: SGD(p, LR, MOMENTUM, weight_decay=DECAY)}
    states = []
    for kind, optimizer in kinds.items():
        torch.manual_seed(0)
        module = distill(kind, criterion=FitNet(), optimizer=optimizer)
        trainer(max_epochs=2, num_sanity_val_steps=0).fit(module, data)
        states.append(module.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_parameters_of_one_loss_have_one_momentum(distill, data, trainer) -> None:
    module = distill(DOTModule, criterion=FitNet(), optimizer=_dot)
    engine = trainer(max_epochs=1)
    engine.fit(module, data)
    kept = {id(parameter): set(state) for parameter, state in engine.optimizers[0].state.items()}
    assert kept[id(module.model.conv1.weight)] == {"momentum", "distill_momentum"}
    assert kept[id(module.model.fc.weight)] == {"momentum"}
    assert kept[id(module.criterion.regressors[0][0].weight)] == {"momentum"}


def test_distillation_gradient_is_unscaled(data, trainer) -> None:
    """With a loss scaler in half precision, the distillation gradient is unscaled and close to that of float32."""
    found = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))]):
        student, teacher = _flat(1), _flat(2)
        module = DOTModule(student, teacher, optimizer=lambda p: _dot(p, lr=0.0))
        engine = trainer(max_epochs=1, plugins=plugins, num_sanity_val_steps=0)
        engine.fit(module, data)
        found.append([engine.optimizers[0].state[p]["distill_momentum"] for p in student.parameters()])
    for single, half in zip(*found, strict=True):
        torch.testing.assert_close(half, single, rtol=0.05, atol=1e-3)


def test_training_resumes_from_a_checkpoint(distill, resume) -> None:
    resume(lambda: distill(DOTModule, criterion=FitNet(), optimizer=_dot))


def test_invalid_arguments(distill, data, trainer) -> None:
    with pytest.raises(ValueError, match=r"DOTModule requires the optimizer lkd.DOT, got SGD; set `optimizer`"):
        trainer().fit(distill(DOTModule), data)
    with pytest.raises(ValueError, match="cannot clip gradients by value"):
        trainer(gradient_clip_val=1.0, gradient_clip_algorithm="value").fit(distill(DOTModule, optimizer=_dot), data)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got momentum 0.95 and delta 0.075"):
        DOT([_weight()], momentum=0.95)
    for lr in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"lr must be a finite number of at least 0, got {lr}"):
            DOT([_weight()], lr=lr)


def test_command_line() -> None:
    configs = ["--config", "data/digits", "--config", "pairs/digits", "--config", "methods/dot"]
    short = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
    short += ["--trainer.enable_progress_bar=false"]
    assert main(["fit", *configs, *short, "--trainer.max_epochs=1"]) == 0
    (last,) = Path("runs").rglob("last.ckpt")
    states = torch.load(last, weights_only=True)["optimizer_states"][0]["state"]
    assert all(set(state) == {"momentum", "distill_momentum"} for state in states.values())
    assert main(["fit", "--ckpt_path", str(last), *short, "--trainer.max_epochs=2"]) == 0
