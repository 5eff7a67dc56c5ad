"""Criteria that regress the teacher's feature."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lkd.losses import PAD, SRD, VID
from tests.parity.tools import Hyper, Values, built, layers, terms


class Answer(nn.Module):
    """A layer that answers what stands in the fixture, whatever it is asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, feature: Tensor) -> Tensor:
        return self.answer


def _vid(inputs: Values, hyper: Hyper) -> Values:
    criterion = built(VID(*layers(inputs), initial_variance=hyper["init_pred_var"], eps=hyper["eps"]), inputs)
    given = {f"regressors.0.{part}.weight": inputs[f"params.regressor.{part}.weight"] for part in (0, 2, 4)}
    return terms(criterion, inputs, **given, **{"raw_variances.0": inputs["params.log_scale"]})


def _pad(inputs: Values, hyper: Hyper) -> Values:
    """The fixture has the predicted log of the variance, not the layers that predict it."""
    criterion = built(PAD(*layers(inputs), eps=hyper["eps"]), inputs)
    criterion.log_variances[0] = Answer(inputs["log_variance"])
    return terms(criterion, inputs)


def _srd(inputs: Values, hyper: Hyper) -> Values:
    """The fixture has the features as they are behind projector and BatchNorm."""
    criterion = built(SRD(*layers(inputs), exponent=hyper["exponent"], temperature=hyper["temperature"]), inputs)
    criterion.projectors[0] = criterion.teacher_norms[0] = nn.Identity()
    return terms(criterion, inputs)


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {"vid": _vid, "pad_l2": _pad, "srd": _srd}
