"""Semantic segmentation: loss, metrics, training, and errors."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from lkd import (
    ClassificationModule,
    DistillModule,
    MutualModule,
    SyntheticDataModule,
    SyntheticSegmentationDataModule,
)
from lkd.callbacks import Speed
from lkd.losses import DIST, DKD, KD, PerPixel, WeightedSum
from lkd.models import CIFARResNet, UNet
from lkd.tasks import SemanticSegmentation
from lkd.tasks.metrics import MeanIoU
from lkd.types import IGNORE_INDEX, Batch, Outputs

CLASSES = 4
TASK = SemanticSegmentation(CLASSES)


class Net(nn.Module):
    """A network whose map has half the size of its input, in a dict as torchvision returns it."""

    def __init__(self, width: int, seed: int = 0, num_classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(self.body(input))}


class AuxNet(Net):
    """`Net` with an auxiliary head, whose logits are `nan` if `broken` is set."""

    def __init__(self, width: int, seed: int = 0, broken: bool = False, num_classes: int = CLASSES) -> None:
        super().__init__(width, seed, num_classes)
        self.aux, self.broken = nn.Conv2d(width, num_classes, 1), broken

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        feature = self.body(input)
        aux = self.aux(feature)
        return {"out": self.head(feature), "aux": aux * float("nan") if self.broken else aux}


def _data(size: int = 24) -> TensorDataset:
    """Return images whose quadrants have the brightness of their class; a border of each mask is ignored."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(CLASSES, (size, 2, 2), generator=generator, dtype=torch.uint8)
    mask = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)
    image = mask[:, None].float() - 1.5 + 0.3 * torch.randn(size, 3, 16, 16, generator=generator)
    mask[:, :2] = 255
    return TensorDataset(image, mask)


def _loader(size: int = 24) -> DataLoader:
    return DataLoader(_data(size), batch_size=8)


def _distill(criterion=None, **settings) -> DistillModule:
    settings.setdefault("task", TASK)
    return DistillModule(Net(4), Net(8, 1), criterion or PerPixel(KD(2.0)), **settings)


def test_metrics_equal_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    metric, seen = MeanIoU(6), []
    for _ in range(3):
        logits = torch.randn(2, 6, 9, 7, generator=generator)
        target = torch.randint(4, (2, 9, 7), generator=generator)  # two classes occur in predictions only
        target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORE_INDEX
        metric.update(logits, target)
        seen.append((logits, target))
    logits, target = (torch.cat(parts) for parts in zip(*seen, strict=True))
    settings = {"num_classes": 6, "ignore_index": IGNORE_INDEX}
    assert metric.compute() == multiclass_jaccard_index(logits, target, average="macro", **settings)
    torch.testing.assert_close(
        metric.per_class().float(), multiclass_jaccard_index(logits, target, average="none", **settings)
    )


