"""The pretrained teachers reach the metrics that their files record."""

from __future__ import annotations

import json

import pytest
import yaml
from safetensors import safe_open

from lkd import ClassificationModule, DigitsDataModule, SyntheticSegmentationDataModule
from lkd.models import UNet, load_weights, resnet8
from lkd.models.weights import PRETRAINED
from lkd.tasks import SemanticSegmentation

TEACHERS = {
    "digits_resnet8": (lambda: resnet8(num_classes=10, in_channels=1), None, DigitsDataModule),
    "shapes_unet": (lambda: UNet((12, 24, 36), 5), SemanticSegmentation(5), SyntheticSegmentationDataModule),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_recorded_metrics(name: str, trainer) -> None:
    network, task, data_module = TEACHERS[name]
    with safe_open(PRETRAINED / f"{name}.safetensors", "pt") as file:
        record = file.metadata()
    module = ClassificationModule(load_weights(network(), f"lkd:{name}"), task=task)
    data, metric = data_module(**yaml.safe_load(record["config"])["data"]["init_args"]), module.task.metric
    (validated,) = trainer().validate(module, data, verbose=False)
    (tested,) = trainer().test(module, data, verbose=False)
    assert validated[f"val/{metric}"] == pytest.approx(float(record[f"val_{metric}"]), abs=1e-4)
    assert tested[f"test/{metric}"] == pytest.approx(float(record[f"test_{metric}"]), abs=1e-4)
    assert json.loads(record["seed"]) == 0


def test_file_sizes() -> None:
    assert {path.stem for path in PRETRAINED.glob("*.safetensors")} == set(TEACHERS)
    assert all(path.stat().st_size <= 300_000 for path in PRETRAINED.glob("*.safetensors"))
