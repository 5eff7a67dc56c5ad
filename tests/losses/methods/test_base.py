"""Properties of all criteria."""

from __future__ import annotations

import pytest
import torch

from lkd import Batch, Outputs
from lkd.losses import AT, CC, KD, PKT, RKD, SP, WeightedSum


def test_repr_shows_the_settings() -> None:
    assert repr(KD(temperature=2.0)) == "KD(temperature=2.0)"
    assert repr(AT()) == "AT(student_layers=('@stages',), teacher_layers=('@stages',), p=2.0)"
    assert "(soft): KD(temperature=4.0)" in repr(WeightedSum({"soft": KD()}))


def test_layers_are_summed(vectors) -> None:
    names = ["x", "y"]
    ours, theirs = (Outputs(torch.zeros(6, 2), {"x": feature, "y": feature.flip(1).exp()}) for feature in vectors)
    for make in (SP, PKT, lambda *layers: RKD(*layers, angle_weight=0.0), lambda *layers: CC(*layers, feat_dim=None)):
        batch = Batch(None, torch.zeros(6))
        both, *single = (make(layers, layers)(ours, theirs, batch) for layers in (names, ["x"], ["y"]))
        if isinstance(both, dict):
            both, *single = (terms["distance"] for terms in (both, *single))
        torch.testing.assert_close(both, sum(single))


def test_layers_are_lists() -> None:
    with pytest.raises(TypeError, match=r"student_layers must be a list of layer names, got 'layer1'; use \['"):
        AT(student_layers="layer1")
