"""Criteria that compare how features change from layer to layer, and those of one layer's channels and factors."""

from lkd.losses import FSP, FT, ICKD, KDSVD
from tests.losses.cases.base import FeatureCase

LAYERS = (["a", "b"], ["c", "d"])
STUDENT = {"a": (4, 8, 8), "b": (6, 4, 4)}
EQUAL = {"c": (4, 8, 8), "d": (6, 4, 4)}
OTHER = {"c": (5, 4, 4), "d": (7, 8, 6)}

CASES = {
    "FSP": FeatureCase(lambda: FSP(*LAYERS), student=STUDENT, teacher=EQUAL, zero_at_equality=True, batch_mean=True),
    "FSP-mean": FeatureCase(
        lambda: FSP(*LAYERS, pooling="mean", reduction="mean", connect=True),
        student=STUDENT,
        teacher=OTHER,
        batch_mean=True,
    ),
    "KDSVD": FeatureCase(
        lambda: KDSVD(*LAYERS), student=STUDENT, teacher=EQUAL, zero_at_equality=True, batch_mean=True
    ),
    "KDSVD-vectors": FeatureCase(
        lambda: KDSVD(*LAYERS, num_vectors=3, connect=True), student=STUDENT, teacher=OTHER, batch_mean=True
    ),
    "FT": FeatureCase(lambda: FT(*LAYERS), student=STUDENT, teacher=EQUAL, batch_mean=True),
    "FT-sizes": FeatureCase(
        lambda: FT(["b"], ["d"], p=2.0, paraphrase_rate=0.1),
        student={"b": (6, 4, 4)},
        teacher={"d": (7, 8, 6)},
        batch_mean=True,
    ),
    "ICKD": FeatureCase(lambda: ICKD(*LAYERS), student=STUDENT, teacher=OTHER, batch_mean=True),
}
