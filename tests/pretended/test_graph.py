"""Captured steps equal ordinary ones bit by bit; steps that cannot be captured run without a graph, with a reason."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LambdaCallback
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from lkd import Batch, ClassificationModule, DistillModule, Outputs, SyntheticDataModule
from lkd.callbacks import Schedule, Speed
from lkd.callbacks.eval_graph import EvalGraph
from lkd.callbacks.step_graph import StepGraph
from lkd.datamodules.transforms.base import RandomCrop, RandomHorizontalFlip
from lkd.datamodules.transforms.color import ColorJitter
from lkd.datamodules.transforms.erasing import Cutout, RandomErasing
from lkd.datamodules.transforms.mixing import CutMix, Mixup
from lkd.datamodules.transforms.views import ClassPartner, RotatedViews
from lkd.losses import FBKD, FGD, LD, MGD, PKD, CrossKD, DistillLoss
from lkd.models import CIFARResNet
from lkd.schedules import CosineDecay
from lkd.types import IGNORE_INDEX
from tests.pretended.device import NAME
from tests.pretended.runs import differences

DATA: dict[str, Any] = {
    "num_classes": 4,
    "input_shape": (3, 8, 8),
    "train_size": 56,
    "test_size": 8,
    "val_size": 16,
    "batch_size": 8,
}


@pytest.fixture
def train(trainer, distill, pretended, monkeypatch) -> Callable[..., tuple[dict[str, Any], list[StepGraph]]]:
    """Return a function that trains on a device and returns the final state and the graphs of the step."""
    created: list[StepGraph] = []
    init = StepGraph.__init__

    def recorded(self: StepGraph, *args: Any) -> None:
        init(self, *args)
        created.append(self)

    monkeypatch.setattr(StepGraph, "__init__", recorded)

    def run(
        accelerator: str,
        module: Callable[[], L.LightningModule] = distill,
        data: dict[str, Any] | None = None,
        callbacks: Callable[[], list[Callback]] = list,
        speed: Speed | None = None,
        **settings: Any,
    ) -> tuple[dict[str, Any], list[StepGraph]]:
        created.clear()
        L.seed_everything(0, verbose=False)
        engine = trainer(
            accelerator=accelerator,
            callbacks=[speed or Speed(channels_last=False), *callbacks()],
            **{"max_epochs": 3, **settings},
        )
        trained = module()
        engine.fit(trained, SyntheticDataModule(**{**DATA, **(data or {})}))
        state = {
            "weights": {name: value.cpu() for name, value in trained.state_dict().items()},
            "measured": {name: value.cpu() for name, value in engine.callback_metrics.items()},
            "optimizer": engine.optimizers[0].state_dict(),
        }
        state["optimizer"]["state"] = {
            number: {name: value.cpu() if isinstance(value, Tensor) else value for name, value in held.items()}
            for number, held in state["optimizer"]["state"].items()
        }
        return state, list(created)

    return run


@pytest.fixture
def agree(train) -> Callable[..., StepGraph]:
    """Return a function that trains on the CPU and with a graph, compares the states and returns the graph."""

    def check(**settings: Any) -> StepGraph:
        expected, _ = train("cpu", **settings)
        replayed, (graph,) = train(NAME, **settings)
        assert not graph.obstacle
        assert graph.captures
        assert not differences(expected, replayed)
        return graph

    return check


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "dampened": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "not fused": lambda p: SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda p: Adam(p, lr=1e-2),
    "amsgrad": lambda p: Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, agree, distill) -> None:
    agree(module=lambda: distill(optimizer=OPTIMIZERS[name]))


@pytest.mark.parametrize("name", ["Adadelta", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"])
def test_optimizers_that_count_steps_on_the_device(name: str, train, distill) -> None:
    def module() -> DistillModule:
        return distill(optimizer=lambda p: getattr(torch.optim, name)(p, lr=1e-3, foreach=True))

    off, _ = train(NAME, module=module, speed=Speed(channels_last=False, graph="off"))
    found, (graph,) = train(NAME, module=module)
    assert not graph.obstacle
    assert not differences(off, found)


def _scheduled(distill: Any, scheduler: Any, **optimizer: Any) -> Callable[[], DistillModule]:
    return lambda: distill(
        optimizer=lambda p: SGD(p, **{"lr": 0.1, "momentum": 0.9, **optimizer}), lr_scheduler=scheduler
    )


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: StepLR(o, step_size=1, gamma=0.3),
        lambda o: CosineAnnealingLR(o, T_max=3),
        lambda o: LambdaLR(o, lambda epoch: 0.9**epoch),
        lambda o: CosineDecay(o, warmup=0.4),
    ],
)
def test_learning_rate_of_fused_optimizers_is_a_tensor(scheduler, agree, distill) -> None:
    assert agree(module=_scheduled(distill, scheduler)).captures == 1


def test_learning_rate_of_other_optimizers_is_captured_again(agree, distill) -> None:
    module = _scheduled(distill, lambda o: StepLR(o, step_size=1, gamma=0.3), foreach=True)
    assert agree(module=module).captures == 3


@pytest.mark.parametrize(
    "scheduler",
    [lambda o: OneCycleLR(o, 0.2, total_steps=15, cycle_momentum=False), lambda o: CosineDecay(o, warmup=0.2)],
)
def test_learning_rate_that_changes_in_every_step(scheduler, agree, distill) -> None:
    assert agree(module=lambda: distill(lr_scheduler=scheduler, lr_scheduler_interval="step")).captures == 1


@pytest.mark.parametrize("shape", ["linear", "step"])
def test_scheduled_weights_are_captured_again(shape: str, agree) -> None:
    assert agree(callbacks=lambda: [Schedule("distill_weight", epochs=2, shape=shape)]).captures > 1


def test_several_parameter_groups(agree, distill) -> None:
    class Groups(DistillModule):
        def configure_optimizers(self) -> Any:
            *first, last = self.model.parameters()
            optimizer = SGD([{"params": first, "lr": 0.01}, {"params": [last]}], lr=0.1, momentum=0.9)
            schedule = CosineDecay(optimizer, warmup=0.3)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    assert agree(module=lambda: distill(Groups)).captures == 1


class Boxed(FGD):
    """FGD with one box per image, which depends on the index of the image."""

    def boxes(self, batch: Batch) -> tuple[list[Tensor], tuple[int, int]]:
        corner = batch.index.remainder(5).float()
        return list(torch.stack([corner, corner / 2, corner + 2, corner + 3], 1)[:, None]), (8, 8)


LAYERS = (["layer1", "layer2"], ["layer1", "layer2"])
DETECTION: dict[str, Callable[[], DistillLoss]] = {
    "CrossKD": lambda: CrossKD(["layer1"], ["layer1"], "layer2", teacher_box_head="layer2"),
    "FBKD": lambda: FBKD(*LAYERS),
    "FGD": lambda: FGD(*LAYERS),
    "FGD-boxes": lambda: Boxed(*LAYERS),
    "LD": lambda: LD(["layer2"], ["layer2"], ["layer1"]),
    "MGD": lambda: MGD(*LAYERS, mask_ratio=0.65, mask="pixels"),
    "PKD": lambda: PKD(*LAYERS),
}


@pytest.mark.parametrize("name", DETECTION)
def test_criteria_of_detectors(name: str, agree) -> None:
    """These criteria have no overlay, so tests/pretended/test_methods.py does not train with them."""

    def module() -> DistillModule:
        student, teacher = (CIFARResNet(8, (4, 4, 8, 4), 4) for _ in range(2))  # layer2: distributions of two values
        return DistillModule(student, teacher, DETECTION[name](), distill_weight=0.01)

    assert agree(module=module).captures == 1


def test_gradient_clipping(agree) -> None:
    agree(gradient_clip_val=0.1)
    agree(gradient_clip_val=0.01, gradient_clip_algorithm="value")


def test_dropout_draws_the_masks_of_ordinary_steps(agree, tiny) -> None:
    def module() -> DistillModule:
        student = tiny(seed=1)
        student.fc = nn.Sequential(nn.Dropout(0.5), student.fc)
        return DistillModule(student, tiny(seed=2), optimizer=lambda p: SGD(p, lr=0.1, momentum=0.9))

    agree(module=module)


def test_averaged_weights(agree) -> None:
    agree(callbacks=lambda: [EMAWeightAveraging(decay=0.5, update_every_n_steps=1)])


class FreezesInSecondEpoch(Callback):
    """Freezes a layer and sets it to eval mode in the second epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        frozen = trainer.current_epoch == 1
        pl_module.student.bn1.train(not frozen).requires_grad_(not frozen)


