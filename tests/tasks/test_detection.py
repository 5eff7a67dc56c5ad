"""Detection: losses and detections of torchvision, criteria, training, resume and errors."""

from __future__ import annotations

import json
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from lkd import (
    ClassificationModule,
    DistillModule,
    MutualModule,
    SyntheticDetectionDataModule,
    SyntheticSegmentationDataModule,
)
from lkd.callbacks import PredictionWriter, TeacherCache
from lkd.compare.comparison import check_comparable
from lkd.features.extractor import FeatureExtractor
from lkd.losses import AT, CIRKD, CWD, DSD, FGD, IFVD, KD, LD, MGD, PKD, PerAnchor, PerPixel, WeightedSum
from lkd.losses.fgd import fgd_masks
from lkd.models import RetinaNetDetector, faster_rcnn, fcos, retinanet, ssdlite
from lkd.models.distribution import distribution_focal_loss
from lkd.tasks import Detection
from lkd.tasks.classification import check_is_classification
from lkd.types import Batch, Mixed, Outputs

PYRAMID = (["@pyramid"], ["@pyramid"])
SMALL = {"num_classes": 5, "filters": (4, 8), "channels": 32}
IMAGES = [torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0)), torch.ones(3, 50, 34)]
TARGET = [
    {"boxes": torch.tensor([[5.0, 5.0, 30.0, 30.0], [20.0, 2.0, 50.0, 20.0]]), "labels": torch.tensor([2, 4])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]
BATCH = Batch(IMAGES, TARGET)  # type: ignore[arg-type]
DETECTORS = {
    "retinanet": partial(retinanet, **SMALL, num_scales=1),
    "fcos": partial(fcos, **SMALL, num_convs=1),
    "fcos-distributions": partial(fcos, **SMALL, num_convs=1, reg_max=8),
    "faster_rcnn": partial(faster_rcnn, **SMALL),
    "ssdlite": partial(ssdlite, 5),
}


def _detector(name: str = "fcos-distributions", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return DETECTORS[name]()


def _distill(criterion=None, kind: str = "fcos-distributions", **settings) -> DistillModule:
    settings.setdefault("optimizer", lambda parameters: SGD(parameters, lr=0.01, momentum=0.9))
    settings.setdefault("task", Detection())
    criterion = criterion or PKD(*PYRAMID)
    return DistillModule(_detector(kind), _detector(kind, 1), criterion, hard_weight=1.0, **settings)


def _data(**settings) -> SyntheticDetectionDataModule:
    return SyntheticDetectionDataModule((32, 48), **{"train_size": 16, "val_size": 4, "batch_size": 4, **settings})


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_are_precise_in_mixed_precision(name: str) -> None:
    """In bfloat16, coordinates above 512 are multiples of 4."""
    detector, image = _detector(name).eval(), [torch.rand(3, 64, 800, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        expected = detector(image).values.get("anchors")
        with torch.autocast("cpu", torch.bfloat16):
            predictions = detector(image)
            (found,) = predictions.detections()
    if expected is not None:
        torch.testing.assert_close(predictions.values["anchors"], expected)
    boxes = found["boxes"]
    assert boxes.dtype == torch.float32
    if name == "faster_rcnn":  # the others find no box with the score of 0.05 before training
        assert len(boxes)
        assert not boxes.equal(boxes.bfloat16().float())
    boxes = {"boxes": torch.tensor([[700.0, 5.0, 790.0, 60.0]]), "labels": torch.tensor([1])}
    with torch.autocast("cpu", torch.bfloat16):
        Detection().loss(detector(image), [boxes]).backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in detector.parameters())


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_and_detections_equal_torchvision(name: str) -> None:
    detector = _detector(name).eval()
    predictions = detector(IMAGES)
    for own, other in zip(predictions.detections(), detector.network(IMAGES), strict=True):
        assert set(own) == {"boxes", "scores", "labels"}
        assert all(torch.equal(own[key], other[key]) for key in other)
    torch.manual_seed(0)
    losses = predictions.losses(TARGET)
    assert not any(module.training for module in detector.modules())
    detector.network.train()
    for layer in detector.modules():  # in eval mode, they compute the same
        layer.training = layer.training and not isinstance(layer, nn.BatchNorm2d | nn.Dropout)
    torch.manual_seed(0)
    expected = detector.network(IMAGES, TARGET)
    assert set(losses) == set(expected)
    assert all(torch.equal(losses[term], expected[term]) for term in expected)
    torch.manual_seed(0)
    torch.testing.assert_close(Detection().loss(predictions, TARGET), sum(expected.values()))


def test_loss_of_the_distributions() -> None:
    """A quarter of the mean focal loss over the sides of the boxes to which anchors are assigned."""
    detector = _detector().eval()
    predictions = detector(IMAGES)
    found = predictions.losses(TARGET)["bbox_distribution"]
    values = predictions.values
    terms = []
    with torch.no_grad():
        stored = {}
        original = detector.network.head.compute_loss
        detector.network.head.compute_loss = lambda *given: stored.update(matched=given[3]) or original(*given)
        predictions.losses(TARGET)
    for number, matched in enumerate(stored["matched"]):
        for anchor in (matched >= 0).nonzero().flatten().tolist():
            x1, y1, x2, y2 = values["anchors"][number][anchor].tolist()
            box = TARGET[number]["boxes"][matched[anchor]].tolist()
            x, y, size = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1
            distances = [(x - box[0]) / size, (y - box[1]) / size, (box[2] - x) / size, (box[3] - y) / size]
            logits = values["head"]["bbox_distribution"][number, anchor].view(4, -1)
            for own, distance in zip(logits.log_softmax(1), distances, strict=True):
                low = min(int(distance), 7)
                share = min(distance, 8) - low
                terms.append(-(1 - share) * own[low] - share * own[low + 1])
    assert len({int(one) for one in stored["matched"][0] if one >= 0}) == 2
    torch.testing.assert_close(found, 0.25 * torch.stack(terms).mean())


@pytest.mark.parametrize("kind", ["alone", "distilled"])
def test_validation_does_not_change_training(kind: str, trainer) -> None:
    """The loss of Faster R-CNN draws boxes at random, in validation as well."""
    weights = []
    for limit in (0, 1.0):
        L.seed_everything(0)
        settings = {"optimizer": lambda parameters: SGD(parameters, lr=0.01), "task": Detection()}
        network = _detector("faster_rcnn")
        if kind == "alone":
            module = ClassificationModule(network, **settings)
        else:
            module = DistillModule(network, _detector("faster_rcnn", 1), PKD(*PYRAMID), **settings)
        trainer(max_epochs=2, limit_val_batches=limit, num_sanity_val_steps=0).fit(module, _data())
        weights.append(torch.cat([weight.flatten() for weight in network.parameters()]))
    assert torch.equal(*weights)


def test_predictions_of_faster_rcnn_in_mixed_precision(tmp_path, trainer) -> None:
    """Its boxes are computed by a network, outside of `predict_step`."""
    module = ClassificationModule(_detector("faster_rcnn"), task=Detection())
    writer = PredictionWriter(str(tmp_path))
    run = trainer(precision="bf16-mixed", callbacks=[writer])
    run.predict(module, _data(test_size=4), return_predictions=False)
    assert json.loads((writer.folder / "detections.json").read_text())


def test_detectors_that_pad_differently_are_rejected() -> None:
    """Two stages pad 40 rows to 64, and five stages to 128, so that positions would not correspond."""
    student, teacher = _detector(), fcos(5, (4, 4, 4, 4, 4), 32, num_convs=1)
    module = DistillModule(student, teacher, PKD(["pyramid.0"], ["pyramid.0"]), task=Detection())
    module.build([torch.zeros(3, 256, 256)])
    module.losses(Batch([torch.rand(3, 256, 256)] * 2, TARGET))
    with pytest.raises(ValueError, match=r"PKD compares features at the same positions.* 64x64 and 128x128 pixels"):
        module.losses(BATCH)


def test_labels_weight_the_validation_loss_by_images(trainer) -> None:
    module, data = _module(), _data(val_size=5)
    run = trainer(max_epochs=1)
    run.validate(module, data, verbose=False)
    module.eval()
    losses = [
        (float(module.task.loss(module(batch.input), batch.target)), len(batch.target))
        for batch in data.val_dataloader()
    ]
    assert [number for _, number in losses] == [4, 1]
    expected = sum(loss * number for loss, number in losses) / 5
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-5)


def test_mean_ap_without_boxes() -> None:
    metrics = Detection().metrics()
    predictions = _detector().eval()(IMAGES)
    Detection().update(metrics, predictions, [TARGET[1], TARGET[1]])
    assert [float(metric.compute()) for metric in metrics.values()] == [0.0, 0.0]


@pytest.mark.parametrize(
    "criterion", [IFVD(["pyramid.0"], ["pyramid.0"]), CIRKD("pyramid.0", "pyramid.0"), DSD(*PYRAMID), PerPixel(KD())]
)
def test_criteria_for_maps_of_logits_are_rejected(criterion, trainer) -> None:
    module = _distill(criterion)
    with pytest.raises((ValueError, TypeError), match="student returns Predictions; use a network for segmentation"):
        trainer(max_epochs=1).fit(module, _data())


def test_mutual_distillation(trainer) -> None:
    module = MutualModule([_detector(seed=seed) for seed in (0, 1)], PKD(*PYRAMID), task=Detection())
    run = trainer(max_epochs=1, limit_train_batches=2)
    run.fit(module, _data())
    assert run.callback_metrics["train/pkd_2"] > 0


def test_boxes_are_pooled_at_the_scale_of_their_level() -> None:
    """torchvision estimates 1/2 from the first image, which has 44 of 64 rows after padding."""
    detector = _detector("faster_rcnn").eval()
    detector([torch.zeros(3, 44, 44)])
    assert detector.network.roi_heads.box_roi_pool.scales == [0.25, 0.125]


@pytest.mark.parametrize("size_divisible", [64, 32])
def test_scales_of_maps_whose_size_is_rounded_up(size_divisible: int) -> None:
    """With 96 rows, a map of stride 64 has 2 rows, from which a stride of 48 would result."""
    detector = faster_rcnn(5, (4, 4, 4, 4, 4), channels=8).eval()
    detector.network.transform.size_divisible = size_divisible
    detector([torch.zeros(3, 96, 96)])
    assert detector.network.roi_heads.box_roi_pool.scales == [1 / stride for stride in (4, 8, 16, 32, 64)]


@pytest.mark.parametrize("create", [retinanet, fcos])
def test_anchors_have_the_stride_of_their_level(create) -> None:
    values = create(5, (4, 8, 8, 8)).eval()([torch.zeros(3, 96, 96)]).values
    centers = values["anchors"][0][-values["counts"][-1] :].view(-1, 2, 2).mean(1)
    assert {64 * number for number in (0, 1)} == set(centers.flatten().tolist()) - {32}


def test_maps_of_a_shared_head_are_those_of_all_levels() -> None:
    detector, calls = _detector().eval(), {"class_maps": [], "box_maps": []}
    head = detector.network.head
    layers = {"class_maps": head.classification_head.cls_logits, "box_maps": head.regression_head.bbox_reg}
    for group, layer in layers.items():
        layer.register_forward_hook(lambda _layer, _args, output, seen=calls[group]: seen.append(output))
    outputs = FeatureExtractor(detector, ["@class_maps", "@box_maps", "@pyramid"], Detection().logits)(IMAGES)
    for group, seen in calls.items():
        assert len(seen) == 3
        for number, expected in enumerate(seen):
            assert torch.equal(outputs.features[f"{group}.{number}"], expected)
    assert [outputs.features[f"pyramid.{number}"].shape[2:] for number in range(3)] == [(16, 16), (8, 8), (4, 4)]


def test_boxes_of_distributions() -> None:
    head = _detector().network.head
    found = head([torch.randn(1, 32, 2, 3)])
    probability = found["bbox_distribution"].view(1, 6, 4, 9).softmax(3)
    torch.testing.assert_close(found["bbox_regression"], (probability * torch.arange(9.0)).sum(3))
    logits, distance = torch.randn(3, 9), torch.tensor([0.0, 2.25, 11.0])
    log = logits.log_softmax(1)
    expected = -(log[0, 0] + 0.75 * log[1, 2] + 0.25 * log[1, 3] + log[2, 8]) / 3
    torch.testing.assert_close(distribution_focal_loss(logits, distance), expected)


def test_fgd_finds_boxes_in_images_that_the_detector_resizes() -> None:
    network = retinanet(**SMALL, num_scales=1).network
    assert isinstance(network, RetinaNet)
    network.transform = GeneralizedRCNNTransform(64, 96, [0.0] * 3, [1.0] * 3)
    predictions = RetinaNetDetector(network)(IMAGES)
    images, target = network.transform(IMAGES, TARGET)
    padded = images.tensors.shape[-2:]
    assert padded == (96, 96)
    sizes = [level.shape[-2:] for level in network.backbone(images.tensors).values()]
    for size in sizes:
        own = fgd_masks([one["boxes"] for one in TARGET], predictions.areas, size)
        placed = fgd_masks([one["boxes"] for one in target], [padded] * 2, size)
        assert all(torch.equal(*pair) for pair in zip(own, placed, strict=True))
    feature = torch.rand(2, 4, *sizes[0])
    criterion = FGD(["a"], ["a"])
    (mask, _), (whole, _) = (
        criterion._masks(feature, Outputs(logits, {}), BATCH) for logits in (predictions, torch.empty(0))
    )
    assert torch.equal(mask, fgd_masks([one["boxes"] for one in target], [padded] * 2, sizes[0])[0])
    assert not torch.equal(mask, whole)


@pytest.mark.parametrize(
    ("kind", "criterion"),
    [
        ("faster_rcnn", PKD(*PYRAMID)),
        ("faster_rcnn", AT(*PYRAMID)),
        ("retinanet", CWD(*PYRAMID)),
        ("retinanet", MGD(*PYRAMID, mask="pixels")),
        ("retinanet", FGD(*PYRAMID)),
        ("ssdlite", PerAnchor(KD())),
        (
            "fcos-distributions",
            WeightedSum({"kd": PerAnchor(KD()), "ld": LD(["@box_maps"], ["@box_maps"], ["@class_maps"])}),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_criteria_train_the_student_only(kind: str, criterion) -> None:
    module = _distill(criterion, kind)
    module.build(torch.zeros(1, 3, 64, 64))
    _, terms = module.losses(module.read(BATCH))
    distilled = sum(term for name, term in terms.items() if name != "hard")
    assert set(terms) - {"hard"}
    assert distilled > 0
    distilled.backward()
    assert any(
        parameter.grad.abs().sum() > 0 for parameter in module.student.parameters() if parameter.grad is not None
    )
    assert all(parameter.grad is None for parameter in module.teacher.parameters())


def test_boxes_in_half_precision_are_rejected() -> None:
    """The precision bf16-true converts the boxes of a batch as well."""
    batch = BATCH._replace(target=[{**own, "boxes": own["boxes"].bfloat16()} for own in TARGET])
    with pytest.raises(ValueError, match=r"requires boxes in float32, got bfloat16, .*--trainer.precision=bf16-mixed"):
        Detection().prepare(batch)


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_ld_requires_distributions(kind: str) -> None:
    """The loss of coordinates would be 0 for FCOS, and meaningless for several anchors at each position."""
    module = _distill(LD(["@box_maps"], ["@box_maps"], ["@class_maps"]), kind)
    with pytest.raises(
        ValueError, match=r"the box maps of this \w+Detector are coordinates; use detectors that predict"
    ):
        module.build(torch.zeros(1, 3, 64, 64))


def test_training_and_metrics(tmp_path, trainer) -> None:
    """All metrics are logged. The teacher does not change and is not in the checkpoint, which restores the student."""
    module, data = _distill(), _data()
    before = {name: tensor.clone() for name, tensor in module.teacher.state_dict().items()}
    fit = trainer(max_epochs=2)
    fit.fit(module, data)
    metrics = fit.callback_metrics
    expected = {"val/map", "val/map_50", "val/teacher_map", "val/teacher_map_50", "val/loss", "val/pkd"}
    assert expected | {"train/hard", "train/pkd", "train/loss"} <= set(metrics)
    assert "train/acc" not in metrics
    assert "val/agreement" not in metrics
    assert not module.teacher.training
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.teacher.state_dict().items())
    module.eval()
    reference = MeanAveragePrecision(backend="faster_coco_eval")
    with torch.no_grad():
        for batch in data.val_dataloader():
            reference.update(module(batch.input).detections(), batch.target)
    assert metrics["val/map"] == reference.compute()["map"].clamp(min=0)
    fit.save_checkpoint(tmp_path / "student.ckpt")
    saved = torch.load(tmp_path / "student.ckpt", weights_only=True)
    assert not [name for name in saved["state_dict"] if name.startswith("teacher")]
    loaded = DistillModule.load_from_checkpoint(
        tmp_path / "student.ckpt",
        student=_detector(seed=5),
        teacher=module.teacher,
        criterion=PKD(*PYRAMID),
        task=Detection(),
    )
    found, expected = (one.eval()(IMAGES).class_logits for one in (loaded, module))
    assert torch.equal(found, expected)


def test_the_loss_decreases(trainer) -> None:
    module = ClassificationModule(_detector(), task=Detection(), optimizer=partial(torch.optim.AdamW, lr=0.003))
    losses = []
    for epochs in (1, 8):
        fit = trainer(max_epochs=epochs, limit_val_batches=0)
        fit.fit(module, _data(flip=0.0))
        losses.append(float(fit.callback_metrics["train/loss"]))
    assert losses[1] < 0.85 * losses[0]


def test_resumed_training_is_the_same(tmp_path, trainer) -> None:
    """This also holds within an epoch, with random masks and, in Faster R-CNN, random proposals."""

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                states.append(torch.get_rng_state())  # not saved by Lightning, but by lkd's command line
                trainer.should_stop = True

    class Continue(L.Callback):
        def on_train_start(self, trainer, module) -> None:
            torch.set_rng_state(states[0])

    states: list[torch.Tensor] = []
    whole, half, rest = (_distill(MGD(*PYRAMID, mask="pixels"), "faster_rcnn", distill_weight=1e-4) for _ in range(3))
    for module, epochs, callbacks, path in (
        (whole, 2, [], None),
        (half, 2, [Stop()], None),
        (rest, 2, [Continue()], tmp_path / "half.ckpt"),
    ):
        L.seed_everything(3)
        trainer(max_epochs=epochs, callbacks=callbacks, limit_val_batches=0).fit(
            module, _data(train_size=12), ckpt_path=path
        )
    assert any(
        not torch.equal(*pair) for pair in zip(half.state_dict().values(), rest.state_dict().values(), strict=True)
    )
    assert all(torch.equal(*pair) for pair in zip(whole.state_dict().values(), rest.state_dict().values(), strict=True))


def _module(**settings) -> ClassificationModule:
    settings.setdefault("model", _detector())
    return ClassificationModule(task=Detection(), **settings)


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        (lambda: _distill(KD()), _data, "kd_loss expects .*PerAnchor"),
        (lambda: _distill(PerAnchor(KD()), "faster_rcnn"), _data, "use a detector with one stage"),
        (lambda: _module(label_smoothing=0.1), _data, "no label smoothing"),
        (lambda: _module(model=_detector().network), _data, "requires a detector .*FCOSDetector"),
        (lambda: _module(model=fcos(4, (4, 8), 32)), _data, "has 5 classes, but the model has only 4"),
        (lambda: _module(model=fcos(1, (4, 8), 32)), _data, "class 0 is the background"),
        (_module, lambda: SyntheticSegmentationDataModule(train_size=50), "data module that returns boxes"),
    ],
)
def test_invalid_settings(module, data, message: str, trainer) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(num_sanity_val_steps=0).fit(module(), data())


def test_unsupported_commands_and_settings(trainer) -> None:
    module = _distill()
    with pytest.raises(ValueError, match=r"outputs for Detection are too large .*; remove teacher_cache.versions"):
        trainer(callbacks=[TeacherCache(versions=1)]).fit(module, _data())
    with pytest.raises(ValueError, match="does not support the task Detection, which does not define choice, tally"):
        check_comparable(module.task)
    with pytest.raises(ValueError, match="KNN supports classification only, but the task is Detection"):
        check_is_classification(module, "KNN")
    with pytest.raises(ValueError, match="Detection supports neither mixing nor several views"):
        module.read(BATCH._replace(mixed=Mixed.none(torch.zeros(2, dtype=torch.int64))))
    for setting in ("extra", "mix", "views"):  # DeepInversion is an `extra`
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{setting}'"):
            _data(**{setting: None})


def test_missing_metrics_name_the_extra(monkeypatch) -> None:
    monkeypatch.setattr("lkd.tasks.average_precision.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-kd\[detection\]'"):
        _module()
