import pytest
import torch
from torch.utils.data import DistributedSampler

from lkd.datamodules import EpochSampler, Key, permutation
from lkd.datamodules.sampler import read_keys


def positions(keys):
    return read_keys(list(keys))[1].tolist()


def samplers(size, processes, **kwargs):
    return [EpochSampler(range(size), processes, rank, **kwargs) for rank in range(processes)]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_one_order(processes):
    size, seed, epoch = 20, 5, 3
    ranks = samplers(size, processes, seed=seed)
    for sampler in ranks:
        sampler.set_epoch(epoch)
    shares = [list(sampler) for sampler in ranks]
    assert {len(share) for share in shares} == {len(ranks[0])}
    interleaved = [key for turn in zip(*shares, strict=True) for key in turn]  # as one process
    order = permutation(seed, epoch, size).tolist()
    assert interleaved == [Key(epoch, order[i % size], False) for i in range(len(interleaved))]


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 11])
def test_evaluation_includes_every_sample_once(processes):
    shares = [list(sampler) for sampler in samplers(8, processes, shuffle=False)]
    assert {len(share) for share in shares} == {-(-8 // processes)}
    read = read_keys([key for share in shares for key in share])
    counted = sorted(read[1, read[2] == 0].tolist())
    assert counted == list(range(8))
    assert all(0 <= position < 8 for position in read[1].tolist())


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_unpadded_shares_contain_every_sample_once(processes):
    shares = [list(sampler) for sampler in samplers(8, processes, shuffle=False, padded=False)]
    assert [len(share) for share in shares] == [len(sampler) for sampler in samplers(8, processes, padded=False)]
    assert sorted(position for share in shares for position in positions(share)) == list(range(8))


def test_order_differs_by_epoch_and_seed():
    orders = set()
    for seed in range(4):
        sampler = EpochSampler(range(30), seed=seed)
        for epoch in range(4):
            sampler.set_epoch(epoch)
            orders.add(tuple(positions(sampler)))
            assert set(read_keys(list(sampler))[0].tolist()) == {epoch}
    assert len(orders) == 16


def test_sampler_is_a_distributed_sampler():
    assert isinstance(EpochSampler(range(3)), DistributedSampler)


def test_more_processes_than_samples():
    shares = [list(sampler) for sampler in samplers(2, 5, seed=1)]
    assert [len(share) for share in shares] == [1] * 5
    assert torch.equal(read_keys([share[0] for share in shares])[1], permutation(1, 0, 2)[torch.arange(5) % 2])


def test_key_contains_epoch_index_and_padding():
    keys = [Key(0, 7), Key(3, 0), Key(2**22 - 1, 2**39 - 1, True), 5]
    assert read_keys(keys).T.tolist() == [[0, 7, 0], [3, 0, 0], [2**22 - 1, 2**39 - 1, 1], [0, 5, 0]]
