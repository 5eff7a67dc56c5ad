"""Criteria that compare features before their activation."""

from torch import nn

from lkd.losses import AB, OFD
from tests.losses.cases.base import FeatureCase

LAYERS = (["a", "b"], ["c", "d"])


def _norms() -> nn.Module:
    """A teacher with the BatchNorm layers n and m."""
    network = nn.Module()
    network.n, network.m = nn.BatchNorm2d(5), nn.BatchNorm2d(7)
    nn.init.constant_(network.m.bias, -1.0)
    return network


CASES = {
    "AB": FeatureCase(
        lambda: AB(*LAYERS),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 8, 8), "d": (7, 4, 4)},
        batch_mean=True,
    ),
    "AB-sizes": FeatureCase(
        lambda: AB(*LAYERS, margin=2.0, layer_weights=[0.5, 2.0]),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (4, 4, 4), "d": (6, 8, 6)},
        batch_mean=True,
    ),
    "OFD": FeatureCase(
        lambda: OFD(*LAYERS, teacher_norms=["n", "m"]),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 8, 8), "d": (7, 4, 4)},
        teacher_network=_norms,
        batch_mean=True,
    ),
    "OFD-sizes": FeatureCase(
        lambda: OFD(*LAYERS, teacher_norms=["n", "m"], layer_weights="equal"),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 4, 4), "d": (7, 8, 6)},
        teacher_network=_norms,
        batch_mean=True,
    ),
}
