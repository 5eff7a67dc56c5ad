"""CATKD: class attention transfer based knowledge distillation."""

from __future__ import annotations

import pytest
import torch

from lkd import Batch
from lkd.losses import CATKD
from tests.losses import parity
from tests.losses.cases import CLASSES, FeatureCase, classifier
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, built_on_shapes, outputs

MAPS = {"student": {"a": (4, 8, 8)}, "teacher": {"c": (6, 4, 4)}}

IMAGES = 6

CASES = {
    "CATKD": FeatureCase(
        lambda: CATKD("a", "c"),
        **MAPS,
        student_network=classifier(4),
        teacher_network=classifier(6),
        batch_mean=True,
    ),
    "CATKD-maps": FeatureCase(
        lambda: CATKD("a", "c", student_head=None, teacher_head=None, resolution=3),
        student={"a": (CLASSES, 8, 8)},
        teacher={"c": (CLASSES, 8, 8)},
        zero_at_equality=True,
        batch_mean=True,
    ),
}


def _cat_kd(inputs: Values, hyper: Hyper) -> Values:
    (ours,), (theirs,) = parity.layers(inputs)
    settings = {"resolution": hyper["resolution"], "normalize": hyper["normalize"]}
    loss = parity.terms(parity.built(CATKD(ours, theirs, None, None, **settings), inputs), inputs)["loss"]
    return {"loss": loss, "weighted": hyper["weight"] * loss}


PARITY = {"cat_kd": _cat_kd}


def _batch(samples: int = IMAGES) -> Batch:
    return Batch(None, torch.arange(samples) % CLASSES)


def test_catkd_compares_class_activation_maps(heads, maps) -> None:
    found = built(CATKD("a", "c"), *maps, heads)(*maps, _batch())
    classes = [
        torch.stack([head[0](pixel) for pixel in outputs.features[layer].flatten(2).unbind(2)], 2).unflatten(
            2, (-1, size)
        )
        for head, outputs, layer, size in zip(heads, maps, "ac", (8, 4), strict=True)
    ]
    own = outputs(a=classes[0]), outputs(c=classes[1])
    given = built(CATKD("a", "c", student_head=None, teacher_head=None), *own)(*own, _batch())
    torch.testing.assert_close(found, given)


def test_catkd_trains_only_the_students_classifier(heads, maps) -> None:
    """This also holds if the teacher is a peer that is trained itself."""
    criterion = built(CATKD("a", "c"), *maps, heads)
    assert not list(criterion.parameters())
    criterion(*maps, _batch()).backward()
    assert heads[0][0].weight.grad.any()
    assert heads[1][0].weight.grad is None


def test_classifiers_are_not_saved_with_the_criterion(distill) -> None:
    module = distill(criterion=CATKD())
    module.build(torch.zeros(1, 3, 8, 8))
    assert not [name for name in module.criterion.state_dict() if "head" in name]
    assert not [name for name in module.state_dict() if name.startswith("teacher")]


@pytest.mark.parametrize(
    ("make", "student", "teacher", "message"),
    [
        (lambda: CATKD("a", "b"), (2, 4), (2, 4, 4, 4), "CATKD reads feature maps .* the student layer returns"),
        (
            lambda: CATKD("a", "b"),
            (2, 4, 4, 4),
            (2, 4, 4, 4),
            r"CATKD requires a student classifier .* map has 4 channels, .* Linear\(in_f",
        ),
    ],
)
def test_invalid_layers(make, student, teacher, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built_on_shapes(make(), student, teacher)


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="resolution must be at least 1, got 0"):
        CATKD(resolution=0)
