"""Schedules that depend on the length of the run equal PyTorch's; unsuitable schedules are rejected or reported."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as pytorch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from lkd import ClassificationModule, DistillModule
from lkd.callbacks import LastCheckpoint
from lkd.cli.config_files import configs_folder
from lkd.schedules import CosineDecay, StepDecay
from lkd.schedules.relative import RunSchedule
from lkd.schedules.run import fit_schedules, run_length

CONFIGS = configs_folder()


def optimizer(*rates: Any) -> Optimizer:
    """Return an optimizer with one parameter group for each learning rate."""
    return SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": deepcopy(rate)} for rate in rates or (0.1,)])


def rates(schedule: LRScheduler, steps: int) -> list[list[float]]:
    """Return the learning rates of all groups before each of the steps, and after the last one."""
    found = []
    for _ in range(steps + 1):
        found.append([float(group["lr"]) for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return found


def same(ours: LRScheduler, theirs: LRScheduler, steps: int) -> bool:
    """Return whether two schedules give the same learning rates, up to rounding."""
    pairs = zip(rates(ours, steps), rates(theirs, steps), strict=True)
    return all(own == pytest.approx(wanted, rel=1e-12, abs=1e-15) for own, wanted in pairs)


@pytest.mark.parametrize("total", [1, 2, 7, 30, 240])
@pytest.mark.parametrize("given", [(0.1,), (0.1, 3e-4), (torch.tensor(0.1, dtype=torch.float64),)], ids=str)
def test_cosine_decay_equals_pytorch(total: int, given: tuple[Any, ...]) -> None:
    assert same(CosineDecay(optimizer(*given), total=total), CosineAnnealingLR(optimizer(*given), total), total)


def test_cosine_decay_to_a_fraction_equals_pytorch() -> None:
    ours, theirs = CosineDecay(optimizer(0.2), final=0.1, total=20), CosineAnnealingLR(optimizer(0.2), 20, 0.02)
    assert same(ours, theirs, 20)


@pytest.mark.parametrize(("total", "warmup"), [(20, 0.25), (100, 0.05), (3, 0.9), (1, 0.9), (10, 0.01)])
def test_warm_up_equals_pytorch(total: int, warmup: float) -> None:
    ours, other = CosineDecay(optimizer(0.2, 0.1), warmup, total=total), optimizer(0.2, 0.1)
    steps = min(round(warmup * total), total - 1)
    theirs: LRScheduler = CosineAnnealingLR(other, total)
    if steps:
        other = optimizer(0.2, 0.1)
        parts = [LinearLR(other, 1 / (steps + 1), total_iters=steps), CosineAnnealingLR(other, total - steps)]
        theirs = SequentialLR(other, parts, [steps])
    assert same(ours, theirs, total)


@pytest.mark.parametrize(("total", "shares", "milestones"), [
    (240, [0.625, 0.75, 0.875], [150, 180, 210]),
    (100, [0.07, 0.3, 0.6, 0.9], [7, 30, 60, 90]),
    (7, [0.5, 0.75], [4, 6]),
    (2, [0.625, 0.75], []),  # after the start of the last epoch
    (1, [0.5], []),
])  # fmt: skip
def test_step_decay_equals_pytorch_exactly(total: int, shares: list[float], milestones: list[int]) -> None:
    ours = rates(StepDecay(optimizer(0.1, 0.3), shares, total=total), total - 1)
    assert ours == rates(MultiStepLR(optimizer(0.1, 0.3), milestones), total - 1)


OLD = {  # former milestones of MultiStepLR; other configs used CosineAnnealingLR over the whole run
    "cifar10/data_free_resnet56_resnet20": [160, 240],
    "cifar10/kd_resnet56_resnet20": [91, 136],
    "cifar10/student_resnet20": [91, 136],
    "cifar10/teacher_resnet56": [91, 136],
    "trainer/cifar240": [150, 180, 210],
    "trainer/imagenet100": [30, 60, 90],
}
WITH_SCHEDULE = sorted(
    path.relative_to(CONFIGS).with_suffix("").as_posix()
    for path in CONFIGS.rglob("*.yaml")
    if "lr_scheduler:" in path.read_text()
)


@pytest.mark.parametrize("name", WITH_SCHEDULE)
def test_included_configs_keep_their_learning_rates_and_scale(name: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    settings, epochs = config["model"]["init_args"], config.get("trainer", {}).get("max_epochs")
    given = settings["lr_scheduler"]
    kind = {"lkd.schedules.CosineDecay": CosineDecay, "lkd.schedules.StepDecay": StepDecay}[given["class_path"]]
    if "lr_scheduler_interval" in settings:
        assert (kind, settings["lr_scheduler_interval"], given["init_args"]) == (CosineDecay, "step", {"warmup": 0.05})
        assert name.partition("/")[0] in ("camvid", "shapes", "trainer")
        return
    rate = settings["optimizer"]["init_args"]["lr"]

    def whole(number: int) -> list[list[float]]:
        schedule = kind(optimizer(rate), **given.get("init_args", {}))
        schedule.set_length(number, "epoch")
        return rates(schedule, number - 1)

    had = CosineAnnealingLR(optimizer(rate), epochs) if name not in OLD else MultiStepLR(optimizer(rate), OLD[name])
    found, wanted = whole(epochs), rates(had, epochs - 1)
    assert len(found) == epochs >= 10
    assert found == wanted if name in OLD else found == [pytest.approx(one, rel=1e-12) for one in wanted]
    longer = whole(2 * epochs)
    differing = [one for one, other in zip(longer[::2], found, strict=True) if one != pytest.approx(other, rel=1e-12)]
    assert len(differing) <= (1 if "resnet" in name else 0)  # 0.747 of 364 epochs is 272, of 182 it is 136
    assert longer[-1][0] < 0.02 * rate


class Rates(L.Callback):
    """Records the learning rates of each step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append([float(group["lr"]) for group in trainer.optimizers[0].param_groups])


