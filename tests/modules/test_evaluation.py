"""Metrics of distillation in validation, and whether the loss trains the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lkd import (
    Batch,
    DistillLoss,
    DistillModule,
    EarlyExitModule,
    MutualModule,
    Outputs,
    PastTeacherModule,
    SimKDModule,
    SyntheticDataModule,
)
from lkd.callbacks import Schedule
from lkd.losses import AT, BYOT, CRD, KD, MGD, RKD, SSKD, BackboneKD, FitNet, SemCKD, SimKD, TfKD, WeightedSum
from lkd.modules.criterion_meter import CriterionMeter

SIZES = [16, 8]
"""Number of images in each batch of the 24 validation images."""


@pytest.fixture
def data() -> SyntheticDataModule:
    return SyntheticDataModule(
        num_classes=4, input_shape=(3, 8, 8), train_size=64, test_size=24, val_size=sum(SIZES), batch_size=SIZES[0]
    )


def _curves(engine: Any, stage: str = "val") -> dict[str, float]:
    found = {name: float(value) for name, value in engine.callback_metrics.items()}
    return {name.partition("/")[2]: value for name, value in found.items() if name.startswith(f"{stage}/")}


class Labelled(DistillLoss):
    """A mean over the labelled images, in two terms."""

    skips_unlabelled = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        apart = (student.logits - teacher.logits).square().mean(1)[batch.target >= 0]
        return {"one": apart.mean(), "two": 2 * apart.mean()}


@pytest.mark.parametrize(
    "criterion",
    [KD(), BackboneKD(), RKD(), Labelled(), TfKD(), WeightedSum({"soft": KD(), "hint": FitNet()}, {"hint": 3.0})],
    ids=lambda criterion: type(criterion).__name__,
)
def test_criterion_is_evaluated_as_in_training(distill, data, trainer, criterion: DistillLoss) -> None:
    module, engine = distill(criterion=criterion, distill_weight=0.7), trainer(max_epochs=2)
    engine.fit(module, data)
    found = _curves(engine)
    module.eval()
    with torch.no_grad():
        batches = [module.losses(batch)[1] for batch in data.val_dataloader()]
    terms = {name for name in batches[0] if name != "hard"}
    for name in terms:
        wanted = sum(size * float(batch[name]) for size, batch in zip(SIZES, batches, strict=True)) / sum(SIZES)
        assert found[name] == pytest.approx(wanted, rel=1e-5), name
    assert terms <= {name.partition("/")[2] for name in engine.callback_metrics if name.startswith("train/")}
    assert found[module.criterion_curve] == pytest.approx(sum(found[name] for name in terms), rel=1e-5)
    assert set(found) == {*terms, module.criterion_curve, "loss", "acc", "teacher_acc", "agreement"}


class Unmeasured(DistillModule):
    """A module that does not evaluate its criterion."""

    validates_criterion = False


@pytest.mark.parametrize(
    "criterion",
    [CRD, MGD, FitNet, lambda: WeightedSum({"mgd": MGD(), "at": AT()})],
    ids=["CRD", "MGD", "FitNet", "+"],
)
def test_evaluation_does_not_affect_training(distill, data, trainer, criterion: Callable[[], DistillLoss]) -> None:
    """Evaluation of the criterion changes no weights, memories or statistics, and no random numbers of training."""
    states = []
    for kind in (DistillModule, Unmeasured):
        module = distill(kind, criterion=criterion())
        torch.manual_seed(0)
        trainer(num_sanity_val_steps=-1, val_check_interval=2).fit(module, data)
        states.append(module.state_dict())
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


@pytest.mark.parametrize("kind", [PastTeacherModule, MutualModule, EarlyExitModule])
def test_criteria_of_other_modules_are_evaluated(tiny, data, trainer, kind: type[DistillModule]) -> None:
    module = kind([tiny(0), tiny(1)] if kind is MutualModule else tiny())
    engine = trainer(max_epochs=1)
    engine.fit(module, data)
    trained = {name.partition("/")[2] for name in engine.callback_metrics if name.startswith("train/")}
    assert trained - {"hard", "hard_2"} <= set(_curves(engine))
    engine.test(module, data, verbose=False)
    assert trained - {"hard", "hard_2"} <= set(_curves(engine, "test"))


@pytest.mark.parametrize("criterion", [CRD(), SSKD(), WeightedSum({"kd": KD(), "crd": CRD()})], ids=str)
def test_criteria_that_cannot_be_evaluated(distill, data, criterion: DistillLoss) -> None:
    assert not distill(criterion=criterion).validates_criterion
    assert not distill(distill_weight=0.0).validates_criterion


def test_criterion_with_a_fixed_batch_size(distill, data, trainer) -> None:
    engine, module = trainer(max_epochs=1), distill(criterion=SemCKD())
    engine.fit(module, data)
    module.eval()
    with torch.no_grad():
        wanted = module.losses(next(iter(data.val_dataloader())))[1]["semckd"]
    assert _curves(engine)["semckd"] == pytest.approx(float(wanted), rel=1e-5)


class Fragile(DistillLoss):
    """A criterion that raises an error in evaluation for incomplete batches."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if len(batch.target) != SIZES[0]:
            raise IndexError("no such row")
        return (student.logits - teacher.logits).square().mean()


