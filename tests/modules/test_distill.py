from __future__ import annotations

import copy
from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD

from lkd import Batch, DistillLoss, DistillModule, Normalization, Outputs, Probe, SyntheticDataModule
from lkd.losses import AT, BYOT, CC, CRD, KD, OFAKD, PKT, FitNet, LogitStandardization, SemCKD, TfKD, WeightedSum
from lkd.types import IGNORE_INDEX


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


class RecordModes(Callback):
    """Records the training modes of teacher and student in each training step."""

    def __init__(self) -> None:
        self.modes: set[bool] = set()
        self.student_modes: set[bool] = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.modes |= {module.training for module in pl_module.teacher.modules()}
        self.student_modes |= {module.training for module in pl_module.student.modules()}


class Hint(DistillLoss):
    """A criterion with an adapter, which is created once the shapes are known."""

    reads_logits = False

    def __init__(self) -> None:
        super().__init__(student_layers=["layer2"], teacher_layers=["layer2"])

    def build(self, student: Probe, teacher: Probe) -> None:
        shapes = [probe.outputs.features["layer2"].shape[1] for probe in (student, teacher)]
        self.adapter = nn.Conv2d(*shapes, 1)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return F.mse_loss(self.adapter(student.features["layer2"]), teacher.features["layer2"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("compiled", [False, True])
def test_teacher_is_invisible_to_training(distill, data, trainer, precision: str, compiled: bool) -> None:
    module = distill()
    teacher, student = _state(module.teacher), _state(module.student)
    if compiled:
        module.student.compile(backend="aot_eager")
        module.teacher.compile(backend="aot_eager")
    watch = RecordModes()
    trainer(precision=precision, callbacks=[watch]).fit(module, data)
    assert _equal(teacher, _state(module.teacher))
    assert not _equal(student, _state(module.student))
    assert watch.modes == {False}
    assert watch.student_modes == {True}
    assert all(parameter.grad is None for parameter in module.teacher.parameters())


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_evaluation_changes_nothing(distill, data, trainer, loop: str) -> None:
    module = distill()
    before = _state(module), _state(module.teacher)
    getattr(trainer(), loop)(module, data)
    assert _equal(before[0], _state(module))
    assert _equal(before[1], _state(module.teacher))


def _few_layers(seed: int) -> nn.Module:
    """Return a network with few layers, which is fast to trace."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    return nn.Sequential(*layers)


def test_compiled_module_trains_like_the_eager_one(data, trainer) -> None:
    sgd = partial(SGD, lr=0.1, momentum=0.9)
    modules = [DistillModule(_few_layers(1), _few_layers(2), optimizer=sgd) for _ in range(2)]
    trainer(max_epochs=1).fit(modules[0], data)
    trainer(max_epochs=1).fit(torch.compile(modules[1], backend="aot_eager"), data)
    for name, tensor in modules[0].state_dict().items():
        torch.testing.assert_close(modules[1].state_dict()[name], tensor, msg=name)


def test_teacher_is_not_in_the_optimizer(distill) -> None:
    module = distill()
    optimizer = module.configure_optimizers()
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in module.student.parameters()}


def test_train_keeps_the_teacher_in_eval_mode(distill) -> None:
    module = distill()
    module.train()
    assert module.student.training
    assert not any(part.training for part in module.teacher.modules())
    wrapped = nn.Sequential(module).train()
    assert wrapped[0].student.training
    assert not any(part.training for part in module.teacher.modules())


def test_state_dict_has_no_teacher_and_loads_strictly(distill) -> None:
    module, other = distill(), distill()
    state = module.state_dict()
    assert state
    assert not [name for name in state if "teacher" in name]
    nn.init.zeros_(other.student.conv1.weight)
    other.load_state_dict(state)
    assert _equal(_state(other), _state(module))
    state["model.stray"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*model.stray"):
        other.load_state_dict(state)
    del state["model.stray"], state["model.conv1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*model.conv1.weight"):
        other.load_state_dict(state)


def test_deepcopy_has_its_own_teacher_and_taps(distill, data, trainer) -> None:
    module = distill(criterion=Hint())
    other = copy.deepcopy(module)
    before = _state(module)
    trainer(max_epochs=1).fit(other, data)
    assert _equal(_state(module), before)
    assert other.teacher is not module.teacher
    assert other.teacher_extractor.network is other.teacher
    assert not [name for name in other.state_dict() if "teacher" in name]
    assert not any(part.training for part in other.teacher.modules())


def test_loss_is_the_weighted_sum(distill) -> None:
    module = distill(distill_weight=0.7, hard_weight=0.2, criterion=KD(temperature=3.0)).eval()
    image, target = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, -100])
    logits, terms = module.losses(Batch(image, target))
    student, teacher = module.student(image), module.teacher(image)
    soft = nn.KLDivLoss(reduction="batchmean")((student / 3).log_softmax(1), (teacher / 3).softmax(1))
    torch.testing.assert_close(logits, student)
    torch.testing.assert_close(terms["kd"], 0.7 * 9 * soft)
    torch.testing.assert_close(terms["hard"], 0.2 * F.cross_entropy(student[:5], target[:5]))


def test_terms_with_zero_weight_are_omitted(distill) -> None:
    batch = Batch(torch.randn(2, 3, 8, 8), torch.tensor([-100, -100]))
    assert set(distill(hard_weight=0.0).losses(batch)[1]) == {"kd"}
    assert set(distill(distill_weight=0.0).losses(batch)[1]) == {"hard"}


def test_zero_weight_gives_zero_gradients(distill) -> None:
    """Unused parameters get a gradient of 0, as under DDP, so that weight decay applies to them in one process, too."""
    batch = Batch(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    features, labels = distill(criterion=AT(), hard_weight=0.0), distill(criterion=FitNet(), distill_weight=0.0)
    for module in (features, labels):
        module.build(batch.input[:1])
        torch.stack(list(module.losses(batch)[1].values())).sum().backward()
    silent = [features.student.fc.weight, *labels.criterion.parameters()]
    assert len(silent) > 1
    assert all(parameter.grad.eq(0).all() for parameter in silent)


def test_batch_without_labels_has_a_finite_loss(distill) -> None:
    _, terms = distill().losses(Batch(torch.randn(2, 3, 8, 8), torch.tensor([-100, -100])))
    assert terms["hard"] == 0
    assert terms["kd"] > 0


class OwnDistillLoss(DistillModule):
    """A user's module that overrides `distill_loss`."""

    def distill_loss(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return F.mse_loss(student.logits, teacher.logits)


def test_overriding_distill_loss(distill) -> None:
    module = distill(OwnDistillLoss, distill_weight=2.0).eval()
    batch = Batch(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    _, terms = module.losses(batch)
    expected = F.mse_loss(module.student(batch.input), module.teacher(batch.input))
    torch.testing.assert_close(terms["distill"], 2 * expected)


def test_criteria_are_logged_by_name(distill, data, trainer) -> None:
    both = WeightedSum({"soft": KD(), "hint": Hint()}, weights={"hint": 3.0})
    engine = trainer(max_epochs=1)
    engine.fit(distill(criterion=both), data)
    names = {"loss", "acc", "hard", "soft", "hint"}
    assert {name.removeprefix("train/") for name in engine.callback_metrics if name.startswith("train/")} == names


def test_adapters_are_trained_and_restored(distill, data, trainer, tmp_path) -> None:
    module = distill(criterion=Hint())
    engine = trainer(max_epochs=1)
    engine.fit(module, data)
    trained = engine.optimizers[0].param_groups[0]["params"]
    assert any(parameter is module.criterion.adapter.weight for parameter in trained)
    engine.save_checkpoint(tmp_path / "hint.ckpt")
    other = distill(criterion=Hint())
    loaded = DistillModule.load_from_checkpoint(
        tmp_path / "hint.ckpt", student=other.student, teacher=other.teacher, criterion=other.criterion
    )
    assert _equal(_state(loaded), _state(module))


def test_checkpoint_is_small_and_safe(data, trainer, tmp_path) -> None:
    from lkd.models import resnet20, resnet56

    own = Normalization((0.4, 0.4, 0.4), (0.2, 0.2, 0.2))
    module = DistillModule(resnet20(num_classes=4), resnet56(num_classes=4), teacher_normalization=own)
    engine = trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    engine.fit(module, data)
    engine.save_checkpoint(tmp_path / "run.ckpt")
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert not [name for name in content["state_dict"] if "teacher" in name]
    tensors = [*module.student.state_dict().values()]
    tensors += [value["momentum_buffer"] for value in content["optimizer_states"][0]["state"].values()]
    own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert (tmp_path / "run.ckpt").stat().st_size < 1.1 * own


def test_teacher_gets_its_own_normalization(distill, data, trainer) -> None:
    module = distill(teacher_normalization=Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    trainer(max_epochs=1).fit(module, data)
    pixels = torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1), torch.tensor((0.4, 0.5, 0.6)).view(3, 1, 1)
    torch.testing.assert_close(module.teacher_input((pixels - 0.5) / 0.25), (pixels - mean) / std)
    assert not [name for name in module.state_dict() if "scale" in name]


def test_teacher_accuracy_and_agreement(distill, data, trainer) -> None:
    module = distill()
    engine = trainer()
    (metrics,) = engine.validate(module, data, verbose=False)
    batch = next(iter(data.val_dataloader()))
    module.eval()
    with torch.no_grad():
        student, teacher = module.student(batch.input).argmax(1), module.teacher(batch.input).argmax(1)
    assert metrics["val/acc"] == pytest.approx((student == batch.target).float().mean().item())
    assert metrics["val/teacher_acc"] == pytest.approx((teacher == batch.target).float().mean().item())
    assert metrics["val/agreement"] == pytest.approx((student == teacher).float().mean().item())


def test_limited_validation_compares_the_same_images(distill, trainer) -> None:
    data = SyntheticDataModule(4, (3, 8, 8), train_size=64, test_size=24, val_size=16, batch_size=4)
    module, measured = distill(), []

    class Check(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            batches = list(trainer.val_dataloaders)[:2]
            with torch.no_grad():
                predictions = [
                    torch.cat([network(batch.input).argmax(1) for batch in batches])
                    for network in (module.student, module.teacher)
                ]
            target = torch.cat([batch.target for batch in batches])
            expected = [float((predictions[1] == other).float().mean()) for other in (target, predictions[0])]
            found = [float(trainer.callback_metrics[f"val/{name}"]) for name in ("teacher_acc", "agreement")]
            measured.append((found, expected))

    trainer(limit_val_batches=2, num_sanity_val_steps=-1, max_epochs=3, callbacks=[Check()]).fit(module, data)
    assert len(measured) == 4
    for found, expected in measured:
        assert found == pytest.approx(expected)


def test_teacher_is_measured_before_the_first_epoch(distill, data, trainer, tiny, capsys) -> None:
    teacher = tiny()
    nn.init.zeros_(teacher.fc.weight)  # always predicts the same class
    with pytest.warns(UserWarning, match=r"near chance.*teacher_ckpt is not set, the order.*teacher_normalization"):
        trainer(num_sanity_val_steps=-1, max_epochs=1).fit(distill(teacher=teacher), data)
    assert "Teacher accuracy on the validation images: " in capsys.readouterr().out
    torch.save(teacher.state_dict(), "teacher.pth")
    module = distill(teacher=teacher, teacher_ckpt="teacher.pth")
    with pytest.warns(UserWarning, match=r"near chance.*check its weights \(teacher_ckpt\), the order of its classes"):
        trainer(num_sanity_val_steps=-1, max_epochs=1).fit(module, data)


def test_good_teacher_causes_no_warning(distill, data, trainer, tiny, capsys, recwarn) -> None:
    from lkd import ClassificationModule

    teacher = ClassificationModule(tiny(), optimizer=lambda parameters: SGD(parameters, lr=0.1, momentum=0.9))
    trainer(max_epochs=10).fit(teacher, data)
    trainer(num_sanity_val_steps=-1, max_epochs=1).fit(distill(teacher=teacher.model), data)
    assert "Teacher accuracy on the validation images: " in capsys.readouterr().out
    assert not [warning for warning in recwarn if "near chance" in str(warning.message)]


class BecomesNonFinite(nn.Module):
    """A network with non-finite logits from the n-th training pass on."""

    def __init__(self, network: nn.Module, after: int) -> None:
        super().__init__()
        self.network, self.after, self.calls = network, after, 0

    def forward(self, image: Tensor) -> Tensor:
        logits = self.network(image)
        self.calls += torch.is_grad_enabled() or self.after < 0
        return logits * torch.nan if self.calls > abs(self.after) else logits


def test_non_finite_loss_names_the_student(data, trainer, tiny) -> None:
    module = DistillModule(BecomesNonFinite(tiny(), after=2), tiny())
    with pytest.raises(ValueError, match=r"not finite from step 2 on \(terms: hard, kd; student logits not finite"):
        trainer().fit(module, data)


def test_non_finite_loss_names_the_teacher(data, trainer, tiny) -> None:
    module = DistillModule(tiny(), BecomesNonFinite(tiny(), after=-3))
    with pytest.raises(ValueError, match=r"from step \d+ on \(terms: kd; teacher logits .* check its weights"):
        trainer(num_sanity_val_steps=0, limit_val_batches=0).fit(module, data)


def test_late_non_finite_loss_is_detected_without_validation(data, trainer, tiny) -> None:
    data.batch_size = 8
    module = DistillModule(BecomesNonFinite(tiny(), after=5), tiny())
    with pytest.raises(ValueError, match="not finite from step 5 on"):
        trainer(max_epochs=1, log_every_n_steps=4, limit_val_batches=0).fit(module, data)


def test_logits_must_be_two_dimensional(data, trainer, tiny) -> None:
    student = nn.Sequential(tiny(), nn.Unflatten(1, (2, 2)))
    with pytest.raises(
        ValueError, match=r"the student must return logits of shape \(batch, classes\), got \(1, 2, 2\)"
    ):
        trainer().fit(DistillModule(student, tiny()), data)


class Infinite(DistillLoss):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return student.logits.sum() * torch.inf


def test_non_finite_loss_names_the_criterion(distill, data, trainer) -> None:
    with pytest.raises(ValueError, match=r"from step 0 on \(terms: infinite; all logits finite"):
        trainer(num_sanity_val_steps=0).fit(distill(criterion=Infinite()), data)


def test_invalid_arguments(distill, tiny) -> None:
    with pytest.raises(ValueError, match=r"hard_weight must be a finite number of at least 0, got -1"):
        distill(hard_weight=-1)
    with pytest.raises(ValueError, match=r"distill_weight must be a finite number of at least 0, got nan"):
        distill(distill_weight=float("nan"))
    with pytest.raises(ValueError, match=r"hard_weight must be a finite number of at least 0, got inf"):
        distill(hard_weight=float("inf"))
    with pytest.raises(
        TypeError, match=r"DistillModule requires a criterion \(a DistillLoss\), got MSELoss; use a criterion of"
    ):
        distill(criterion=nn.MSELoss())
    with pytest.raises(TypeError, match=r"got the class KD; create an instance: KD\(\)"):
        distill(criterion=KD)
    with pytest.raises(ValueError, match="both 0"):
        distill(hard_weight=0, distill_weight=0)
    with pytest.raises(ValueError, match=r"label_smoothing must be at least 0 and less than 1, got 1"):
        distill(label_smoothing=1.0)
    with pytest.raises(FileNotFoundError, match=r"weights file not found: nowhere.pth"):
        distill(teacher_ckpt="nowhere.pth")


def test_class_counts_must_agree(tiny, data, trainer) -> None:
    with pytest.raises(ValueError, match=r"the student has 4 classes, but the teacher has 5; KD compares logits"):
        trainer().fit(DistillModule(tiny(), tiny(num_classes=5)), data)
    with pytest.raises(ValueError, match=r"the data has 4 classes, but the student has only 3"):
        trainer().fit(DistillModule(tiny(num_classes=3), tiny()), data)


def test_feature_distillation_allows_other_classes(tiny, data, trainer) -> None:
    engine = trainer(max_epochs=1)
    engine.fit(DistillModule(tiny(), tiny(num_classes=7), criterion=Hint()), data)
    assert "val/acc" in engine.callback_metrics
    assert "val/agreement" not in engine.callback_metrics


def test_channels_must_agree(tiny, data, trainer) -> None:
    with pytest.raises(ValueError, match=r"the student does not accept inputs of shape \(1, 3, 8, 8\).*in_channels"):
        trainer().fit(DistillModule(tiny(in_channels=1), tiny()), data)


class Indexed(KD):
    needs_index = True


def test_criterion_that_needs_indices(distill) -> None:
    module = distill(criterion=Indexed())
    batch = Batch(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="the criterion Indexed requires sample indices, but the batches have none"):
        module.losses(batch)
    module.losses(batch._replace(index=torch.tensor([5, 6])))


class Plain(L.LightningDataModule):
    """A user's data module with tuples as batches and without `input_shape`."""

    def train_dataloader(self):
        images = torch.randn(32, 3, 8, 8)
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(images, (images.mean((1, 2, 3)) > 0).long()), batch_size=8
        )

    val_dataloader = train_dataloader


def test_plain_data_module(distill, trainer) -> None:
    engine = trainer(max_epochs=1)
    engine.fit(distill(), Plain())
    assert "val/agreement" in engine.callback_metrics


@pytest.mark.parametrize(
    "make",
    [
        AT,
        PKT,
        lambda: CC(feat_dim=None),
        lambda: WeightedSum({"kd": KD(), "at": AT()}),
        lambda: LogitStandardization(KD()),
    ],
    ids=["at", "pkt", "cc", "sum", "standardized"],
)
def test_plain_data_module_for_criteria_without_adapters(distill, trainer, make) -> None:
    trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(distill(criterion=make()), Plain())


@pytest.mark.parametrize("around", [lambda hint: WeightedSum({"kd": KD(), "hint": hint}), LogitStandardization])
def test_nested_adapters_require_the_input_shape(distill, trainer, around) -> None:
    with pytest.raises(ValueError, match=r"builds its adapters.*input_shape.*example_input_array"):
        trainer().fit(distill(criterion=around(Hint())), Plain())


def test_adapters_require_the_input_shape(distill, trainer) -> None:
    with pytest.raises(ValueError, match=r"Hint builds its adapters.*input_shape.*example_input_array"):
        trainer().fit(distill(criterion=Hint()), Plain())
    module = distill(criterion=Hint())
    module.example_input_array = torch.zeros(1, 3, 8, 8)
    engine = trainer(max_epochs=1)
    engine.fit(module, Plain())
    assert "train/hint" in engine.callback_metrics
    assert any(
        parameter is module.criterion.adapter.weight for parameter in engine.optimizers[0].param_groups[0]["params"]
    )


def test_teacher_normalization_requires_that_of_the_data(distill, data, trainer) -> None:
    wanted = Normalization((0.1,), (0.4,))
    with pytest.raises(ValueError, match="teacher_normalization requires the normalization of the data"):
        trainer().fit(distill(teacher_normalization=wanted), Plain())
    with pytest.raises(ValueError, match="has 1 channels, but the data has 3"):
        trainer().fit(distill(teacher_normalization=wanted), data)


class Hard(KD):
    """Its logged name would be that of the cross-entropy."""


def test_reserved_names(distill) -> None:
    with pytest.raises(ValueError, match=r"the criterion Hard would be logged as 'hard', which is reserved"):
        distill(criterion=Hard())


class Two(KD):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"b_c": super().forward(student, teacher, batch)}


class One(KD):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"c": super().forward(student, teacher, batch)}


def test_terms_with_equal_names_are_rejected(distill) -> None:
    module = distill(criterion=WeightedSum({"a": Two(), "a_b": One()}))
    with pytest.raises(ValueError, match="two criteria in WeightedSum have a term named 'a_b_c'"):
        module.losses(Batch(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])))