def test_loss_is_the_mean_over_labelled_pixels() -> None:
    image, mask = _data().tensors
    batch = TASK.prepare(Batch(image, mask))
    logits = Net(4)(image)["out"]
    large = F.interpolate(logits, (16, 16), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(large, mask.long(), ignore_index=255)
    torch.testing.assert_close(TASK.loss(logits, batch.target), expected)
    assert TASK.labelled(batch.target) == (mask != 255).sum()


def test_training(tmp_path, trainer) -> None:
    """Train a teacher, then a student from teacher and labels, and restore the student from a checkpoint."""
    teacher = ClassificationModule(Net(16, 1), task=TASK)
    trainer(max_epochs=30).fit(teacher, _loader(), _loader())
    module = DistillModule(Net(8), teacher.model, PerPixel(KD(2.0)), task=TASK)
    fit = trainer(max_epochs=30)
    fit.fit(module, _loader(), _loader())
    metrics = fit.callback_metrics
    assert metrics["val/miou"] > 0.9
    assert metrics["val/teacher_miou"] > 0.9
    assert metrics["val/agreement"] > 0.9
    assert {"val/loss", "val/acc", "val/teacher_acc", "val/kd", "train/hard", "train/kd", "train/acc"} <= set(metrics)
    image, mask = _data().tensors
    module.eval()
    logits = F.interpolate(module(image), (16, 16), mode="bilinear", align_corners=False)
    settings = {"num_classes": CLASSES, "ignore_index": 255}
    expected = multiclass_jaccard_index(logits, mask.long(), average="macro", **settings)
    torch.testing.assert_close(metrics["val/miou"], expected)
    accuracy = multiclass_accuracy(logits, mask.long(), average="micro", **settings)
    torch.testing.assert_close(metrics["val/acc"], accuracy)
    fit.save_checkpoint(tmp_path / "student.ckpt")
    loaded = DistillModule.load_from_checkpoint(
        tmp_path / "student.ckpt", student=Net(8, 5), teacher=teacher.model, criterion=PerPixel(KD(2.0)), task=TASK
    )
    torch.testing.assert_close(loaded.eval()(image), module(image), rtol=0, atol=0)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_iou_of_each_class_is_logged(stage: str, trainer) -> None:
    module = ClassificationModule(Net(4), task=TASK)
    module.train_dataloader = module.val_dataloader = module.test_dataloader = _loader
    run = trainer(max_epochs=1)
    run.fit(module)
    assert not [name for name in run.callback_metrics if "iou/" in name]
    (run.validate if stage == "val" else run.test)(module, verbose=False)
    logits, target = module.eval()(_data().tensors[0]), _data().tensors[1].long()
    logits = F.interpolate(logits, (16, 16), mode="bilinear", align_corners=False)
    expected = multiclass_jaccard_index(logits, target, CLASSES, average="none", ignore_index=255)
    for number, value in enumerate(expected):
        torch.testing.assert_close(run.callback_metrics[f"{stage}/iou/{number}"].float(), value)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_class_weights(label_smoothing: float) -> None:
    weights = [0.5, 2.0, 0.0, 3.0]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES, 6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(CLASSES, (2, 6, 5), generator=generator).masked_fill_(torch.eye(6, 5) > 0, IGNORE_INDEX)
    task = SemanticSegmentation(CLASSES, class_weights=weights)
    expected = nn.CrossEntropyLoss(
        torch.tensor(weights).double(), ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing
    )(logits, target)
    torch.testing.assert_close(task.loss(logits, target, label_smoothing), expected)
    equal = SemanticSegmentation(CLASSES, class_weights=[1] * CLASSES)
    torch.testing.assert_close(equal.loss(logits, target), TASK.loss(logits, target))
    for without in (torch.full_like(target, IGNORE_INDEX), torch.full_like(target, 2)):
        loss = task.loss(logits, without, label_smoothing)
        assert loss == 0
        assert not torch.autograd.grad(loss, logits)[0].any()


class Renamed(SemanticSegmentation):
    """Task with other names of its metrics."""

    metric = "glossiness"
    names = ("glossiness", "acc")

    def metrics(self):
        return dict(zip(self.names, super().metrics().values(), strict=True))


def test_names_of_metrics() -> None:
    """Only `higher_is_better` states that lower values are better, whatever the name."""
    module = DistillModule(Net(4), Net(4), PerPixel(KD()), task=Renamed(CLASSES))
    lower = [
        name for name in ("val/glossiness", "val/teacher_glossiness", "val/loss", "val/kd") if module.is_loss(name)
    ]
    assert lower == ["val/loss", "val/kd"]
    assert Renamed.metric_title == "glossiness"
    for names, message in (
        (("a", "b"), "the main metric 'glossiness' of Renamed is not among its metrics a, b"),
        (("glossiness", "loss"), "Renamed has a metric 'loss', which is the name of another logged value"),
        (("glossiness", "teacher_b"), "Renamed has a metric 'teacher_b'"),
    ):
        task = Renamed(CLASSES)
        task.names = names
        with pytest.raises(ValueError, match=message):
            ClassificationModule(Net(4), task=task)


@pytest.mark.parametrize("criterion", [PerPixel(KD()), DKD()])
def test_training_without_any_label(criterion, trainer) -> None:
    """A criterion that uses labelled images only would learn nothing."""
    if isinstance(criterion, DKD):
        module = DistillModule(*(CIFARResNet(8, (2, 2, 2, 2), num_classes=10) for _ in range(2)), criterion)
        data = SyntheticDataModule(train_size=200, label_size=0)
    else:
        module = DistillModule(UNet((2, 3), 5), UNet((2, 3), 5), criterion, task=SemanticSegmentation(5))
        data = SyntheticSegmentationDataModule(16, train_size=16, label_size=0)
    with pytest.raises(ValueError, match=f"has a label, but {type(criterion).__name__} uses labelled images only"):
        trainer(max_epochs=1).fit(module, data)


@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_weighted_validation_loss(batch_size: int, trainer) -> None:
    """`val/loss` is the loss of the whole split, whatever the batch size."""
    weights = [0.1, 1.0, 2.0, 8.0]
    module = ClassificationModule(Net(4), task=SemanticSegmentation(CLASSES, class_weights=weights))
    run = trainer(max_epochs=1)
    run.validate(module, DataLoader(_data(), batch_size), verbose=False)
    image, mask = _data().tensors
    logits = F.interpolate(module.eval()(image), (16, 16), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(logits, mask.long(), torch.tensor(weights), ignore_index=255)
    torch.testing.assert_close(run.callback_metrics["val/loss"], expected)


def test_ignored_class_is_never_predicted() -> None:
    """An `ignore_index` that is a class is excluded from predictions and from the mean IoU."""
    task, generator = SemanticSegmentation(CLASSES, ignore_index=2), torch.Generator().manual_seed(0)
    logits = torch.randn(3, CLASSES, 8, 8, generator=generator)
    batch = task.prepare(Batch(None, torch.randint(CLASSES, (3, 8, 8), generator=generator)))
    metrics = task.metrics()
    task.update(metrics, logits, batch.target)
    classes = logits.index_fill(1, torch.tensor(2), -torch.inf).argmax(1)
    target = batch.target.masked_fill(batch.target == IGNORE_INDEX, 2)
    expected = multiclass_jaccard_index(classes, target, CLASSES, average="none", ignore_index=2)[[0, 1, 3]]
    torch.testing.assert_close(metrics["miou"].compute(), expected.mean())
    per_class = task.class_metrics(metrics)["iou"]
    torch.testing.assert_close(per_class[[0, 1, 3]], expected)
    assert per_class[2].isnan()
    scores = task.scores(task.tally(task.choice(logits, batch.target), batch.target).sum(0))
    torch.testing.assert_close(scores["mean IoU"].float(), expected.mean())


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, -1.0, 1.0, 1.0], [0.0] * 4, [float("nan")] * 4, []])
def test_invalid_class_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"class_weights must contain 4 numbers \(num_classes\)"):
        SemanticSegmentation(CLASSES, class_weights=weights)


