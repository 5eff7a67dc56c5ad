"""Layer weights of criteria with one connector per layer."""

from __future__ import annotations

import pytest
import torch

from lkd import Batch
from lkd.losses import AB, OFD
from lkd.models import resnet8
from tests.losses.tools import alike


@pytest.mark.parametrize("kind", [AB, OFD])
def test_layer_weights(kind: type[AB | OFD]) -> None:
    network, values = resnet8(num_classes=5), {}
    for weights in ("equal", "doubling", [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]):
        torch.manual_seed(0)
        criterion, outputs = alike(kind(layer_weights=weights), network)
        values[str(weights)] = criterion(outputs, outputs, Batch(None, torch.zeros(4)))
    equal, doubling, *single = values.values()
    torch.testing.assert_close(equal, sum(single, torch.zeros(())))
    torch.testing.assert_close(doubling, single[0] / 4 + single[1] / 2 + single[2])