def test_layers_frozen_for_one_epoch(agree) -> None:
    assert agree(callbacks=lambda: [FreezesInSecondEpoch()]).captures == 3


def test_training_with_labels_only(agree, tiny) -> None:
    agree(module=lambda: ClassificationModule(tiny(), optimizer=lambda p: SGD(p, lr=0.1, momentum=0.9)))


@pytest.mark.parametrize(
    "data",
    [
        {"augment": [RandomCrop(1), RandomHorizontalFlip(), Cutout(2, fill=(1, 2, 3)), RandomErasing()]},
        {"augment": [ColorJitter(0.4, 0.4, 0.4, 0.1)]},
        {"augment": [RandomHorizontalFlip()], "mix": Mixup(0.5, p=0.5)},
        {"mix": CutMix()},
        {"views": RotatedViews()},
        {"views": ClassPartner()},
        {"label_size": 0.5},
        {"batch_size": 100},  # a single batch that is not full
    ],
    ids=str,
)
def test_batches(data: dict[str, Any], agree, recwarn) -> None:
    agree(data=data)
    assert not [warning for warning in recwarn if "graph" in str(warning.message)]


def test_training_without_graphs_equals_that_on_the_cpu(train) -> None:
    expected, _ = train("cpu")
    off, graphs = train(NAME, speed=Speed(channels_last=False, graph="off"))
    assert not graphs
    assert not differences(expected, off)


