"""Module names of earlier versions, which saved configs and checkpoints contain, still load."""

from __future__ import annotations

import importlib
import warnings

import pytest
from jsonargparse import ArgumentParser

import lkd.losses
from lkd._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_former_modules_lead_to_the_new_ones(old: str) -> None:
    former = importlib.import_module(old)
    for new in MOVED[old]:
        module = importlib.import_module(new)
        for name, value in vars(module).items():
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
                with pytest.warns(DeprecationWarning, match=f"import {name} from {new}"):
                    assert getattr(former, name) is value


def test_former_modules_are_attributes_of_their_package() -> None:
    with pytest.warns(DeprecationWarning, match="import FeatureTaps from lkd.features.extractor"):
        assert lkd.taps.FeatureTaps is lkd.FeatureTaps


def test_a_config_may_name_a_former_module() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--criterion", type=lkd.losses.DistillLoss)
    settings = {"class_path": "lkd.losses.logit_target.DKD", "init_args": {"beta": 2.0}}
    with pytest.warns(DeprecationWarning, match=r"import DKD from lkd\.losses\.dkd"):
        criterion = parser.instantiate(parser.parse_object({"criterion": settings})).criterion
    assert type(criterion) is lkd.losses.DKD
    assert criterion.beta == 2


def test_other_names_are_not_found() -> None:
    former = importlib.import_module("lkd.losses.logit_target")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(former, "__file__")
        with pytest.raises(AttributeError, match=r"module 'lkd\.losses\.logit_target' has no attribute 'KD'"):
            _ = former.KD