def test_accuracy_in_training_counts_labelled_images(distill, data, trainer) -> None:
    """Compare with the counted predictions of a student that does not change."""
    data.label_size = 12
    module = distill(optimizer=lambda parameters: SGD(parameters, lr=0.0), hard_weight=1.0)
    right = seen = 0

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            nonlocal right, seen
            with torch.no_grad():
                chosen = pl_module.student(batch.input).argmax(1)
            labelled = batch.target != -100
            right += int((chosen == batch.target)[labelled].sum())
            seen += int(labelled.sum())

    for norm in (part for part in module.student.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.momentum = 0.0
    engine = trainer(max_epochs=1, callbacks=[Count()])
    engine.fit(module, data)
    assert seen == 12
    assert float(engine.callback_metrics["train/acc"]) == pytest.approx(right / seen)


class CountingTeacher(nn.Module):
    """A teacher that counts its input images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen = 0

    def forward(self, input: Tensor) -> Tensor:
        self.seen += len(input)
        return self.network(input)


def test_criterion_without_a_teacher(tiny, data, trainer, tmp_path) -> None:
    module = DistillModule(tiny(), criterion=TfKD(), distill_weight=0.5, hard_weight=0.5)
    fitted = trainer()
    fitted.fit(module, data)
    fitted.save_checkpoint(tmp_path / "run.ckpt")
    assert {"train/hard", "train/tfkd", "val/acc"} <= set(fitted.callback_metrics)
    assert "val/teacher_acc" not in fitted.callback_metrics
    other = DistillModule(tiny(seed=5), criterion=TfKD())
    other.load_state_dict(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"])
    assert _equal(_state(module.student), _state(other.student))


@pytest.mark.parametrize(("criterion", "weight"), [(TfKD, 1.0), (KD, 0.0)])
def test_unused_teacher_is_not_run(tiny, data, trainer, criterion, weight: float) -> None:
    teacher = CountingTeacher(tiny(seed=2))
    module = DistillModule(tiny(), teacher, criterion(), distill_weight=weight, hard_weight=1.0)
    trainer(limit_val_batches=0, max_epochs=1).fit(module, data)
    assert teacher.seen == 1  # the blank image


def test_missing_teacher(tiny, data) -> None:
    with pytest.raises(ValueError, match="the criterion KD requires a teacher, but there is none"):
        DistillModule(tiny())
    with pytest.raises(ValueError, match=r"teacher_ckpt is set to 'x.pth', but there is no teacher"):
        DistillModule(tiny(), criterion=TfKD(), teacher_ckpt="x.pth")


class Pair(DistillLoss):
    """A criterion that reads two views and the number of images."""

    num_views = 2
    needs_index = True

    def __init__(self, num_samples: int | None = None, batch_size: int | None = 7) -> None:
        super().__init__()
        self.num_samples, self.batch_size = num_samples, batch_size

    def build(self, student: Probe, teacher: Probe) -> None:
        self.register_buffer("memory", torch.zeros(self.num_samples or 1))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return F.mse_loss(*student.logits.chunk(2))


def test_number_of_views_is_checked(distill) -> None:
    module = distill(criterion=Pair())
    batch = Batch(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    with pytest.raises(
        ValueError, match=r"criterion Pair requires 2 views of each image.* batches have 1; set `views`"
    ):
        module.losses(batch)
    assert module.losses(batch._replace(views=2))[1]["pair"].isfinite()


def test_criterion_gets_the_number_of_images(distill, data, trainer, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Pair, "num_views", 1)
    module, fitted = distill(criterion=Pair()), trainer(max_epochs=1)
    fitted.fit(module, data)
    fitted.save_checkpoint(tmp_path / "run.ckpt")
    assert module.criterion.memory.shape == (64,)
    assert module.criterion.batch_size == 7  # set explicitly, so unchanged
    again = DistillModule.load_from_checkpoint(
        tmp_path / "run.ckpt", student=module.student, teacher=module.teacher, criterion=Pair()
    )
    assert again.criterion.memory.shape == (64,)


def test_memories_contain_only_training_images(distill, data, trainer, tmp_path) -> None:
    """Memories exclude validation and unlabelled images, and DDP does not broadcast them in each step."""
    data.label_size, data.drop_unlabelled = 24, True

    def make() -> WeightedSum:
        return WeightedSum({"crd": CRD(feat_dim=4, num_negatives=8)})

    module, fitted = distill(criterion=make()), trainer(max_epochs=1)
    fitted.fit(module, data)
    crd = module.criterion.criteria["crd"]
    assert crd.is_drawn.nonzero().flatten().tolist() == data.datasets["train"].index.tolist()
    assert len(crd.is_drawn) == data.num_samples > crd.is_drawn.sum()
    assert {f"criterion.criteria.crd.{name}" for name, _ in crd.named_buffers()} == set(
        module._ddp_params_and_buffers_to_ignore
    )
    fitted.save_checkpoint(tmp_path / "run.ckpt")
    assert "train_index" not in torch.load(tmp_path / "run.ckpt", weights_only=True)["lkd"]
    again = DistillModule.load_from_checkpoint(
        tmp_path / "run.ckpt", student=module.student, teacher=module.teacher, criterion=make()
    )
    assert torch.equal(again.criterion.criteria["crd"].is_drawn, crd.is_drawn)


def test_number_of_images_is_restored_from_the_checkpoint(distill, data, trainer, tmp_path) -> None:
    """A checkpoint restores the number of training images: `test` does not load the training set.

    Lightning restores the weights after `setup`.
    """

    def make() -> DistillModule:
        return distill(criterion=CRD(feat_dim=4, num_negatives=8))

    path = tmp_path / "run.ckpt"
    module, fitted = make(), trainer(max_epochs=1)
    fitted.fit(module, data)
    fitted.save_checkpoint(path)
    networks = {"student": module.student, "teacher": module.teacher}
    loaded = DistillModule.load_from_checkpoint(path, **networks, criterion=CRD(feat_dim=4, num_negatives=8))
    for again, ckpt_path in ((make(), path), (loaded, None), (loaded, path)):
        unopened = SyntheticDataModule(4, (3, 8, 8), train_size=64, test_size=24, val_size=16, batch_size=16)
        tester = trainer()
        tester.test(again, unopened, ckpt_path=ckpt_path)
        assert torch.equal(again.criterion.student_memory, module.criterion.student_memory)
        tester.save_checkpoint(tmp_path / "again.ckpt")
        assert torch.load(tmp_path / "again.ckpt", weights_only=True)["lkd"]["num_samples"] == 64


class TwoOutputs(nn.Module):
    """A network whose layer `maps` returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Identity()
        self.fc = nn.Linear(3, 4)

    def forward(self, input: Tensor) -> Tensor:
        return self.fc(self.maps((input, input))[0].mean((2, 3)))


@pytest.mark.parametrize("make", [AT, PKT, FitNet, OFAKD, SemCKD, BYOT])
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["maps"], "the layer 'maps' returns a tuple; use a layer that returns a single tensor"),
        ([], "reads features, but no layers are set"),
    ],
)
def test_invalid_layers(data, trainer, make, layers: list[str], message: str) -> None:
    sides = ["student_layers", "teacher_layers"] if make not in (OFAKD, BYOT) else ["student_layers"]
    module = DistillModule(TwoOutputs(), TwoOutputs(), make(**dict.fromkeys(sides, layers)))
    with pytest.raises(ValueError, match=message):
        trainer(num_sanity_val_steps=0).fit(module, data)