@pytest.fixture
def fit(tiny, data, trainer) -> Callable[..., list[list[float]]]:
    """Return a function that trains with a schedule and returns the learning rates of all batches (three per epoch)."""

    def run(make: Any, interval: str = "epoch", ckpt_path: Any = None, **settings: Any) -> list[list[float]]:
        seen, callbacks = Rates(), settings.pop("callbacks", [])
        kind = settings.pop("kind", ClassificationModule)
        module = kind(tiny(), lambda p: SGD(p, lr=0.1), make, lr_scheduler_interval=interval)
        settings = {"num_sanity_val_steps": 0, "limit_val_batches": 0, **settings}
        engine = trainer(callbacks=[seen, *callbacks], **settings)
        engine.fit(module, data, ckpt_path=ckpt_path)
        return seen.seen

    return run


def _cosine(steps: int, total: int) -> list[float]:
    return [0.1 * (1 + math.cos(math.pi * step / total)) / 2 for step in range(steps)]


@pytest.mark.parametrize(
    ("interval", "settings", "wanted"),
    [
        ("epoch", {"max_epochs": 4}, [rate for rate in _cosine(4, 4) for _ in range(3)]),
        ("step", {"max_epochs": 2}, _cosine(6, 6)),
        ("step", {"max_epochs": 2, "max_steps": 5}, _cosine(5, 5)),
        ("step", {"max_epochs": -1, "max_steps": 7}, _cosine(7, 7)),
        ("epoch", {"max_epochs": -1, "max_steps": 7}, [rate for rate in _cosine(3, 3) for _ in range(3)][:7]),
        ("epoch", {"max_epochs": 50, "max_steps": 6}, [rate for rate in _cosine(2, 2) for _ in range(3)]),
        ("step", {"max_epochs": 2, "accumulate_grad_batches": 2}, [_cosine(4, 4)[i] for i in (0, 0, 1, 2, 2, 3)]),
        ("step", {"max_epochs": 2, "limit_train_batches": 2}, _cosine(4, 4)),
        ("step", {"fast_dev_run": 2, "max_epochs": 9}, _cosine(2, 2)),
    ],
    ids=str,
)
def test_length_is_that_of_the_run(fit, interval: str, settings: dict[str, Any], wanted: list[float]) -> None:
    assert [rate for (rate,) in fit(CosineDecay, interval, **settings)] == pytest.approx(wanted, rel=1e-12)