class OrdinaryLoader(L.LightningDataModule):
    """Batches of an ordinary loader; the last one is smaller, so its step runs without the graph."""

    def train_dataloader(self) -> DataLoader[Any]:
        image = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(image, torch.arange(20) % 4), batch_size=8)


def test_batches_of_several_sizes_from_an_ordinary_loader(trainer, distill, pretended) -> None:
    found = []
    for place in ("cpu", NAME):
        L.seed_everything(0, verbose=False)
        module = distill()
        trainer(accelerator=place, callbacks=[Speed(channels_last=False)], max_epochs=3).fit(module, OrdinaryLoader())
        found.append({name: value.cpu() for name, value in module.state_dict().items()})
    assert not differences(*found)


class Counts(DistillLoss):
    """A criterion that reads a Python counter."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, student: Any, teacher: Any, batch: Any) -> Tensor:
        self.calls += 1
        loss: Tensor = student.logits.square().mean() / self.calls
        return loss


class CountsElsewhere(Counts):
    """A criterion that reads a counter hidden in an iterator."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)

    def forward(self, student: Any, teacher: Any, batch: Any) -> Tensor:
        loss: Tensor = student.logits.square().mean() / next(self.numbers)
        return loss


class Waits(DistillLoss):
    """A criterion that waits for the device."""

    def forward(self, student: Any, teacher: Any, batch: Any) -> Tensor:
        loss: Tensor = student.logits.square().mean()
        return loss * (2.0 if loss.item() > 1 else 1.0)


