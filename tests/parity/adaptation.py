"""Criteria of knowledge adaptation."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lkd.losses import KTA
from tests.parity.tools import Hyper, Values, built, layers, terms


def _terms(inputs: Values, p: float, q: float) -> Values:
    criterion = built(KTA(*layers(inputs), p=p, q=q, adaptation_weight=1.0), inputs)
    criterion.feature_adapters[0] = criterion.affinity_adapters[0] = nn.Identity()
    return terms(criterion, inputs)


def _kta(inputs: Values, hyper: Hyper) -> Values:
    """The fixture has the student's feature as it is behind the adapters; p is 2 in `kta_p2`."""
    found, squared = (_terms(inputs, p, hyper["q"]) for p in (hyper["p"], 2))
    return {"kta": found["adaptation"], "kta_p2": squared["adaptation"], "affinity": found["affinity"]}


METHODS: dict[str, Callable[[Values, Hyper], Values]] = {"kta": _kta}
