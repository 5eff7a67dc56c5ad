"""BackboneKD: feature distillation from a foundation model (AM-RADIO)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lkd import Batch
from lkd.losses import BackboneKD
from tests.losses.cases import CLASSES, FeatureCase
from tests.losses.tools import built, built_on_shapes, outputs

IMAGES = 6

CASES = {
    "BackboneKD": FeatureCase(
        lambda: BackboneKD("a", "c", "b", "d"),
        student={"a": (4,), "b": (6, 4, 4)},
        teacher={"c": (5,), "d": (10, 7)},
        batch_mean=True,
    ),
    "BackboneKD-output": FeatureCase(
        lambda: BackboneKD("a", teacher_pooled_layer=None, patch_weight=0.0), student={"a": (4,)}, batch_mean=True
    ),
}


def _batch(samples: int = IMAGES) -> Batch:
    return Batch(None, torch.arange(samples) % CLASSES)


def test_backbonekd_treats_maps_and_tokens_equally() -> None:
    torch.manual_seed(0)
    feature, pooled = torch.randn(IMAGES, 6, 4, 4), torch.randn(IMAGES, 6)
    student = outputs(p=torch.randn(IMAGES, 3), m=torch.randn(IMAGES, 4, 8, 8))
    tokens = torch.cat([torch.randn(IMAGES, 5, 6), feature.flatten(2).mT], 1)
    found = []
    for given in (feature, tokens):
        torch.manual_seed(1)
        criterion = BackboneKD("p", "q", "m", "n", teacher_prefix_tokens=5)
        teacher = outputs(q=pooled, n=given)
        found.append(built(criterion, student, teacher)(student, teacher, _batch()))
    torch.testing.assert_close(*found)
    projected = criterion.patch_projection(F.avg_pool2d(student.features["m"], 2))
    cosine = 1 - F.cosine_similarity(projected, feature, dim=1).mean()
    torch.testing.assert_close(found[0]["patches"], 0.9 * cosine + 0.1 * F.smooth_l1_loss(projected, feature))
    cosine = 1 - F.cosine_similarity(criterion.pooled_projection(student.features["p"]), pooled, dim=1)
    torch.testing.assert_close(found[0]["pooled"], cosine.mean())


def test_backbonekd_with_a_teacher_without_classifier(distill, data, trainer) -> None:
    """The teacher outputs its pooled feature, so its number of classes is not checked, and no labels are required."""
    import timm

    teacher = timm.create_model("test_vit", num_classes=0, img_size=8, patch_size=2)
    criterion = BackboneKD(teacher_pooled_layer=None)
    module = distill(teacher=teacher, criterion=criterion, distill_weight=1.0, hard_weight=0.0)
    trainer(max_epochs=1).fit(module, data)
    assert criterion.pooled_projection.out_features == 64
    assert {"train/backbonekd_pooled", "train/backbonekd_patches"} <= set(module.trainer.callback_metrics)


@pytest.mark.parametrize(
    ("make", "student", "teacher", "message"),
    [
        (lambda: BackboneKD("a", "b", patch_weight=0), (2, 4), (2, 10, 4), r"pooled .* \(2, 10, 4\) .* null"),
        (lambda: BackboneKD("a", "b", "a", "b", 0), (2, 4), (2, 4, 4, 4), "BackboneKD reads feature maps"),
    ],
)
def test_invalid_layers(make, student, teacher, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built_on_shapes(make(), student, teacher)


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="pooled_weight and patch_weight are both 0"):
        BackboneKD(pooled_weight=0, patch_weight=0)
