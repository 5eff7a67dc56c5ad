"""The description of the number of images in a limited evaluation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lkd.datamodules.limits import images_measured


def trainer(**settings: Any) -> Any:
    loader = DataLoader(range(100), batch_size=8)  # type: ignore[arg-type]
    defaults = {"world_size": 1, "sanity_checking": False, "val_dataloaders": loader, "test_dataloaders": [loader]}
    batches = {"num_val_batches": [3], "num_sanity_val_batches": [2], "num_test_batches": [12]}
    return SimpleNamespace(**{**defaults, **batches, **settings})


@pytest.mark.parametrize(
    ("split", "settings", "wanted"),
    [
        ("val", {}, "24 of 100 validation images"),
        ("val", {"sanity_checking": True}, "16 of 100 validation images"),
        ("val", {"world_size": 2}, "48 of 100 validation images"),  # each process evaluates the same number of batches
        ("val", {"world_size": 5}, "100 of 100 validation images"),
        ("test", {}, "96 of 100 test images"),
        ("test", {"num_test_batches": [13]}, "the test images"),
        ("val", {"num_val_batches": [float("inf")]}, "the validation images"),
        ("val", {"val_dataloaders": [1, 2], "num_val_batches": [1, 2]}, "3 batches of the validation images"),
        ("val", {"val_dataloaders": [1, 2], "num_val_batches": [1]}, "1 batch of the validation images"),
    ],
)
def test_number_of_evaluated_images(split: Any, settings: dict[str, Any], wanted: str) -> None:
    assert images_measured(trainer(**settings), split) == wanted