def test_varying_accumulation(fit) -> None:
    accumulate = GradientAccumulationScheduler({0: 1, 1: 3})
    found = fit(CosineDecay, "step", max_epochs=3, callbacks=[accumulate])
    assert [rate for (rate,) in found] == pytest.approx([_cosine(5, 5)[i] for i in (0, 1, 2, 3, 3, 3, 4, 4, 4)])


@pytest.mark.parametrize("numbers", [{0: 3}, {0: 1, 1: 3}, {0: 3, 2: 1}], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 5, 6])
def test_epochs_of_a_maximum_number_of_steps_with_varying_accumulation(fit, numbers, steps: int) -> None:
    accumulate = GradientAccumulationScheduler(numbers)
    found = fit(CosineDecay, "epoch", max_epochs=-1, max_steps=steps, callbacks=[accumulate])
    used = list(dict.fromkeys(rate for (rate,) in found))
    assert used == pytest.approx(_cosine(len(used), len(used)))


class Groups(ClassificationModule):
    """A module that creates its optimizer with two groups, and its schedule, itself."""

    def configure_optimizers(self) -> Any:
        *first, last = self.model.parameters()
        made = SGD([{"params": first, "lr": 0.01}, {"params": [last]}], lr=0.1)
        schedule = CosineDecay(made, warmup=0.5)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_own_optimizer_with_several_groups(fit) -> None:
    found = fit(None, kind=Groups, max_epochs=2)
    assert found == rates(CosineDecay(optimizer(0.01, 0.1), warmup=0.5, total=6), 5)


def test_explicit_length_is_kept(fit, recwarn) -> None:
    found = fit(lambda made: CosineDecay(made, total=4), max_epochs=2)
    assert [rate for (rate,) in found[::3]] == pytest.approx(_cosine(2, 4))
    assert "CosineDecay has total 4, but this run steps it 2 times, once per epoch" in _warned(recwarn)


def test_resume_with_a_longer_run(fit, tmp_path, recwarn) -> None:
    save = [LastCheckpoint()]
    keep = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    fit(CosineDecay, max_epochs=2, callbacks=save, **keep)
    assert not _warned(recwarn)
    path = tmp_path / "checkpoints/last.ckpt"
    found = fit(CosineDecay, max_epochs=5, ckpt_path=path, **keep)
    assert [rate for (rate,) in found[::3]] == pytest.approx(_cosine(5, 5)[2:], rel=1e-12)
    assert _warned(recwarn) == (
        "the length of the run was changed from 2 epochs to 5; after 2 epochs, CosineDecay follows the schedule of the "
        "new length, with a learning rate of 0.0655 instead of 0"
    )


