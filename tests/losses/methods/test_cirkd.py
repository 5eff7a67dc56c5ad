"""CIRKD: cross-image relational distillation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd import Batch, Outputs, Probe
from lkd.losses import CIRKD, CIRKDChannel
from lkd.types import IGNORE_INDEX
from tests.losses import parity
from tests.losses.cases import SegmentationCase
from tests.losses.parity import Hyper, Values


def _cirkd(**settings: float) -> CIRKD:
    return CIRKD("a", "c", memory_size=(30, 12), num_keys=(20, 10), pixels_per_image=3, **settings)


CLASSES = 3

CASES = {
    "CIRKD": SegmentationCase(
        _cirkd,
        student={"a": (4, 4, 6)},
        teacher={"c": (6, 4, 6)},
        memories=("region_memory", "region_pointer", "pixel_pointer"),
        reads_target=True,
    ),
    "CIRKD-batch": SegmentationCase(
        lambda: CIRKD("a", "c", pixel_weight=0.0, region_weight=0.0, pool_size=2),
        student={"a": (4, 7, 6)},
        teacher={"c": (4, 7, 6)},
        zero_at_equality=True,
    ),
    "CIRKD-sizes": SegmentationCase(
        lambda: _cirkd(batch_weight=0.5, pixel_weight=0.0, kd_temperature=2.0),
        student={"a": (4, 4, 6)},
        teacher={"c": (6, 8, 4)},
        memories=("region_memory", "region_pointer"),
        reads_target=True,
    ),
}


def _cirkd_minibatch(inputs: Values, hyper: Hyper) -> Values:
    criterion = CIRKD("student", "teacher", 1.0, 0.0, 0.0, hyper["temperature"])
    return dict.fromkeys(("loss", "loss.dist_kd"), parity.layer_terms(criterion, inputs)["loss"])


class _GivenCIRKD(CIRKD):
    """CIRKD with the fixture's rows and pixels; the authors store arbitrary pixels of the image for each class."""

    given: Values

    def draw_rows(self, memory: Tensor, count: int) -> Tensor:
        return self.given["pixel_index" if memory is self.pixel_memory else "region_index"]

    def draw_pixels(self, masks: Tensor) -> Tensor:
        index = torch.zeros(*masks.shape[:2], self.pixels_per_image, dtype=torch.int64)
        for name, drawn in self.given.items():
            if name.startswith("enqueue_index."):
                image, number = map(int, name.split(".")[1:])
                index[image, number, : len(drawn)] = drawn
        return index


def _cirkd_memory(inputs: Values, hyper: Hyper) -> Values:
    """Also compare the stored features, with the pixels that the authors store in place of those that lkd draws."""
    queues = {name: inputs[f"{name}_queue"] for name in ("pixel", "region")}
    sizes = tuple(queue.shape[1] for queue in queues.values())
    stored = min(int(hyper["pixel_update_freq"]), sizes[0])
    criterion = _GivenCIRKD(
        *("student", "teacher", 0.0, 1.0, 1.0, hyper["temperature"], hyper["kd_temperature"]),
        memory_size=sizes,
        pixels_per_image=stored,
    )
    criterion.given = inputs
    classes = int(hyper["classes"])
    logits = inputs["student"].new_zeros(1, classes, 1, 1)
    given = {**parity.named(inputs), "student_logits": logits, "target": parity.masks(inputs, classes)}
    parity.built(criterion, given)
    for name, queue in queues.items():
        getattr(criterion, f"{name}_memory").copy_(queue)
        getattr(criterion, f"{name}_pointer").copy_(inputs[f"{name}_pointer"])
    values = parity.terms(criterion, given, **parity.parameters(inputs, project_head="projection_head"))
    for name in queues:
        values |= {f"{name}_queue": getattr(criterion, f"{name}_memory")}
        values |= {f"{name}_pointer": getattr(criterion, f"{name}_pointer")}
    return values


PARITY = {"cirkd_minibatch": _cirkd_minibatch, "cirkd_memory": _cirkd_memory}


def _outputs(feature: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(feature), CLASSES, *feature.shape[2:]), {"a": feature})


