"""Criteria that read classifiers, exits, tokens or backbones."""

from collections.abc import Callable

from torch import nn

from lkd.losses import CATKD, OFAKD, SRRL, BackboneKD, DeiT, DISTPlus, SemCKD, SimKD, ViTKD
from tests.losses.cases.base import CLASSES, SAMPLES, FeatureCase

LAYERS = (["a", "b"], ["c", "d"])
MAPS = {"student": {"a": (4, 8, 8)}, "teacher": {"c": (6, 4, 4)}}
TOKENS = {"student": {"a": (10, 4), "b": (10, 4)}, "teacher": {"c": (10, 6), "d": (10, 6)}}


def _classifier(channels: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(channels, CLASSES))


CASES = {
    "CATKD": FeatureCase(
        lambda: CATKD("a", "c"),
        **MAPS,
        student_network=_classifier(4),
        teacher_network=_classifier(6),
        batch_mean=True,
    ),
    "CATKD-maps": FeatureCase(
        lambda: CATKD("a", "c", student_head=None, teacher_head=None, resolution=3),
        student={"a": (CLASSES, 8, 8)},
        teacher={"c": (CLASSES, 8, 8)},
        zero_at_equality=True,
        batch_mean=True,
    ),
    "SRRL": FeatureCase(lambda: SRRL("a", "c"), **MAPS, teacher_network=_classifier(6), batch_mean=True),
    "SimKD": FeatureCase(lambda: SimKD("a", "c"), **MAPS, teacher_network=_classifier(6), batch_mean=True),
    "SemCKD": FeatureCase(
        lambda: SemCKD(*LAYERS, batch_size=SAMPLES),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 8, 8), "d": (7, 2, 2)},
    ),
    "OFAKD": FeatureCase(
        lambda: OFAKD(["a", "b"], eps=1.5, temperature=2.0),
        student={"a": (4, 8, 8), "b": (8, 4, 4)},
        batch_mean=True,
        reads_target=True,
    ),
    "OFAKD-tokens": FeatureCase(lambda: OFAKD(["a", "b"]), student=TOKENS["student"], batch_mean=True),
    "DISTPlus": FeatureCase(  # with so many channels that no pixel is 0 in all: nothing correlates with a constant
        lambda: DISTPlus(["a"], ["c"]), student={"a": (16, 4, 4)}, teacher={"c": (16, 4, 4)}, zero_at_equality=True
    ),
    "DISTPlus-channels": FeatureCase(lambda: DISTPlus(["a"], ["c"]), **MAPS),
    "ViTKD": FeatureCase(lambda: ViTKD(*LAYERS, alpha=0.03, beta=0.003), **TOKENS),
    "DeiT": FeatureCase(
        lambda: DeiT("a", "b"), student={"a": (CLASSES,), "b": (CLASSES,)}, batch_mean=True, reads_target=True
    ),
    "DeiT-soft": FeatureCase(
        lambda: DeiT("a", "b", kind="soft", token_weight=0.1, label_smoothing=0.1),
        student={"a": (CLASSES,), "b": (CLASSES,)},
        batch_mean=True,
        reads_target=True,
    ),
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
