"""The teacher is hidden from everything that walks the module tree."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lkd import Batch, DistillLoss, DistillModule, Normalization, Outputs, Probe


class Hint(DistillLoss):
    """A criterion with an adapter, which is created once the shapes are known."""

    def __init__(self) -> None:
        super().__init__(student_layers=["layer2"], teacher_layers=["layer2"])

    def build(self, student: Probe, teacher: Probe) -> None:
        self.adapter = nn.Conv2d(4, 4, 1)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return (self.adapter(student.features["layer2"]) - teacher.features["layer2"]).square().mean()


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def _assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture
def odd(tiny) -> nn.Module:
    """Return a teacher whose BatchNorm statistics differ from their initial values."""
    teacher = tiny(seed=2)
    teacher(torch.randn(64, 3, 8, 8) + 1)
    return teacher


@pytest.mark.parametrize(
    "average", [lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1), lambda: EMAWeightAveraging(decay=0.9)]
)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "adapters and normalization"])
def test_weight_averaging_excludes_the_teacher(distill, data, trainer, odd, tmp_path, average, extras) -> None:
    own = {"criterion": Hint(), "teacher_normalization": Normalization((0.1,) * 3, (0.4,) * 3)} if extras else {}
    module = distill(teacher=odd, **own)
    before = _state(odd)
    engine = trainer(max_epochs=3, callbacks=[average()])
    engine.fit(module, data)
    _assert_equal(_state(module.teacher), before)
    engine.save_checkpoint(tmp_path / "run.ckpt")
    assert not [name for name in torch.load(tmp_path / "run.ckpt")["state_dict"] if "teacher" in name]


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "adapters and normalization"])
def test_resuming_with_averaged_weights(distill, data, trainer, tmp_path, extras) -> None:
    def make() -> DistillModule:
        own = {"criterion": Hint(), "teacher_normalization": Normalization((0.1,) * 3, (0.4,) * 3)} if extras else {}
        torch.manual_seed(0)
        return distill(**own)

    whole, resumed = make(), make()
    keep = {"enable_checkpointing": True}
    trainer(max_epochs=3, callbacks=[EMAWeightAveraging(decay=0.9)]).fit(whole, data)
    engine = trainer(max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.9)], **keep)
    engine.fit(make(), data)
    path = engine.checkpoint_callback.best_model_path
    trainer(max_epochs=3, callbacks=[EMAWeightAveraging(decay=0.9)], **keep).fit(resumed, data, ckpt_path=path)
    _assert_equal(_state(resumed), _state(whole))


def test_averaged_models_restore_their_state(distill) -> None:
    one, other = (AveragedModel(distill()) for _ in range(2))
    nn.init.zeros_(one.module.student.fc.weight)
    other.load_state_dict(one.state_dict())
    _assert_equal(_state(other), _state(one))
    assert not [name for name in one.state_dict() if "teacher" in name]


def test_unfreeze_leaves_the_teacher_frozen(distill) -> None:
    module = distill()
    module.freeze()
    module.unfreeze()
    assert all(parameter.requires_grad for parameter in module.student.parameters())
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())
    assert not any(part.training for part in module.teacher.modules())


def test_teacher_follows_device_and_dtype_of_the_module(distill, data, trainer) -> None:
    module = distill(teacher_normalization=Normalization((0.1,) * 3, (0.4,) * 3))
    trainer(max_epochs=1).fit(module, data)
    module.double()
    assert {tensor.dtype for tensor in module.teacher.parameters()} == {torch.float64}
    assert module.teacher_input(torch.zeros(1, 3, 2, 2, dtype=torch.float64)).dtype == torch.float64
    assert module._normalizer.scale.dtype == module._normalizer.shift.dtype == torch.float64
    module.to("meta")
    assert {tensor.device.type for tensor in (*module.teacher.buffers(), module._normalizer.scale)} == {"meta"}


class Keeps(Hint):
    def build(self, student: Probe, teacher: Probe) -> None:
        super().build(student, teacher)
        self.head = teacher.network.fc


def test_criterion_must_not_register_the_teacher(distill, data, trainer, tiny) -> None:
    with pytest.raises(ValueError, match=r"criterion\.head\.weight belongs to the teacher.*copy\.deepcopy.*tuple"):
        trainer().fit(distill(criterion=Keeps()), data)
    network = tiny()
    with pytest.raises(ValueError, match=r"model\.conv1\.weight belongs to the teacher"):
        trainer().fit(DistillModule(network, network), data)


def test_normalization_requires_a_data_module(distill) -> None:
    module = distill(teacher_normalization=Normalization((0.1,) * 3, (0.4,) * 3))
    with pytest.raises(ValueError, match=r"teacher_normalization requires the mean and std of a data module"):
        module.losses(Batch(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])))


class AlwaysRunsTeacher(DistillModule):
    def teacher_outputs(self, batch: Batch) -> Outputs:
        return super().teacher_outputs(batch)


def test_teacher_runs_once_on_the_validation_images(distill, trainer, data) -> None:
    images, curves = [], []
    for kind in (DistillModule, AlwaysRunsTeacher):
        module, seen = distill(kind), []
        module.teacher.register_forward_pre_hook(lambda network, args, seen=seen: seen.append(len(args[0])))
        fit = trainer(max_epochs=3, limit_train_batches=1, num_sanity_val_steps=-1)
        fit.fit(module, data)
        images.append(sum(seen) - 1)  # the blank image of the probe
        curves.append({name: float(value) for name, value in fit.callback_metrics.items() if name.startswith("val")})
    assert images == [16 + 3 * 16, 4 * 16 + 3 * 16]  # 16 validation images, and a training batch of 16 three times
    assert curves[0] == curves[1]
    assert {"val/teacher_acc", "val/agreement"} <= curves[0].keys()


def test_teacher_modified_in_place_runs_again(distill, trainer, data) -> None:
    class Change(L.Callback):
        def __init__(self) -> None:
            self.curves: list[tuple[float, ...]] = []

        def on_train_epoch_end(self, trainer, pl_module) -> None:  # after the validation of the epoch
            names = "val/teacher_acc", "val/agreement"
            self.curves.append(tuple(float(trainer.callback_metrics[name]) for name in names))
            with torch.no_grad():
                pl_module.teacher.fc.weight.neg_()

    always, once = Change(), Change()
    for kind, change in ((AlwaysRunsTeacher, always), (DistillModule, once)):
        trainer(max_epochs=2, limit_train_batches=1, callbacks=[change]).fit(distill(kind), data)
    assert once.curves == always.curves
    assert once.curves[0] != once.curves[1]


class RecordTrainsLogits(L.Callback):
    def setup(self, trainer: L.Trainer, pl_module, stage: str) -> None:
        self.trains_logits = pl_module.trains_logits


def test_trains_logits_is_available_before_setup(distill, data, trainer) -> None:
    module, record = (
        distill(hard_weight=0.0, teacher_normalization=Normalization((0.1,) * 3, (0.4,) * 3)),
        RecordTrainsLogits(),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cannot determine whether the loss trains the logits")
        trainer(max_epochs=1, callbacks=[record]).fit(module, data)
    assert record.trains_logits
