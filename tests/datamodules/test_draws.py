import pickle

import pytest
import torch

from lkd.datamodules import draws
from lkd.datamodules.draws import SPLIT, VIEW, Draws, permutation, philox, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # reference values published with Random123: kat_vectors, philox4x32 with 10 rounds
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_equals_the_published_values(counter, key, expected):
    words = philox(torch.tensor(counter), tuple(key))
    assert " ".join(f"{w:08x}" for w in words.tolist()) == expected


def test_philox_is_independent_of_the_batch():
    counter = torch.randint(2**32, (4, 3, 5), generator=torch.Generator().manual_seed(0))
    many = philox(counter, (1, 2))
    for i in range(3):
        for j in range(5):
            assert torch.equal(many[:, i, j], philox(counter[:, i, j], (1, 2)))


def test_uniform_uses_the_documented_counter():
    seed, epoch, index, stream = 2**33 + 5, 7, 2**34 + 11, 3
    words = philox(torch.tensor([11, 4, epoch, stream]), (5, 2))
    expected = (words >> 8).double() / 2**24
    assert torch.equal(uniform(seed, epoch, torch.tensor(index), stream).double(), expected)


def test_uniform_broadcasts_epochs_and_streams():
    index, epoch, stream = torch.arange(5), torch.tensor([0, 1, 0, 1, 2]), torch.arange(3)[:, None]
    drawn = uniform(9, epoch, index, stream)
    assert drawn.shape == (3, 5, 4)
    assert torch.equal(drawn[2, 3], uniform(9, 1, index[3], 2))


def test_uniform_is_uniform_and_depends_on_every_argument():
    index = torch.arange(20_000)
    drawn = uniform(0, 0, index, 0)
    assert drawn.dtype == torch.float32
    assert 0 <= drawn.min() < 1e-3
    assert 1 - 1e-3 < drawn.max() < 1
    assert torch.allclose(drawn.mean(0), torch.tensor(0.5), atol=0.01)
    assert torch.allclose(drawn.var(0), torch.tensor(1 / 12), atol=0.002)
    others = (uniform(1, 0, index, 0), uniform(0, 1, index, 0), uniform(0, 0, index + 1, 0))
    for other in (*others, uniform(0, 0, index, 1), uniform(2**32, 0, index, 0), drawn.roll(1, dims=1)):
        correlation = torch.corrcoef(torch.stack((drawn.flatten(), other.flatten())))[0, 1]
        assert abs(correlation) < 0.02


def test_scaled_draws_stay_below_the_scale():
    largest = torch.tensor(1 - 2.0**-24)  # the largest number that `uniform` can return
    n = torch.arange(1, 10_000)
    assert torch.equal((largest * n).long(), n - 1)


@pytest.mark.parametrize("size", [0, 1, 10, 2**16 + 3])
def test_permutation_contains_every_sample_once(size):
    assert torch.equal(permutation(3, 4, size).sort().values, torch.arange(size))


def test_permutation_depends_on_seed_and_epoch():
    orders = [tuple(permutation(seed, epoch, 50).tolist()) for seed in range(6) for epoch in range(6)]
    assert len(set(orders)) == 36
    assert not torch.equal(permutation(0, 0, 50), permutation(0, 0, 50, SPLIT))
    assert torch.equal(permutation(2, 3, 50), permutation(2, 3, 50))


def test_permutation_is_uniform():
    places = torch.stack([permutation(0, epoch, 100).argsort() for epoch in range(400)]).double()
    assert torch.allclose(places.mean(0), torch.tensor(49.5, dtype=torch.float64), atol=8)  # 5.5 standard deviations


def test_stored_draws_equal_computed_draws(monkeypatch):
    monkeypatch.setattr(draws, "_PIECE", 30)
    table, index = Draws(100), torch.tensor([5, 99, 0, 5, 31])
    wanted = [(0, 0, 0, 1), (0, 0, 0, 1), (3, 7, VIEW, 3), (4, 7, VIEW, 3), (3, 7, 0, 3), (3, 8, VIEW, 3)]
    for seed, epoch, first, count in wanted * 3:
        for chosen in (index, index[:2], index.flip(0)):
            epochs = torch.full_like(chosen, epoch)
            expected = torch.cat([uniform(seed, epochs, chosen, first + stream) for stream in range(count)], 1)
            assert torch.equal(table(seed, epochs, chosen, first, count), expected)
    assert len(pickle.dumps(table)) < 200


def test_draws_of_several_epochs_or_many_samples_are_computed():
    index = torch.arange(4)
    for table, epoch in ((Draws(4), torch.tensor([1, 1, 2, 1])), (Draws(2**23), torch.ones(4, dtype=torch.int64))):
        for _ in range(3):
            assert torch.equal(table(0, epoch, index, 0, 1), uniform(0, epoch, index, 0))
        assert all(made is None for _, made in table._tables.values())


def test_draws_are_stored_from_the_second_batch_on():
    table, index, epoch = Draws(9), torch.arange(4), torch.zeros(4, dtype=torch.int64)
    for expected in (None, (9, 8), (9, 8)):
        table(0, epoch, index, 0, 2)
        ((_, made),) = table._tables.values()
        assert (None if made is None else tuple(made.shape)) == expected


def test_announced_epoch_is_not_read():
    """Reading an epoch on a GPU would wait for it. Here, the epoch is on the meta device, which has no values."""
    table, epoch = Draws(9), torch.zeros(3, dtype=torch.int64, device="meta")
    table.announce(epoch, 0)
    for _ in range(2):
        assert table(0, epoch, torch.arange(3, device="meta"), 0, 1).shape == (3, 4)
    ((_, made),) = table._tables.values()
    assert made.device.type == "meta"
