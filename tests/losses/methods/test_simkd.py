"""SimKD: knowledge distillation with the reused teacher classifier."""

from __future__ import annotations

import pytest
import torch

from lkd import Batch
from lkd.losses import SimKD
from tests.losses import parity
from tests.losses.cases import CLASSES, FeatureCase, classifier
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, built_on_shapes

MAPS = {"student": {"a": (4, 8, 8)}, "teacher": {"c": (6, 4, 4)}}

IMAGES = 6

CASES = {
    "SimKD": FeatureCase(lambda: SimKD("a", "c"), **MAPS, teacher_network=classifier(6), batch_mean=True),
}


def _simkd(inputs: Values, hyper: Hyper) -> Values:
    (ours,), (theirs,) = parity.layers(inputs)
    criterion = parity.built(
        SimKD(ours, theirs, factor=int(hyper["factor"])), inputs, teacher=parity.classifier(inputs)
    )
    given = parity.parameters(inputs, transfer="projector")
    head = {name: tensor for name, tensor in criterion.named_parameters() if name.startswith("head.")}
    loss = parity.terms(criterion, inputs, **given, **head)["loss"]
    with torch.no_grad():
        for name, tensor in given.items():
            criterion.get_parameter(name).copy_(tensor)
        student = criterion.predict(parity.outputs(criterion, inputs)[0])
    return {"loss": loss, "prediction": student.logits, "transformed": student.features[criterion.projected_layer]}


PARITY = {"simkd": _simkd}


def _batch(samples: int = IMAGES) -> Batch:
    return Batch(None, torch.arange(samples) % CLASSES)


def test_simkd_copies_the_teachers_classifier(heads, maps) -> None:
    criterion = built(SimKD("a", "c"), *maps, heads)
    before = criterion.predict(maps[0]).logits
    with torch.no_grad():
        heads[1][0].weight.zero_()
    torch.testing.assert_close(criterion.predict(maps[0]).logits, before)
    assert {"head.weight", "head.bias"} <= set(criterion.state_dict())


def test_simkd_projects_once(heads, maps) -> None:
    """If a module returns the projection as its output, BatchNorm must not process the batch twice."""
    criterion = built(SimKD("a", "c"), *maps, heads)
    student = criterion.predict(maps[0])
    torch.testing.assert_close(criterion(student, maps[1], _batch()), criterion(*maps, _batch()))
    assert criterion.projector[1].num_batches_tracked == 2


def test_invalid_layers() -> None:
    with pytest.raises(ValueError, match="SimKD reads feature maps"):
        built_on_shapes(SimKD("a", "b"), (2, 10, 4), (2, 4, 4, 4))


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="factor must be at least 1"):
        SimKD(factor=0)
