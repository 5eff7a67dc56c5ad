"""CIRKDChannel: channel relations of CIRKDV2."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lkd import Batch, Outputs, Probe
from lkd.losses import CIRKD, CIRKDChannel
from tests.losses import parity
from tests.losses.cases import SegmentationCase
from tests.losses.parity import Hyper, Values

CLASSES = 3

CASES = {
    "CIRKDChannel": SegmentationCase(
        lambda: CIRKDChannel("a", "c", memory_size=60, num_keys=20, channels_per_step=12),
        student={"a": (4, 8, 8)},
        teacher={"c": (5, 8, 8)},
    ),
    "CIRKDChannel-sizes": SegmentationCase(
        lambda: CIRKDChannel("a", "c", memory_size=60, num_keys=20, channels_per_step=12, pool_size=2),
        student={"a": (4, 7, 8)},
        teacher={"c": (5, 4, 10)},
    ),
}


class _GivenChannel(CIRKDChannel):
    """CIRKDChannel with the fixture's channels and rows."""

    given: Values

    def draw_rows(self) -> Tensor:
        return self.given["channel_index"]

    def draw_channels(self, num_channels: int) -> Tensor:
        return self.given["enqueue_index"]


def _cirkd_channel(inputs: Values, hyper: Hyper) -> Values:
    queue = inputs["channel_queue"]
    settings = {"temperature": hyper["temperature"], "kd_temperature": hyper["kd_temperature"]}
    criterion = _GivenChannel(
        *("student", "teacher", 1.0, 1.0, 1.0),
        **settings,
        memory_size=len(queue),
        channels_per_step=len(inputs["enqueue_index"]),
    )
    criterion.given = inputs
    features = parity.named(inputs)
    parity.built(criterion, features).memory[0] = queue
    criterion.pointer.copy_(inputs["channel_pointer"])
    parts = parity.terms(criterion, features, **parity.parameters(inputs, project_head="projection_head"))
    queues = {"channel_queue": criterion.memory[0], "channel_pointer": criterion.pointer}
    return {"loss": parts["batch"], "memory": parts["memory"], "mse": parts["mse"], **queues}


PARITY = {"cirkdv2_channel": _cirkd_channel}


def _outputs(feature: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(feature), CLASSES, *feature.shape[2:]), {"a": feature})


def _built(criterion: CIRKD | CIRKDChannel, feature: Tensor) -> CIRKD | CIRKDChannel:
    probe = Probe(nn.Identity(), _outputs(feature[:1]))
    criterion.build(probe, probe)
    return criterion


def test_images_of_different_sizes_share_a_memory() -> None:
    criterion = _built(CIRKDChannel("a", "a", memory_size=20, num_keys=5, channels_per_step=4), torch.rand(1, 3, 8, 8))
    feature = torch.rand(2, 3, 16, 12)
    terms = criterion(_outputs(feature), _outputs(feature), Batch(None, None))
    assert all(term.isfinite() for term in terms.values())
    assert criterion.memory.shape == (1, 20, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_size": 10}, "memory_size must be at least channels_per_step = 256, got 10"),
        ({"num_keys": 0}, "num_keys must be at least 1, got 0"),
    ],
)
def test_invalid_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIRKDChannel(**settings)


def test_memories_change_only_in_training() -> None:
    feature, target = torch.rand(2, 3, 8, 8), torch.randint(CLASSES, (2, 8, 8))
    criterion = _built(CIRKDChannel("a", "a", memory_size=20, num_keys=5, channels_per_step=4), feature)
    before = {name: buffer.clone() for name, buffer in criterion.named_buffers() if "memory" in name}
    criterion.eval()(_outputs(feature), _outputs(feature), Batch(None, target))
    assert all(torch.equal(criterion.get_buffer(name), buffer) for name, buffer in before.items())
    criterion.train()(_outputs(feature), _outputs(feature), Batch(None, target))
    assert not any(torch.equal(criterion.get_buffer(name), buffer) for name, buffer in before.items())