def test_criterion_that_fails_in_evaluation(distill, data, trainer, recwarn) -> None:
    module, engine = distill(criterion=Fragile()), trainer(max_epochs=2)
    engine.fit(module, data)
    warned = [str(warning.message) for warning in recwarn if "not evaluated" in str(warning.message)]
    assert warned == [
        "the criterion is not evaluated on batches of 8 images in validation/test (IndexError: no such row)"
    ]
    module.eval()
    with torch.no_grad():
        wanted = module.losses(next(iter(data.val_dataloader())))[1]["fragile"]
    assert _curves(engine)["fragile"] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_means_with_a_default_dtype_of_16_bits(dtype: torch.dtype) -> None:
    """Lightning sets it while a batch is evaluated with the precisions bf16-true and 16-true."""
    meter, metrics = CriterionMeter(), {}
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for value in (1.0, 3.0):
            for _ in range(300):
                meter.update(metrics, lambda value=value: {"kd": torch.tensor(value)}, 256, 256)
    finally:
        torch.set_default_dtype(default)
    assert float(metrics["kd"].compute()) == 2.0


def test_weight_of_zero_at_first(distill, data, trainer) -> None:
    module, engine = distill(distill_weight=0.0), trainer(max_epochs=1)
    engine.fit(module, data)
    assert "kd" not in _curves(engine)
    module.distill_weight = 1.0
    engine = trainer(max_epochs=1)
    engine.fit(module, data)
    assert _curves(engine)["kd"] > 0