def test_unlabelled_validation_images(distill, trainer) -> None:
    images, target = torch.randn(8, 3, 8, 8), torch.full((8,), -100)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, target), batch_size=4)
    trainer(max_epochs=1).fit(distill(), Plain().train_dataloader(), loader)


class BreakStudent(Callback):
    """Makes the student's weights non-finite after the last step of each epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.is_last_batch:
            nn.init.constant_(pl_module.student.fc.bias, torch.nan)


def test_non_finite_student_after_the_last_step(distill, data, trainer, tmp_path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/acc", mode="max")
    with pytest.raises(ValueError, match=r"from step \d+ on \(terms: val/loss; student logits not finite"):
        trainer(callbacks=[BreakStudent(), best], enable_checkpointing=True).fit(distill(), data)
    assert not list(tmp_path.glob("*.ckpt"))


def test_layer_groups_are_resolved(distill) -> None:
    criterion = WeightedSum({"at": AT(), "hint": FitNet(["@last_stage"], ["layer2"])})
    module = distill(criterion=criterion)
    assert module.criterion.student_layers == ("layer1", "layer2", "layer3", "layer3")
    assert criterion.criteria["at"].teacher_layers == ("layer1", "layer2", "layer3")
    assert module.student_extractor.layers == ("layer1", "layer2", "layer3")


def test_agreement_counts_only_labelled_images(distill) -> None:
    """Unlabelled images only pad a process's share of the images."""
    module = distill().eval()
    batch = Batch(torch.randn(6, 3, 8, 8), torch.tensor([0, IGNORE_INDEX, 1, IGNORE_INDEX, 2, 3]))
    metrics = module.make_metrics()
    with torch.no_grad():
        module.update_metrics(metrics, batch)
        same = module.student(batch.input).argmax(1) == module.teacher(batch.input).argmax(1)
    assert metrics["agreement"].total == metrics["teacher_acc"].total == 4
    assert metrics["agreement"].correct == same[batch.target != IGNORE_INDEX].sum()