def test_state_is_plain_and_complete() -> None:
    first = CosineDecay(optimizer(0.1, 0.2), warmup=0.2, total=10)
    head = rates(first, 4)
    file = io.BytesIO()
    torch.save([first.state_dict(), first.optimizer.state_dict()], file)
    state, state_of_optimizer = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    second = CosineDecay(optimizer(9.0, 9.0))
    second.load_state_dict(state)
    second.optimizer.load_state_dict(state_of_optimizer)
    second.set_length(10, "step")
    assert second.get_last_lr() == [group["lr"] for group in second.optimizer.param_groups]
    assert [*head, *rates(second, 5)] == rates(CosineDecay(optimizer(0.1, 0.2), warmup=0.2, total=10), 10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda made: CosineDecay(made, warmup=1.0), r"warmup is a fraction .* and must be in \[0, 1\), got 1"),
        (lambda made: CosineDecay(made, final=2.0), r"final is a fraction .* and must be in \[0, 1\], got 2"),
        (lambda made: CosineDecay(made, total=0), "total must be at least 1, got 0"),
        (lambda made: StepDecay(made, [91, 136]), r"ascending fractions of the run between 0 and 1, got \[91, 136\]"),
        (lambda made: StepDecay(made, [0.5, 0.2]), "milestones must be ascending fractions"),
        (lambda made: StepDecay(made, [0.5], gamma=0.0), "gamma must be greater than 0, got 0"),
    ],
)
def test_arguments_are_checked(make: Callable[[Optimizer], RunSchedule], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(optimizer())


def test_length_is_required_without_a_run() -> None:
    schedule = CosineDecay(optimizer(0.1))
    assert schedule.get_last_lr() == [0.1]
    schedule.optimizer.step()
    with pytest.raises(RuntimeError, match=r"CosineDecay requires the length of the run, .*pass total"):
        schedule.step()


@pytest.mark.parametrize(("interval", "setting"), [("epoch", "max_epochs"), ("step", "max_steps")])
def test_unlimited_run_is_rejected(fit, interval: str, setting: str) -> None:
    with pytest.raises(ValueError, match=rf"number of {interval}s is unknown .*-1.*-1, 3 batches .*{setting}"):
        fit(CosineDecay, interval, max_epochs=-1, max_steps=-1, max_time="00:00:00:01")


def test_nested_schedule_requires_a_length(recwarn) -> None:
    def parts(**settings: Any) -> LRScheduler:
        made = optimizer()
        return SequentialLR(made, [LinearLR(made, total_iters=5), CosineDecay(made, **settings)], [5])

    with pytest.raises(ValueError, match="CosineDecay cannot follow the length of the run inside another"):
        fit_schedules(_run(parts(), "epoch"))
    fit_schedules(_run(parts(total=25), "epoch"))
    assert not _warned(recwarn)


def test_valid_intervals(fit) -> None:
    with pytest.raises(ValueError, match="lr_scheduler_interval must be 'epoch' or 'step', got 'batch'"):
        fit(CosineDecay, "batch")
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau reads val/loss after each epoch; set lr_.* to epoch"):
        fit(pytorch.ReduceLROnPlateau, "step")


def _warned(recwarn: pytest.WarningsRecorder) -> str:
    texts = [str(warning.message) for warning in recwarn]
    return " ".join(text for text in texts if "this run steps it" in text or "the length of the run was" in text)


def _run(schedule: Any, interval: str, epochs: int = 30, batches: int = 100) -> Any:
    config = LRSchedulerConfig(schedule, interval=interval)
    sizes = {"max_epochs": epochs, "max_steps": -1, "num_training_batches": batches, "accumulate_grad_batches": 1}
    return SimpleNamespace(**sizes, callbacks=[], lr_scheduler_configs=[config], fast_dev_run=False)


def _warmed(made: Optimizer, warmup: int, total: int) -> LRScheduler:
    parts = [LinearLR(made, 0.1, total_iters=warmup), CosineAnnealingLR(made, total - warmup)]
    return SequentialLR(made, parts, [warmup])


FITTING = [
    ("epoch", lambda made: CosineAnnealingLR(made, 30)),
    ("epoch", lambda made: CosineAnnealingLR(made, 29)),
    ("step", lambda made: CosineAnnealingLR(made, 3000)),
    ("epoch", lambda made: MultiStepLR(made, [15, 25])),
    ("step", lambda made: MultiStepLR(made, [1500, 2500])),
    ("epoch", lambda made: pytorch.OneCycleLR(made, 0.1, 30)),
    ("step", lambda made: pytorch.OneCycleLR(made, 0.1, epochs=30, steps_per_epoch=100)),
    ("epoch", lambda made: LinearLR(made, total_iters=5)),
    ("step", lambda made: LinearLR(made, total_iters=500)),
    ("epoch", lambda made: pytorch.CosineAnnealingWarmRestarts(made, 10)),
    ("step", lambda made: pytorch.CyclicLR(made, 0.01, 0.1, 200)),
    ("epoch", lambda made: pytorch.StepLR(made, 10)),
    ("epoch", lambda made: pytorch.ExponentialLR(made, 0.9)),
    ("epoch", lambda made: pytorch.LambdaLR(made, lambda epoch: 0.5**epoch)),
    ("epoch", lambda made: _warmed(made, 5, 30)),
    ("step", lambda made: _warmed(made, 150, 3000)),
    ("epoch", lambda made: CosineDecay(made)),
    ("step", lambda made: StepDecay(made, [0.5])),
]


@pytest.mark.parametrize(("interval", "make"), FITTING)
def test_suitable_schedules(interval: str, make: Callable[[Optimizer], Any], recwarn) -> None:
    fit_schedules(_run(make(optimizer()), interval))
    assert not _warned(recwarn)


@pytest.mark.parametrize(
    ("interval", "make", "words"),
    [
        (
            "epoch",
            lambda made: pytorch.OneCycleLR(made, 0.1, 3000),
            "OneCycleLR has total_steps 3,000, but this run steps it 30 times, once per epoch; set "
            "lr_scheduler_interval to step, which steps it 3,000 times",
        ),
        (
            "step",
            lambda made: pytorch.OneCycleLR(made, 0.1, 30),
            "OneCycleLR has total_steps 30, but this run steps it 3,000 times, once per step; set "
            "lr_scheduler_interval to epoch, which steps it 30 times",
        ),
        (
            "epoch",
            lambda made: pytorch.OneCycleLR(made, 0.1, 20),
            "OneCycleLR has total_steps 20, but this run steps it 30 times, once per epoch: PyTorch then stops the "
            "run with an error; use lkd.schedules.CosineDecay or StepDecay, which follow the length of the run",
        ),
        ("epoch", lambda made: CosineAnnealingLR(made, 3000), "to step, which steps it 3,000 times"),
        ("step", lambda made: CosineAnnealingLR(made, 30), "to epoch, which steps it 30 times"),
        ("epoch", lambda made: LinearLR(made, 1, 0, 3000), "LinearLR has total_iters 3,000, but this run steps it 30"),
        ("epoch", lambda made: pytorch.PolynomialLR(made, 3000), "PolynomialLR has total_iters 3,000"),
        (
            "epoch",
            lambda made: _warmed(made, 150, 3000),
            "SequentialLR has a total length (up to T_max of its last part) of 3,000",
        ),
        (
            "step",
            lambda made: MultiStepLR(made, [15, 25]),
            "MultiStepLR has its last milestone at 25, but this run steps it 3,000 times, once per step; set "
            "lr_scheduler_interval to epoch, which steps it 30 times",
        ),
    ],
)
def test_schedules_of_the_other_interval_are_rejected(interval: str, make: Callable[..., Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        fit_schedules(_run(make(optimizer()), interval))


@pytest.mark.parametrize(
    ("interval", "epochs", "make", "words"),
    [
        (
            "epoch",
            60,
            lambda made: CosineAnnealingLR(made, 30),
            "CosineAnnealingLR has T_max 30, but this run steps it 60 times, once per epoch: the learning rate then "
            "increases again; use lkd.schedules.CosineDecay or StepDecay, which follow the length of the run",
        ),
        (
            "epoch",
            3,
            lambda made: CosineAnnealingLR(made, 30),
            "CosineAnnealingLR has T_max 30, but this run steps it 3 times, once per epoch: only the first 10.0% of "
            "the schedule is used; use lkd.schedules.CosineDecay or StepDecay, which follow the length of the run",
        ),
        ("epoch", 60, lambda made: MultiStepLR(made, [91, 136]), "last milestone at 136, but this run steps it 60"),
        ("epoch", 30, lambda made: LinearLR(made, total_iters=500), "; set lr_scheduler_interval to step, which"),
        ("epoch", 30, lambda made: LinearLR(made, 1, 0, 10), "the learning rate then remains 0"),
        ("epoch", 30, lambda made: pytorch.PolynomialLR(made, 10), "the learning rate then remains 0"),
        ("epoch", 30, lambda made: pytorch.OneCycleLR(made, 0.1, 50), "only the first 60.0% of the schedule"),
        ("epoch", 30, lambda made: pytorch.StepLR(made, 40), "StepLR has step_size 40, but this run steps it 30 times"),
        ("step", 30, lambda made: pytorch.StepLR(made, 10), "the learning rate falls to 1e-300 of its initial value"),
        ("step", 30, lambda made: pytorch.ExponentialLR(made, 0.95), "ExponentialLR has a gamma of 0.95, but this run"),
        (
            "epoch",
            60,
            lambda made: _warmed(made, 5, 30),
            "SequentialLR has a total length (up to T_max of its last part) of 30",
        ),
        ("epoch", 30, lambda made: pytorch.CyclicLR(made, 0.01, 0.1), "CyclicLR has a cycle of 4,000"),
    ],
)
def test_unsuitable_schedules_are_reported(interval: str, epochs: int, make: Any, words: str, recwarn) -> None:
    fit_schedules(_run(make(optimizer()), interval, epochs))
    assert words in _warned(recwarn)


@pytest.mark.parametrize("make", [lambda made: pytorch.StepLR(made, 1), lambda made: CosineAnnealingLR(made, 4)])
def test_small_numbers_do_not_imply_the_other_interval(make: Any, recwarn) -> None:
    fit_schedules(_run(make(optimizer()), "epoch", epochs=1, batches=3))
    assert "but this run steps it 1 time, once per epoch" in _warned(recwarn)


def test_schedule_of_the_other_interval_is_rejected(fit) -> None:
    with pytest.raises(ValueError, match="set lr_scheduler_interval to step, which steps it 6 times"):
        fit(lambda made: pytorch.OneCycleLR(made, 0.1, 6), max_epochs=2)
    found = fit(lambda made: pytorch.OneCycleLR(made, 0.1, 6), "step", max_epochs=2)
    assert len({rate for (rate,) in found}) == 6


def test_unknown_number_of_batches() -> None:
    assert run_length(_run(None, "epoch", batches=math.inf)) == (30, math.inf)  # type: ignore[arg-type]


def test_all_modules_accept_the_interval(distill) -> None:
    module = distill(DistillModule, lr_scheduler=CosineDecay, lr_scheduler_interval="step")
    made = module.configure_optimizers()
    assert made["lr_scheduler"]["interval"] == "step"


class EveryOther(ClassificationModule):
    """A module that steps its schedule after every second step of the optimizer."""

    def configure_optimizers(self) -> Any:
        made = SGD(self.model.parameters(), lr=0.1)
        return {
            "optimizer": made,
            "lr_scheduler": {"scheduler": CosineDecay(made), "interval": "step", "frequency": 2},
        }


def test_schedule_that_is_stepped_less_often(fit) -> None:
    found = fit(None, kind=EveryOther, max_epochs=2, limit_train_batches=2)
    assert [rate for (rate,) in found] == pytest.approx([_cosine(2, 2)[i] for i in (0, 0, 1, 1)], rel=1e-12)


def test_last_learning_rate_equals_the_optimizer() -> None:
    schedule = CosineDecay(optimizer(0.1, 0.2), warmup=0.5)
    schedule.set_length(8, "step")
    assert schedule.get_last_lr() == pytest.approx([0.02, 0.04])
    assert schedule.get_last_lr() == [group["lr"] for group in schedule.optimizer.param_groups]
