"""ReviewKD: knowledge review."""

from __future__ import annotations

import pytest
import torch

from lkd import functional as KF
from lkd.callbacks import Schedule
from lkd.losses import ReviewKD
from tests.losses import parity
from tests.losses.cases import FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built_stages, layered, stages

CASES = {
    "ReviewKD": FeatureCase(
        lambda: ReviewKD(["a", "b", "p"], ["c", "d", "q"]),
        student={"a": (4, 8, 8), "b": (6, 4, 4), "p": (6,)},
        teacher={"c": (5, 8, 8), "d": (7, 4, 4), "q": (7,)},
        batch_mean=True,
        min_samples=2,
    ),
    "ReviewKD-sizes": FeatureCase(
        lambda: ReviewKD(["a", "b"], ["c", "d"], max_mid_channels=3),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 6, 4), "d": (7, 3, 5)},
        batch_mean=True,
    ),
}

PARTS = {"conv1": "reduce", "conv2": "expand", "att_conv": "attention"}


def _name(parameter: str) -> str:
    """Return lkd's name of a parameter such as `abfs.0.conv1.1.weight`."""
    _, number, part, position, kind = parameter.split(".")
    own = PARTS[part] if part == "att_conv" else f"{PARTS[part]}.{position}"
    return f"fusions.{number}.{own}.{kind}"


def _reviewkd(inputs: Values, hyper: Hyper) -> Values:
    if hyper["part"] == "hcl only":
        pairs = zip(*parity.layers(inputs), strict=True)
        loss = torch.stack([KF.hcl_loss(inputs[ours], inputs[theirs]) for ours, theirs in pairs]).sum()
        return dict.fromkeys(("loss", "loss.dvlab", "loss.torchdistill"), loss)
    levels = sum(name.startswith("student_features.") for name in inputs)
    features = {f"student_features.{levels}": inputs["student_pooled"]}
    features |= {f"teacher_features.{levels}": inputs["teacher_pooled"]}
    features |= {name.replace("_preact", ""): value for name, value in inputs.items() if "_features." in name}
    given = {_name(key.removeprefix("params.")): value for key, value in inputs.items() if key.startswith("params.")}
    loss = parity.terms(parity.built(ReviewKD(*parity.layers(features)), features), features, **given)["loss"]
    warmup = Schedule("distill_weight", epochs=int(hyper["warmup_epochs"])).factor(4)  # factor of the fifth epoch
    return {"loss": loss, "weighted_epoch5": hyper["weight"] * warmup * loss}


PARITY = {"reviewkd": _reviewkd}


def test_deeper_levels_feed_the_earlier_levels() -> None:
    """The first level's output depends on all deeper levels, but not vice versa."""
    shapes = ((4, 8, 8), (6, 4, 4), (5,))
    ours, theirs = stages(4, shapes), stages(5, shapes)
    criterion = built_stages(ReviewKD, ours, theirs).eval()
    levels = criterion.levels(layered(ours), layered(theirs))
    assert [tuple(own.shape[1:]) for own, _ in levels] == [(5, 1, 1), (6, 4, 4), (4, 8, 8)]
    for feature in ours:
        feature.requires_grad_()
    deeper, reached = None, []
    for fusion, (own, other) in zip(criterion.fusions, criterion.levels(layered(ours), layered(theirs)), strict=True):
        output, deeper = fusion(own, deeper, other.shape[2:])
        assert output.shape == other.shape
        grads = torch.autograd.grad(output.square().sum(), ours, allow_unused=True, retain_graph=True)
        reached.append([grad is not None for grad in grads])
    assert reached == [[False, False, True], [False, True, True], [True, True, True]]


def test_invalid_layers() -> None:
    tokens = [torch.zeros(3, 4, 6, dtype=torch.float64)]
    with pytest.raises(ValueError, match=r"ReviewKD reads feature maps .* returns \(3, 4, 6\)"):
        built_stages(ReviewKD, tokens, tokens)
    with pytest.raises(ValueError, match="max_mid_channels must be at least 1"):
        ReviewKD(max_mid_channels=0)