@pytest.mark.parametrize("weight", [0.4, 0.0])
@pytest.mark.parametrize("kind", ["alone", "distilled", "mutual"])
def test_auxiliary_head(kind: str, weight: float, trainer) -> None:
    """The auxiliary loss is part of `train/hard`, but not of `val/loss` or of the comparison with a teacher."""
    task = SemanticSegmentation(CLASSES, aux_weight=weight)
    networks, settings = [AuxNet(4), AuxNet(4, 1)], {"task": task, "optimizer": lambda weights: SGD(weights, lr=0.0)}
    if kind == "alone":
        module = ClassificationModule(networks[0], **settings)
    elif kind == "distilled":
        module = DistillModule(networks[0], AuxNet(8, 2, broken=True), PerPixel(KD()), hard_weight=0.5, **settings)
    else:
        module = MutualModule(networks, PerPixel(KD()), hard_weight=0.5, **settings)
    module.train()
    batch = task.prepare(Batch(*_data(8).tensors))
    _, terms = module.losses(batch)
    factor = 1.0 if kind == "alone" else 0.5
    for name, network in zip(["hard", "hard_2"] if kind == "mutual" else ["hard"], networks, strict=False):
        output = network(batch.input)
        main, aux = (task.loss(output[head], batch.target) for head in ("out", "aux"))
        torch.testing.assert_close(terms[name], factor * (main + weight * aux))
    torch.stack(list(terms.values())).sum().backward()
    assert networks[0].aux.weight.grad.any() == (weight > 0)
    fit = trainer(max_epochs=1)
    fit.fit(module, _loader(), _loader())
    image, mask = _data().tensors
    logits = networks[0].eval()(image)["out"]
    torch.testing.assert_close(
        fit.callback_metrics["val/loss"], task.loss(logits, task.prepare(Batch(image, mask)).target)
    )


