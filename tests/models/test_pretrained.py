"""The teacher that ships with lkd is as good as its file says."""

from __future__ import annotations

import json

import pytest
import yaml
from safetensors import safe_open

from lkd import ClassificationModule, DigitsDataModule
from lkd.models import load_weights, resnet8
from lkd.models.weights import PRETRAINED

FILE = PRETRAINED / "digits_resnet8.safetensors"


def test_the_record_is_true(trainer) -> None:
    with safe_open(FILE, "pt") as file:
        record = file.metadata()
    module = ClassificationModule(load_weights(resnet8(num_classes=10, in_channels=1), "lkd:digits_resnet8"))
    data = DigitsDataModule(**yaml.safe_load(record["config"])["data"]["init_args"])
    (validated,) = trainer().validate(module, data, verbose=False)
    (tested,) = trainer().test(module, data, verbose=False)
    assert validated["val/acc"] == pytest.approx(float(record["val_acc"]), abs=1e-4)
    assert tested["test/acc"] == pytest.approx(float(record["test_acc"]), abs=1e-4)
    assert json.loads(record["seed"]) == 0


def test_it_is_small() -> None:
    assert FILE.stat().st_size <= 300_000