class Remembers(DistillLoss):
    """A criterion that keeps a tensor of the previous step outside its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, student: Any, teacher: Any, batch: Any) -> Tensor:
        mean = student.logits.mean()
        loss = mean.square() if self.last is None else (mean - self.last).square()
        self.last = mean.detach()
        return loss


@pytest.mark.parametrize(
    ("criterion", "reason"),
    [
        (Counts, "the step changes 'calls'"),
        (CountsElsewhere, "two ordinary steps from the same state differ in"),
        (Waits, "_local_scalar_dense: operation not permitted while a graph is captured"),
        (Remembers, "two ordinary steps from the same state differ in"),
    ],
)
def test_criteria_that_cannot_be_captured_are_detected(criterion, reason: str, train, distill) -> None:
    def module() -> DistillModule:
        return distill(criterion=criterion())

    off, _ = train(NAME, module=module, speed=Speed(channels_last=False, graph="off"), max_epochs=2)
    with pytest.warns(UserWarning, match=f"the training step runs without a graph: .*{reason}"):
        found, (graph,) = train(NAME, module=module, max_epochs=2)
    assert graph.obstacle
    assert found["weights"].keys() == off["weights"].keys()
    if criterion is Waits:  # the checks call the others additional times
        assert not differences(off, found)


class ByEpoch(DistillModule):
    """A module whose loss depends on the epoch number."""

    def distill_loss(self, student: Any, teacher: Any, batch: Any) -> Any:
        return super().distill_loss(student, teacher, batch) * (1 + self.current_epoch)


class ByStep(DistillModule):
    """A module whose loss depends on the step number."""

    def distill_loss(self, student: Any, teacher: Any, batch: Any) -> Any:
        return super().distill_loss(student, teacher, batch) * min(1.0, self.global_step / 10)


def test_loss_that_reads_the_epoch_is_captured_again(agree, distill) -> None:
    assert agree(module=lambda: distill(ByEpoch)).captures == 3


def test_loss_that_reads_the_step_runs_without_a_graph(train, distill) -> None:
    expected, _ = train("cpu", module=lambda: distill(ByStep))
    with pytest.warns(UserWarning, match="its result depends on the step number"):
        found, (graph,) = train(NAME, module=lambda: distill(ByStep))
    assert graph.captures == 1
    assert not differences(expected, found)  # detected before the graph takes a step with another number


class AddsGroup(Callback):
    """Trains the classifier from the second epoch on, in its own parameter group."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            head = pl_module.student.fc.requires_grad_(True)
            group = {name: value for name, value in trainer.optimizers[0].param_groups[0].items() if name != "params"}
            trainer.optimizers[0].add_param_group({**group, "params": list(head.parameters()), "lr": 0.01})


def test_parameter_group_added_later(agree, distill) -> None:
    def module() -> DistillModule:
        created = distill()
        created.student.fc.requires_grad_(False)
        return created

    assert agree(module=module, callbacks=lambda: [AddsGroup()]).captures == 2


class Logs(DistillModule):
    """A module whose loss calls `self.log`."""

    def distill_loss(self, student: Any, teacher: Any, batch: Any) -> Any:
        self.log("train/mine", student.logits.mean())
        return super().distill_loss(student, teacher, batch)


class DrawsOnHost(DistillModule):
    """A module whose loss draws a random number on the host."""

    def distill_loss(self, student: Any, teacher: Any, batch: Any) -> Any:
        return super().distill_loss(student, teacher, batch) * (1 + random.random())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Logs, "the step calls self.log"), (DrawsOnHost, "the step draws random numbers on the host")],
)
def test_side_effects_that_replays_would_omit(kind: type[DistillModule], reason: str, train, distill) -> None:
    with pytest.warns(UserWarning, match=reason):
        train(NAME, module=lambda: distill(kind))


class NumpyWeight(Callback):
    """Sets a loss weight to a NumPy scalar."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.distill_weight = np.float64(0.5 + trainer.current_epoch)


def test_numpy_scalars(agree) -> None:
    assert agree(callbacks=lambda: [NumpyWeight()]).captures == 3


class ChangesFlips(Callback):
    """Changes the flip probability between epochs."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        data = trainer.datamodule.datasets["train"]
        object.__setattr__(data.augment[0], "p", 0.2 + 0.3 * trainer.current_epoch)


def test_augmentation_that_changes_between_epochs(agree) -> None:
    def data() -> dict[str, Any]:
        return {"augment": [RandomHorizontalFlip()]}

    graph = agree(data=data(), callbacks=lambda: [ChangesFlips()])
    assert graph.captures == 1


