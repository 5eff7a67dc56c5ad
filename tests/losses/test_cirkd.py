"""What CIRKD stores: pixels of their own class, in rings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd import Batch, Outputs, Probe
from lkd.losses import CIRKD, CIRKDChannel
from lkd.losses._memory import enqueue
from lkd.types import IGNORE_INDEX

CLASSES = 3


def _outputs(feature: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(feature), CLASSES, *feature.shape[2:]), {"a": feature})


def _built(criterion: CIRKD | CIRKDChannel, feature: Tensor) -> CIRKD | CIRKDChannel:
    probe = Probe(nn.Identity(), _outputs(feature[:1]))
    criterion.build(probe, probe)
    return criterion


def _cirkd(feature: Tensor, pixels_per_image: int = 4) -> CIRKD:
    made = CIRKD("a", "a", memory_size=(12, 3), num_keys=(6, 6), pixels_per_image=pixels_per_image)
    return _built(made, feature)


def test_pixels_are_stored_with_their_own_class() -> None:
    """Each pixel's feature names its class and its place; a class with few pixels stores just these."""
    target = torch.tensor([[[0, 0, 1, 1, 1], [0, 1, 1, 1, IGNORE_INDEX]]])
    place = torch.arange(10.0).view(1, 1, 2, 5)
    feature = torch.cat([target.unsqueeze(1) + 200.0, place, torch.ones_like(place)], dim=1)
    criterion = _cirkd(feature)
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
    criterion = _cirkd(torch.ones(1, 3, 4, 4))
    masks = torch.zeros(1, CLASSES, 16, dtype=torch.bool)
    masks[0, 1, 5:12] = True
    torch.manual_seed(0)
    found = torch.stack([criterion.draw_pixels(masks)[0, 1] for _ in range(50)])
    assert set(found.flatten().tolist()) == set(range(5, 12))


def test_a_ring_starts_again_at_its_end() -> None:
    memory, pointer = torch.zeros(2, 5, 1), torch.tensor([3, 0])
    rows = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    enqueue(memory, pointer, rows, torch.tensor([3, 2]))
    assert memory.squeeze(2).tolist() == [[0, 0, 1, 2, 3], [4, 5, 0, 0, 0]]
    assert pointer.tolist() == [0, 2]
    enqueue(memory, pointer, rows, torch.tensor([0, 3]))
    assert memory.squeeze(2).tolist() == [[0, 0, 1, 2, 3], [4, 5, 4, 5, 6]]
    assert pointer.tolist() == [0, 0]


def test_memories_change_in_training_alone() -> None:
    feature, target = torch.rand(2, 3, 8, 8), torch.randint(CLASSES, (2, 8, 8))
    channel = _built(CIRKDChannel("a", "a", memory_size=20, num_keys=5, channels_per_step=4), feature)
    for criterion in (_cirkd(feature), channel):
        before = {name: buffer.clone() for name, buffer in criterion.named_buffers() if "memory" in name}
        criterion.eval()(_outputs(feature), _outputs(feature), Batch(None, target))
        assert all(torch.equal(criterion.get_buffer(name), buffer) for name, buffer in before.items())
        criterion.train()(_outputs(feature), _outputs(feature), Batch(None, target))
        assert not any(torch.equal(criterion.get_buffer(name), buffer) for name, buffer in before.items())


def test_images_of_another_size_are_compared_with_the_same_memory() -> None:
    criterion = _built(CIRKDChannel("a", "a", memory_size=20, num_keys=5, channels_per_step=4), torch.rand(1, 3, 8, 8))
    feature = torch.rand(2, 3, 16, 12)
    terms = criterion(_outputs(feature), _outputs(feature), Batch(None, None))
    assert all(term.isfinite() for term in terms.values())
    assert criterion.memory.shape == (1, 20, 4)


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
def test_settings_of_cirkd_that_make_no_sense(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIRKD(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_size": 10}, "memory_size must be at least channels_per_step = 256, got 10"),
        ({"num_keys": 0}, "num_keys must be at least 1, got 0"),
    ],
)
def test_settings_of_channels_that_make_no_sense(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIRKDChannel(**settings)


def test_large_memories_are_reported(monkeypatch) -> None:
    monkeypatch.setattr("lkd.losses.cirkd._LARGE", 4 * CLASSES * 15 * 3 - 1)
    with pytest.warns(UserWarning, match="CIRKD keeps memories of 3 x 15 x 3 values, .* reduce memory_size"):
        _cirkd(torch.rand(1, 3, 4, 4))