def _built(criterion: CIRKD | CIRKDChannel, feature: Tensor) -> CIRKD | CIRKDChannel:
    probe = Probe(nn.Identity(), _outputs(feature[:1]))
    criterion.build(probe, probe)
    return criterion


def _small(feature: Tensor, pixels_per_image: int = 4) -> CIRKD:
    made = CIRKD("a", "a", memory_size=(12, 3), num_keys=(6, 6), pixels_per_image=pixels_per_image)
    return _built(made, feature)


def test_pixels_are_stored_with_their_own_class() -> None:
    """Each pixel's feature encodes its class and its position; a class with few pixels stores only these."""
    target = torch.tensor([[[0, 0, 1, 1, 1], [0, 1, 1, 1, IGNORE_INDEX]]])
    place = torch.arange(10.0).view(1, 1, 2, 5)
    feature = torch.cat([target.unsqueeze(1) + 200.0, place, torch.ones_like(place)], dim=1)
    criterion = _small(feature)
    before = criterion.pixel_memory.clone()
    criterion(_outputs(feature), _outputs(feature), Batch(None, target))
    assert criterion.pixel_pointer.tolist() == [3, 4, 0]
    assert criterion.region_pointer.tolist() == [1, 1, 0]
    assert torch.equal(criterion.pixel_memory[0, 3:], before[0, 3:])
    assert torch.equal(criterion.pixel_memory[2], before[2])
    stored = criterion.pixel_memory / criterion.pixel_memory[:, :, 2:]
    for number, count in ((0, 3), (1, 4)):
        assert torch.allclose(stored[number, :count, 0], torch.tensor(200.0 + number), rtol=1e-4)
        places = stored[number, :count, 1].round().long()
        assert len(set(places.tolist())) == count
        assert (target.flatten()[places] == number).all()
    units = F.normalize(feature, dim=1).flatten(2)[0]
    expected = F.normalize(units[:, target.flatten() == 1].mean(1), dim=0)
    torch.testing.assert_close(criterion.region_memory[1, 0], expected)


def test_all_pixels_of_a_class_can_be_drawn() -> None:
    criterion = _small(torch.ones(1, 3, 4, 4))
    masks = torch.zeros(1, CLASSES, 16, dtype=torch.bool)
    masks[0, 1, 5:12] = True
    torch.manual_seed(0)
    found = torch.stack([criterion.draw_pixels(masks)[0, 1] for _ in range(50)])
    assert set(found.flatten().tolist()) == set(range(5, 12))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_weight": 0.0, "pixel_weight": 0.0, "region_weight": 0.0}, "are all 0"),
        ({"memory_size": (10, 5)}, "memory_size must be at least"),
        ({"num_keys": (0, 5)}, r"num_keys at least \(1, 1\), got \(20000, 2000\) and \(0, 5\)"),
        ({"pixels_per_image": 0}, "pixels_per_image must be at least 1, got 0"),
        ({"pool_size": 0}, "pool_size must be at least 1, got 0"),
    ],
)
def test_invalid_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIRKD(**settings)


def test_large_memories_are_reported(monkeypatch) -> None:
    monkeypatch.setattr("lkd.losses.cirkd._LARGE", 4 * CLASSES * 15 * 3 - 1)
    with pytest.warns(UserWarning, match="CIRKD keeps memories of 3 x 15 x 3 values, .* reduce memory_size"):
        _small(torch.rand(1, 3, 4, 4))


def test_memories_change_only_in_training() -> None:
    feature, target = torch.rand(2, 3, 8, 8), torch.randint(CLASSES, (2, 8, 8))
    criterion = _small(feature)
    before = {name: buffer.clone() for name, buffer in criterion.named_buffers() if "memory" in name}
    criterion.eval()(_outputs(feature), _outputs(feature), Batch(None, target))
    assert all(torch.equal(criterion.get_buffer(name), buffer) for name, buffer in before.items())
    criterion.train()(_outputs(feature), _outputs(feature), Batch(None, target))
    assert not any(torch.equal(criterion.get_buffer(name), buffer) for name, buffer in before.items())
