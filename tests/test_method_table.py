"""Each method has a config, a paper, a text in the documentation, and a row in the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lkd.cli.config_files import configs_folder
from tests.method_table import TRAINED, configs, equal, methods, paper, table

ROOT = Path(__file__).parent.parent


DENSE = {"CrossKD", "FBKD", "FGD", "LD", "PKD"}
"""Methods for detectors, which have no overlay in configs/methods/."""


def test_every_method_has_a_row_and_a_text() -> None:
    texts = yaml.safe_load((ROOT / "docs/methods.yaml").read_text())
    assert set(texts) == set(methods())
    assert all(text["title"] and len(text["idea"]) > 80 for text in texts.values())
    rows = [line for line in table().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == sorted(methods(), key=str.lower)


@pytest.mark.parametrize("name", methods())
def test_every_method_has_config_and_paper(name: str) -> None:
    assert name in DENSE or configs(name), f"no file in configs/ names {name}"
    assert paper(methods()[name])


def test_comparison_with_the_original() -> None:
    compared = ["TTM", "WTTM", "RLD", "CSKD", "OFAKD", "LogitMSE", "DeiT", "SimKDModule", "DOTModule", "KD"]
    assert all(equal(name).startswith("value and gradient") for name in compared)
    assert equal("BYOT") == equal("MutualModule") == "no reference values"
    for path in TRAINED.values():
        assert "def test_module_equals_a_plain_loop(" in (ROOT / path).read_text()


OVERLAYS = {path.stem: path for path in (configs_folder() / "methods").glob("*.yaml")}
NO_PUBLISHED_WEIGHTS = {"backbone_kd", "kta", "noisy_student", "transfer_set", "unlabelled"}
"""Overlays without published weights for classification, or without weights."""
PUBLISHED = {  # from the authors' configuration files, or torchdistill's if there are none
    "cwd": ({"temperature": 4.0}, 3.0),
    "dist_plus": ({"beta": 2.0, "gamma": 2.0, "channel_weight": 1.0, "spatial_weight": 1.0}, 2.0),
    "ema_teacher_imagenet": ({"temperature": 1.0}, 10.0),
    "fitnet_segmentation": ({"regressor": "conv"}, 10.0),
    "mgd_segmentation": ({"mask": "pixels", "mask_ratio": 0.75}, 2e-5),
    "nkd": ({"gamma": 3.5, "temperature": 3.0}, 1.0),
    "nkd_imagenet": ({"gamma": 1.5, "temperature": 1.0}, 1.0),
    "rld": ({"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "confidence_temperature": 4.0}, 1.0),
    "rld_imagenet": ({"alpha": 1.0, "beta": 0.5, "temperature": 1.0, "confidence_temperature": 1.0}, 1.0),
    "uskd": ({"alpha": 0.1, "beta": 0.1, "mu": 0.1}, 1.0),
    "uskd_imagenet": ({"alpha": 1.0, "beta": 0.1, "mu": 0.005}, 1.0),
}


@pytest.mark.parametrize("name", sorted(OVERLAYS.keys() - NO_PUBLISHED_WEIGHTS))
def test_overlays_name_the_data_of_their_weights(name: str) -> None:
    comment = [line for line in OVERLAYS[name].read_text().splitlines() if line.startswith("#")]
    assert any(data in " ".join(comment) for data in ("CIFAR", "ImageNet", "Cityscapes"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_the_published_ones(name: str) -> None:
    model: dict[str, Any] = yaml.safe_load(OVERLAYS[name].read_text())["model"]["init_args"]
    settings, weight = PUBLISHED[name]
    assert model["criterion"]["init_args"].items() >= settings.items()
    assert (model["distill_weight"], model["hard_weight"]) == (weight, 1.0)
