"""Criteria that compare features before their activation."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lkd.losses import AB, OFD
from tests.parity.tools import Hyper, Values, built, layers, terms


def _ab(inputs: Values, hyper: Hyper) -> Values:
    """The fixture's features are those behind the connectors."""

    def loss(weights: str | list[float]) -> Values:
        criterion = built(AB(*layers(inputs), margin=hyper["margin"], layer_weights=weights), inputs)
        criterion.connectors = nn.ModuleList(nn.Identity() for _ in criterion.connectors)
        return terms(criterion, inputs)["loss"]

    return {"loss": loss("equal"), "loss.repdistiller": 3 / 1000 * loss("doubling")}


class _Norms(nn.Module):
    """A teacher that has the fixture's BatchNorm layers."""

    def __init__(self, inputs: Values) -> None:
        super().__init__()
        for layer in layers(inputs)[1]:
            number = layer.rpartition(".")[2]
            weight, bias = (inputs[f"teacher_bn.{number}.{kind}"] for kind in ("weight", "bias"))
            norm = nn.BatchNorm2d(len(weight)).double()
            norm.load_state_dict({**norm.state_dict(), "weight": weight, "bias": bias})
            self.add_module(f"norm{number}", norm)


def _ofd(inputs: Values, hyper: Hyper) -> Values:
    teacher = _Norms(inputs)
    criterion = OFD(*layers(inputs), teacher_norms=list(dict(teacher.named_children())))
    built(criterion, inputs, teacher=teacher)
    given = {key.removeprefix("params."): value for key, value in inputs.items() if key.startswith("params.")}
    loss = terms(criterion, inputs, **given)["loss"]
    samples = len(inputs["student_features.0"])
    return {"loss": loss, "weighted": hyper["feat_weight"] * loss, "loss.authors_sum": samples * loss}


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {"ab": _ab, "ofd": _ofd}
