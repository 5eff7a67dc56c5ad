"""MGD: masked generative distillation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lkd import Batch
from lkd.losses import MGD
from tests.losses import parity
from tests.losses.cases import FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, draw, output_pair

BATCH = Batch(None, torch.zeros(4, dtype=torch.int64))

CASES = {
    "MGD": FeatureCase(
        lambda: MGD(["a", "b"], ["c", "d"], mask_ratio=0.5),
        student={"a": (4, 4, 4), "b": (6, 8, 8)},
        teacher={"c": (4, 4, 4), "d": (5, 4, 4)},
    ),
    "MGD-pixels": FeatureCase(
        lambda: MGD(["a", "b"], ["c", "d"], mask_ratio=0.5, mask="pixels"),
        student={"a": (4, 4, 4), "b": (6, 8, 8)},
        teacher={"c": (4, 4, 4), "d": (5, 4, 4)},
    ),
    "MGD-unmasked": FeatureCase(
        lambda: MGD(["a"], ["c"], mask_ratio=0.0), student={"a": (4, 4, 4)}, teacher={"c": (5, 8, 8)}, batch_mean=True
    ),
}


def _mgd_dense(inputs: Values, hyper: Hyper) -> Values:
    """The fixture contains the random numbers of the mask."""
    named = parity.named(inputs)
    criterion = parity.built(MGD(*parity.layers(named), mask_ratio=hyper["mask_ratio"], mask="pixels"), named)
    criterion.uniform = lambda feature: inputs["uniform"]
    given = parity.parameters(inputs, align="aligners.0", generation="generators.0")
    loss = parity.terms(criterion, named, **given)["loss"]
    return {"loss": loss, "weighted": hyper["alpha"] * loss, "loss.mmrazor": loss}


def _mgd(inputs: Values, hyper: Hyper) -> Values:
    """The fixture contains the random numbers of the mask, and no `align` if the channels are equal."""
    criterion = parity.built(MGD(*parity.layers(inputs), mask_ratio=hyper["lambda_"]), inputs)
    criterion.uniform = lambda feature: inputs["uniform"]
    names = {"align": "aligners.0", "generation": "generators.0"}
    given = {}
    for key in inputs:
        kind, _, name = key.partition(".")
        if kind == "params":
            part, _, rest = name.partition(".")
            given[f"{names[part]}.{rest}"] = inputs[key]
    loss = parity.terms(criterion, inputs, **given)["loss"]
    return {"loss": loss, "weighted": hyper["alpha"] * loss}


PARITY = {"mgd": _mgd, "mgd_dense": _mgd_dense}


def test_mgd_draws_new_channel_masks_each_step() -> None:
    student, teacher = output_pair(draw(64, 20, 2, 2), draw(64, 20, 2, 2, seed=1))
    criterion = built(MGD(["a"], ["c"], mask_ratio=0.25), student, teacher)
    seen: list[Tensor] = []
    criterion.generators[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for _ in range(2):
        criterion(student, teacher, BATCH)
    masked = [(feature == 0).flatten(2) for feature in seen]
    assert all(torch.equal(mask.any(2), mask.all(2)) for mask in masked)
    assert masked[0].double().mean().item() == pytest.approx(0.25, abs=0.05)
    assert not torch.equal(*masked)


def test_mgd_masks_whole_pixels() -> None:
    student, teacher = output_pair(draw(8, 5, 20, 20), draw(8, 5, 20, 20, seed=1))
    criterion = built(MGD(["a"], ["c"], mask_ratio=0.65, mask="pixels"), student, teacher)
    seen: list[Tensor] = []
    criterion.generators[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    criterion(student, teacher, BATCH)
    masked = seen[0] == 0
    assert torch.equal(masked.any(1), masked.all(1))
    assert masked.double().mean().item() == pytest.approx(0.65, abs=0.03)


def test_invalid_layers() -> None:
    form = draw(4, 6)
    with pytest.raises(ValueError, match=r"MGD reads .*, but the student layer returns .*; use another"):
        built(MGD(["a"], ["c"]), *output_pair(form, form))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio must be at least 0 and less than 1, got 1.0"),
        ({"mask": "rows"}, "mask must be 'channels' or 'pixels', got 'rows'"),
    ],
)
def test_invalid_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MGD(**settings)
