"""FT: factor transfer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lkd import Batch
from lkd.losses import FT
from tests.losses import parity
from tests.losses.cases import LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built_stages, layered, stages

STUDENT = {"a": (4, 8, 8), "b": (6, 4, 4)}

EQUAL = {"c": (4, 8, 8), "d": (6, 4, 4)}

BATCH = Batch(None, torch.zeros(3))

CASES = {
    "FT": FeatureCase(lambda: FT(*LAYERS), student=STUDENT, teacher=EQUAL, batch_mean=True),
    "FT-sizes": FeatureCase(
        lambda: FT(["b"], ["d"], p=2.0, paraphrase_rate=0.1),
        student={"b": (6, 4, 4)},
        teacher={"d": (7, 8, 6)},
        batch_mean=True,
    ),
}


def _ft(inputs: Values, hyper: Hyper) -> Values:
    """The fixture's features are the factors."""
    criterion = parity.built(FT(*parity.layers(inputs), p=hyper["p"], reconstruction_weight=0.0), inputs)
    for name in ("encoders", "decoders", "translators"):
        setattr(criterion, name, nn.ModuleList([nn.Identity()]))
    return {"loss": parity.terms(criterion, inputs)["loss"]}


PARITY = {"ft": _ft}


@pytest.mark.parametrize(("frozen", "weights"), [("factor", (1.0, 0.0)), ("reconstruction", (0.0, 1.0))])
def test_each_stage_of_ft_trains_only_its_own_part(frozen: str, weights: tuple[float, float]) -> None:
    """Weight decay does not change the other part, either."""
    ours, theirs = [feature.requires_grad_() for feature in stages(0)[:1]], stages(1)[:1]
    criterion = built_stages(FT, ours, theirs)
    criterion.reconstruction_weight, criterion.factor_weight = weights
    before = {name: parameter.detach().clone() for name, parameter in criterion.named_parameters()}
    optimizer = torch.optim.SGD([*criterion.parameters(), *ours], lr=0.1, weight_decay=0.1, momentum=0.9)
    student = ours[0].detach().clone()
    for _ in range(2):
        terms = criterion(layered(ours), layered(theirs), BATCH)
        assert frozen not in terms
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    moved = {
        name.partition(".")[0] for name, parameter in criterion.named_parameters() if not parameter.equal(before[name])
    }
    assert moved == ({"encoders", "decoders"} if frozen == "factor" else {"translators"})
    assert ours[0].equal(student) == (frozen == "factor")


def test_paraphraser_gets_no_gradient_from_the_factor_loss() -> None:
    ours, theirs = stages(0)[:1], stages(1)[:1]
    criterion = built_stages(FT, ours, theirs)
    terms = criterion(layered(ours), layered(theirs), BATCH)
    paraphraser = [*criterion.encoders.parameters(), *criterion.decoders.parameters()]
    grads = torch.autograd.grad(terms["factor"], paraphraser, allow_unused=True, retain_graph=True)
    assert all(grad is None for grad in grads)
    assert all(grad.any() for grad in torch.autograd.grad(terms["reconstruction"], paraphraser))


def test_reconstruction_does_not_depend_on_the_scale() -> None:
    """The reconstruction error is relative, because features of untrained networks are large."""
    feature = stages(2)[:1]
    torch.manual_seed(0)
    criterion = built_stages(FT, feature, feature, factor_weight=0.0)
    for decoder in criterion.decoders:
        nn.init.zeros_(decoder[-2].weight)
        nn.init.zeros_(decoder[-2].bias)
    values = [criterion(layered(feature), layered([size * feature[0]]), BATCH)["reconstruction"] for size in (1, 1e4)]
    torch.testing.assert_close(values, [torch.ones_like(value) for value in values])


def test_ft_weights() -> None:
    for weights, message in (
        ((-1.0, 1.0), "reconstruction_weight must not be negative, got -1.0"),
        ((1.0, float("inf")), "factor_weight must not be negative, got inf"),
        ((0.0, 0.0), "factor_weight are both 0"),
    ):
        with pytest.raises(ValueError, match=message):
            FT(reconstruction_weight=weights[0], factor_weight=weights[1])
    for name, value in (("paraphrase_rate", 0.0), ("p", 0.5)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            FT(**{name: value})
