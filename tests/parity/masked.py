"""Criteria that regenerate a masked feature."""

from __future__ import annotations

from collections.abc import Callable

from lkd.losses import MGD
from tests.parity.tools import Hyper, Values, built, layers, terms


def _mgd(inputs: Values, hyper: Hyper) -> Values:
    """The fixture has the random numbers; where the channels are equal, it has no `align`."""
    criterion = built(MGD(*layers(inputs), mask_ratio=hyper["lambda_"]), inputs)
    criterion.uniform = lambda feature: inputs["uniform"]
    names = {"align": "aligners.0", "generation": "generators.0"}
    given = {}
    for key in inputs:
        kind, _, name = key.partition(".")
        if kind == "params":
            part, _, rest = name.partition(".")
            given[f"{names[part]}.{rest}"] = inputs[key]
    loss = terms(criterion, inputs, **given)["loss"]
    return {"loss": loss, "weighted": hyper["alpha"] * loss}


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {"mgd": _mgd}
