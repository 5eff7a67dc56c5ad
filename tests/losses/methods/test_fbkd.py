"""FBKD: feature-based distillation for object detectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lkd.losses import FBKD
from lkd.losses.fbkd import _NonLocal
from tests.losses import parity
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, draw, outputs

CASES = {
    "FBKD": FeatureCase(
        lambda: FBKD(*LAYERS, feature_weight=1e-3, nonlocal_weight=1e-3, reduction=[4, 2], pool=[4, 1]),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (4, 8, 8), "d": (5, 6, 4)},
    ),
}


def _fbkd(inputs: Values, hyper: Hyper) -> Values:
    """mmrazor pools twice, which equals pooling with twice the size. The single terms have the weight 1."""
    named = parity.named(inputs)
    parts = {
        "student.channel_wise_adaptation": "channel",
        "student.spatial_wise_adaptation": "spatial",
        "student.adaptation_layers": "feature",
        "student.non_local_adaptation": "nonlocal_map",
    }
    for network in ("student", "teacher"):
        block = f"{network}.{network}_non_local"
        names = {"g.conv": "values", "theta.conv": "theta", "phi.conv": "phi", "conv_out.conv": "out"}
        parts |= {f"{block}.{part}": f"{network}_block.{own}" for part, own in names.items()}
        parts |= {f"{block}.conv_out.bn.weight": f"{network}_block.gain"}
        parts |= {f"{block}.conv_out.bn.bias": f"{network}_block.bias"}
    given = {}
    for part, own in parts.items():
        prefix = f"params.{part}"
        given |= {f"levels.0.{own}{key.removeprefix(prefix)}": inputs[key] for key in inputs if key.startswith(prefix)}
    names = ("feature", "channel", "spatial", "nonlocal")

    def found(pool: int, weights: dict[str, float]) -> Values:
        settings = {"temperature": hyper["spatial_temperature"], "reduction": int(hyper["reduction"]), "pool": pool}
        criterion = FBKD(*parity.layers(named), **{f"{name}_weight": weights[name] for name in names}, **settings)
        return parity.terms(parity.built(criterion, named), named, **given)

    pool, published = int(hyper["pool"] or 1), {name: hyper[f"{name}_weight"] for name in names}
    one = dict.fromkeys(names, 1.0)
    return {
        **found(pool, one),
        "loss": found(pool, published)["loss"],
        "loss.mmrazor": found(2 * pool, published)["loss"],
        "nonlocal.mmrazor": found(2 * pool, one)["nonlocal"],
    }


PARITY = {"fbkd": _fbkd}


@pytest.mark.parametrize(("size", "pool"), [(1.0, 2), (1e3, 1), (1e-3, 8)])
def test_non_local_block_by_the_formula(size: float, pool: int) -> None:
    """This also holds for large products, because they are scaled before the normalization."""
    torch.manual_seed(0)
    block = _NonLocal(4, 2, pool).double()
    nn.init.normal_(block.gain)
    feature = size * draw(2, 4, 6, 4)
    phi, values = (F.max_pool2d(part(feature), (min(pool, 6), min(pool, 4))) for part in (block.phi, block.values))
    theta, phi, values = (part.flatten(2) for part in (block.theta(feature), phi, values))
    mixed = torch.einsum("bcp,bcq,bdq->bdp", theta, phi, values) / phi.shape[2]
    normalized = F.batch_norm(block.out(mixed.view(2, 2, 6, 4)), None, None, block.gain, block.bias, training=True)
    torch.testing.assert_close(block(feature), feature + normalized)


def test_fbkd_settings_per_layer() -> None:
    student, teacher = outputs(a=draw(2, 4, 4, 6), b=draw(2, 8, 2, 3)), outputs(c=draw(2, 8, 4, 6))
    pair = outputs(c=draw(2, 8, 4, 6), d=draw(2, 4, 2, 3))
    criterion = built(FBKD(["a", "b"], ["c", "d"], reduction=[4, 2], pool=3), student, pair)
    blocks = [block for level in criterion.levels for block in (level.student_block, level.teacher_block)]
    assert [block.theta.out_channels for block in blocks] == [1, 2, 4, 2]
    assert [block.pool for block in blocks] == [3] * 4
    with pytest.raises(ValueError, match="FBKD compares 1 layers but has 2 values of pool; set one for each"):
        built(FBKD(["a"], ["c"], pool=[1, 2]), student, teacher)


def test_block_is_initialized_as_the_identity() -> None:
    feature = draw(2, 4, 4, 6)
    assert torch.equal(_NonLocal(4, 2, 2).double()(feature), feature)


def test_invalid_layers() -> None:
    student, teacher = outputs(a=draw(2, 8, 4, 4)), outputs(p=draw(2, 6))
    with pytest.raises(ValueError, match=r"FBKD reads feature maps .*, but the teacher layer returns \(2, 6\)"):
        built(FBKD(["a"], ["p"]), student, teacher)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": 0}, "pool must be at least 1, got 0"),
        ({"reduction": [2, 0]}, r"reduction must be at least 1, got \[2, 0\]"),
    ],
)
def test_invalid_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FBKD(**settings)