class Accumulates(Callback):
    """Accumulates gradients from the second epoch on, as `GradientAccumulationScheduler` does."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        trainer.accumulate_grad_batches = 2 if trainer.current_epoch else 1


def test_accumulation_from_the_second_epoch(agree) -> None:
    agree(callbacks=lambda: [Accumulates()])


def test_hooks_of_a_callback_instance(train, capfd) -> None:
    train(NAME, callbacks=lambda: [LambdaCallback(on_after_backward=lambda *_: None)])
    assert "no CUDA graph (LambdaCallback uses on_after_backward)" in capfd.readouterr().out


class EmptyReplays:
    """A capture whose replays do nothing instead of what was recorded."""

    scalar = torch.float64

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def capture(self, function: Callable[[], Any]) -> Any:
        return function(), lambda: None


def test_graph_with_wrong_replays_is_not_used(train, monkeypatch) -> None:
    off, _ = train(NAME, speed=Speed(channels_last=False, graph="off"))
    monkeypatch.setattr("lkd.devices.step_capture", lambda device: EmptyReplays())
    with pytest.warns(UserWarning, match="a replay of the graph differs from an ordinary step in"):
        found, _ = train(NAME)
    assert not differences(off, found)


class Looks(Callback):
    """Reads gradients within the step."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert next(pl_module.parameters()).grad is not None


class OwnStep(DistillModule):
    """A module that overrides `training_step`."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"accumulate_grad_batches": 2}, "gradients are accumulated"),
        ({"callbacks": lambda: [Looks()]}, "Looks uses on_after_backward"),
        ({"detect_anomaly": True}, "detect_anomaly checks each operation"),
        ({"speed": Speed(graph="off")}, "off"),
        ({"speed": Speed(compile="off", graph="off")}, "off"),
    ],
)
def test_reason_for_no_graph_is_reported(settings: dict[str, Any], reason: str, train, capfd) -> None:
    _, graphs = train(NAME, **settings)
    assert not graphs
    assert f"no CUDA graph ({reason})" in capfd.readouterr().out


def test_own_training_step(train, distill, capfd) -> None:
    train(NAME, module=lambda: distill(OwnStep))
    assert "no CUDA graph (OwnStep overrides training_step)" in capfd.readouterr().out


def test_python_values_that_change_in_every_step(train, distill) -> None:
    class ChangesWeight(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.distill_weight = 1 / (1 + trainer.global_step)

    expected, _ = train("cpu", callbacks=lambda: [ChangesWeight()])
    with pytest.warns(UserWarning, match="Python values that the step reads change in every step"):
        found, (graph,) = train(NAME, callbacks=lambda: [ChangesWeight()])
    assert graph.obstacle
    assert not differences(expected, found)


def test_optimizer_that_counts_steps_on_the_host(train, distill) -> None:
    def module() -> DistillModule:
        return distill(optimizer=lambda p: torch.optim.Adagrad(p, lr=1e-2))

    expected, _ = train("cpu", module=module)
    with pytest.warns(UserWarning, match="Adagrad or the module has state on a different device"):
        found, _ = train(NAME, module=module)
    assert not differences(expected["weights"], found["weights"])


def test_fit_removes_graphs_from_the_module(train, distill) -> None:
    module = distill()
    train(NAME, module=lambda: module)
    assert module.step_graph is None
    assert module.eval_graph is None


class DrawsMasks(DistillLoss):
    """A criterion that draws random masks, skips unlabelled images and has two terms."""

    skips_unlabelled = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        mask = torch.rand(student.logits.shape, device=student.logits.device)
        apart = mask * (student.logits - teacher.logits).square()
        labelled = (batch.target != IGNORE_INDEX).unsqueeze(1)
        return {"near": (apart * labelled).sum() / labelled.sum().clamp(min=1), "far": student.logits.mean()}


@pytest.mark.parametrize("weight", [1.0, 0.0], ids=["always", "later"])
def test_criterion_is_evaluated_with_a_graph(weight: float, agree, distill, monkeypatch, recwarn) -> None:
    """Validation uses graphs, too. If the weight starts at 0, terms appear later, and the graphs are captured again."""
    replayed: list[bool] = []
    update = EvalGraph.update

    def recorded(self: EvalGraph, *args: Any) -> bool:
        replayed.append(update(self, *args))
        return replayed[-1]

    monkeypatch.setattr(EvalGraph, "update", recorded)
    schedule = [Schedule("distill_weight", epochs=2, start=weight, shape="step")]
    agree(
        module=lambda: distill(criterion=DrawsMasks()),
        callbacks=lambda: schedule,
        data={"val_size": 28, "train_size": 64},
        max_epochs=4,
    )
    assert not [warning for warning in recwarn if "without CUDA graphs" in str(warning.message)]
    assert all(replayed)
    assert len(replayed) >= 8