class HeadAsFeature(FitNet):
    """A criterion that compares logits as features of a layer."""

    def __init__(self) -> None:
        super().__init__(["fc"], ["fc"])

    def build(self, student: Any, teacher: Any) -> None:
        """Build no adapter."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return (student.features["fc"] - teacher.features["fc"]).square().mean()


class Broken(DistillLoss):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if torch.is_grad_enabled() and not self.training:
            raise RuntimeError("cannot be tried")
        return student.logits.sum() * 0


class OwnLosses(DistillModule):
    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, terms = super().losses(batch)
        return logits, {**terms, "extra": logits.square().mean()}


def _freeze_head(module: DistillModule) -> DistillModule:
    module.student.fc.requires_grad_(False)
    return module


LABELS: dict[str, tuple[Callable[..., DistillModule], bool]] = {
    "logits": (lambda distill, tiny: distill(hard_weight=0.0), True),
    "logits as a feature": (lambda distill, tiny: distill(criterion=HeadAsFeature(), hard_weight=0.0), True),
    "features and labels": (lambda distill, tiny: distill(criterion=AT(), hard_weight=0.1), True),
    "features": (lambda distill, tiny: distill(criterion=AT(), hard_weight=0.0), False),
    "a middle layer": (lambda distill, tiny: distill(criterion=FitNet(), hard_weight=0.0), False),
    "CRD": (lambda distill, tiny: distill(criterion=CRD(), hard_weight=0.0), False),
    "views": (lambda distill, tiny: distill(criterion=SSKD(), hard_weight=0.0), True),
    "a frozen classifier": (
        lambda distill, tiny: _freeze_head(distill(criterion=BackboneKD(), hard_weight=0.0)),
        True,
    ),
    "one of two reads logits": (
        lambda distill, tiny: distill(criterion=WeightedSum({"kd": KD(), "at": AT()}), hard_weight=0.0),
        True,
    ),
    "the teacher's classifier": (
        lambda distill, tiny: distill(SimKDModule, criterion=SimKD(), hard_weight=0.0),
        True,
    ),
    "a loss of one's own": (lambda distill, tiny: distill(OwnLosses, criterion=AT(), hard_weight=0.0), True),
    "exits": (lambda distill, tiny: EarlyExitModule(tiny(), hard_weight=0.0), False),
    "an exit answers": (lambda distill, tiny: EarlyExitModule(tiny(), BYOT(), exit=1, hard_weight=0.0), True),
    "students": (lambda distill, tiny: MutualModule([tiny(0), tiny(1)], AT(), hard_weight=0.0), False),
    "itself": (lambda distill, tiny: PastTeacherModule(tiny(), hard_weight=0.0), True),
    "what cannot be tried": (lambda distill, tiny: distill(criterion=Broken(), hard_weight=0.0), True),
}


@pytest.mark.parametrize("name", LABELS)
def test_trains_logits(distill, tiny, data, trainer, name: str, recwarn) -> None:
    make, trains = LABELS[name]
    module, engine = make(distill, tiny), trainer(max_epochs=1, limit_train_batches=1)
    if name == "views":
        module.trainer = engine
        engine.datamodule = data
    else:
        engine.fit(module, data)
    assert module.trains_logits is trains
    warned = any("cannot determine whether" in str(warning.message) for warning in recwarn)
    assert warned == (name == "what cannot be tried")


def test_untrained_logits_are_not_logged(distill, data, trainer) -> None:
    def waits(optimizer: Any) -> ReduceLROnPlateau:
        return ReduceLROnPlateau(optimizer)

    module = distill(criterion=AT(), hard_weight=0.0, lr_scheduler=waits)
    engine = trainer(num_sanity_val_steps=-1, max_epochs=1, limit_train_batches=1)
    engine.fit(module, data)
    assert set(_curves(engine)) == {"at", "teacher_acc"}
    assert set(_curves(engine, "train")) == {"at", "loss"}
    assert engine.lr_scheduler_configs[0].monitor == "val/at"
    engine.test(module, data, verbose=False)
    assert set(_curves(engine, "test")) == {"at", "teacher_acc"}


def test_hard_weight_that_increases_later(distill, data, trainer) -> None:
    module, engine = distill(criterion=AT(), hard_weight=1.0), trainer(max_epochs=1)
    engine.callbacks.append(Schedule("hard_weight", epochs=1, shape="step"))
    engine.fit(module, data)
    assert {"at", "acc", "loss"} <= set(_curves(engine))
    assert module.trains_logits
    module.hard_weight = 0.0
    engine = trainer(max_epochs=1)
    engine.fit(module, data)
    assert set(_curves(engine)) == {"at", "teacher_acc"}


def test_trial_of_the_loss_does_not_affect_training(distill, data, trainer) -> None:
    states = []
    for known in (None, True):
        module = distill(criterion=FitNet(), hard_weight=0.0)
        module._has_untrained_part = known
        torch.manual_seed(0)
        trainer(max_epochs=1).fit(module, data)
        states.append(module.state_dict())
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


def test_reserved_names(distill) -> None:
    class Agreement(KD):
        pass

    with pytest.raises(ValueError, match="would be logged as 'agreement', which is reserved"):
        distill(criterion=Agreement())
    with pytest.raises(ValueError, match=r"must not be named \['distill'\]"):
        WeightedSum({"distill": KD()})


def test_is_loss(distill) -> None:
    module = distill(criterion=WeightedSum({"soft": KD(), "hint": FitNet()}))
    curves = {"val/distill", "val/soft", "val/hint", "train/hint_layer", "train/hard", "val/loss"}
    assert {name for name in {*curves, "val/acc", "val/agreement", "val/softness"} if module.is_loss(name)} == curves