def test_unused_auxiliary_head_has_zero_gradients() -> None:
    """Without a gradient, DDP would wait for it."""
    module = DistillModule(AuxNet(4), Net(8, 1), PerPixel(KD()), hard_weight=0.0, distill_weight=1.0, task=TASK)
    _, terms = module.losses(TASK.prepare(Batch(*_data(8).tensors)))
    torch.stack(list(terms.values())).sum().backward()
    assert not module.student.aux.weight.grad.any()


def test_batch_norms_of_the_teacher_are_folded(trainer, capsys) -> None:
    module = _distill(PerPixel(KD(2.0)))
    module.example_input_array = torch.zeros(1, 3, 16, 16)
    found = []

    class Spy(L.Callback):
        def on_train_batch_end(self, trainer, module, *args) -> None:
            found.append(module.teacher_outputs(Batch(_data(8).tensors[0], None)).logits)
            found.append(isinstance(module.teacher_extractor.network, torch.fx.GraphModule))

    trainer(max_epochs=1, callbacks=[Speed(), Spy()]).fit(module, _loader())
    logits, folded, *_ = found
    assert folded
    torch.testing.assert_close(logits, module.teacher(_data(8).tensors[0])["out"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("criterion", [PerPixel(KD(2.0)), PerPixel(DIST(), max_pixels=50)])
def test_ignored_pixels_change_nothing(criterion) -> None:
    """Neither loss nor gradient depend on the teacher's and student's logits where the mask is ignored."""
    losses = []
    for value in (0.0, 100.0):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 2, CLASSES, 8, 8)
        target = torch.zeros(2, 8, 8, dtype=torch.int64)
        target[:, :3] = 255
        student[:, 0, :3], teacher[:, 1, :3] = value, value
        batch = TASK.prepare(Batch(None, target))
        torch.manual_seed(1)
        outputs = (Outputs(logits, {}) for logits in (student, teacher))
        terms = criterion(*outputs, batch)
        losses.append(torch.stack(list(terms.values())).sum())
    torch.testing.assert_close(*losses, rtol=0, atol=0)


class Miou(KD):
    """A criterion whose logged name is that of the mean IoU."""


class Teacher(KD):
    """A criterion with a term that has the name of a metric of the teacher."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"miou": student.logits.mean()}


@pytest.mark.parametrize(
    ("criterion", "name"),
    [
        (lambda: PerPixel(Miou()), "miou"),
        (lambda: WeightedSum({"teacher_miou": PerPixel(KD())}), "teacher_miou"),
        (lambda: Teacher(), "teacher_miou"),
    ],
)
@pytest.mark.filterwarnings("ignore:the criterion is not evaluated")
def test_metric_names_of_the_task_are_reserved(criterion, name: str, trainer) -> None:
    with pytest.raises(ValueError, match=f"would be logged as '{name}', which is reserved for another logged value"):
        trainer(max_epochs=1).fit(_distill(criterion()), _loader(), _loader())


@pytest.mark.parametrize("gap", [-0.001, 0.001])
def test_teacher_near_chance(gap: float, trainer) -> None:
    """Random classes have a mean IoU of 1 / (2K - 1); the warning covers a tenth of the range from there to 1."""
    metric = MeanIoU(CLASSES)
    torch.manual_seed(0)
    metric.update(*torch.randint(CLASSES, (2, 1, 500, 500)))
    assert float(metric.compute()) == pytest.approx(1 / 7, abs=0.003)
    module = _distill()
    score = 1 / 7 + 0.1 * 6 / 7 + gap
    module.metrics["val"]["teacher_miou"].compute = lambda: torch.tensor(score)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(max_epochs=1).fit(module, _loader(), _loader())
    assert any("near chance (14.29%)" in str(one.message) for one in seen) == (gap < 0)


class OtherAux(AuxNet):
    """A network whose auxiliary head has another number of classes."""

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        output = super().forward(input)
        return {**output, "aux": output["aux"][:, :3]}


class Named(nn.Identity):
    """A network with logits under an unknown name."""

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        return {"mask": input}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: _distill(KD()), "expects student_logits of shape .* use lkd.losses.PerPixel"),
        (lambda: _distill(task=SemanticSegmentation(5)), "student returns 4 classes, but the task has 5"),
        (lambda: ClassificationModule(nn.Flatten(), task=TASK), r"logits of shape \(batch, classes, height"),
        (lambda: ClassificationModule(Net(4)), r"must return logits \(a tensor"),
        (lambda: ClassificationModule(Named(), task=TASK), r"must return logits .*, got dict with the keys mask"),
        (
            lambda: ClassificationModule(OtherAux(4), task=TASK),
            "the auxiliary head of the model returns 3 classes, but",
        ),
    ],
)
def test_invalid_settings(module, message, trainer) -> None:
    made = module()
    made.example_input_array = torch.zeros(1, 3, 16, 16)
    with pytest.raises((ValueError, TypeError), match=message):
        trainer().fit(made, _loader(), _loader())


def test_invalid_targets(trainer) -> None:
    data = TensorDataset(torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"requires masks of shape \(batch, height, width\), got \(2,\)"):
        trainer().fit(_distill(), DataLoader(data, batch_size=2))
    with pytest.raises(ValueError, match=r"requires masks of .*, got a list; use a data module that returns masks"):
        TASK.prepare(Batch(None, [{"boxes": torch.zeros(0, 4)}]))


def test_labels_out_of_range(trainer) -> None:
    image, mask = _data().tensors
    data = TensorDataset(image, mask.clamp(max=200) + 1)
    with pytest.raises(ValueError, match=r"a label is out of range .*0\.\.3"):
        trainer().fit(_distill(), DataLoader(data, batch_size=8))


def test_teacher_maps_are_not_cached() -> None:
    assert "too large to be cached" in _distill().cache_obstacle


def test_resumed_training_is_the_same(tmp_path, trainer) -> None:
    whole, half, rest = (_distill(PerPixel(DIST(), max_pixels=64)) for _ in range(3))
    L.seed_everything(3)
    trainer(max_epochs=4).fit(whole, _loader())
    L.seed_everything(3)
    begun = trainer(max_epochs=2)
    begun.fit(half, _loader())
    begun.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.get_rng_state()  # not saved by Lightning, but by lkd's command line
    resumed = trainer(max_epochs=4)
    torch.set_rng_state(state)
    resumed.fit(rest, _loader(), ckpt_path=tmp_path / "half.ckpt")
    for ours, theirs in zip(whole.state_dict().values(), rest.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
