import pytest
import torch
from torch.utils.data import DistributedSampler

from lkd.datamodules import EpochSampler, Key, permutation


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
    dealt = [key for turn in zip(*shares, strict=True) for key in turn]  # as one process would see them
    order = permutation(seed, epoch, size).tolist()
    assert dealt == [Key(epoch, order[i % size], False) for i in range(len(dealt))]


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 11])
def test_evaluation_counts_every_sample_once(processes):
    shares = [list(sampler) for sampler in samplers(8, processes, shuffle=False)]
    assert {len(share) for share in shares} == {-(-8 // processes)}
    counted = sorted(key.position for share in shares for key in share if not key.padding)
    assert counted == list(range(8))
    assert all(0 <= key.position < 8 for share in shares for key in share)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_without_padding_every_sample_is_there_once(processes):
    shares = [list(sampler) for sampler in samplers(8, processes, shuffle=False, padded=False)]
    assert [len(share) for share in shares] == [len(sampler) for sampler in samplers(8, processes, padded=False)]
    assert sorted(key.position for share in shares for key in share) == list(range(8))


def test_order_differs_by_epoch_and_seed():
    orders = set()
    for seed in range(4):
        sampler = EpochSampler(range(30), seed=seed)
        for epoch in range(4):
            sampler.set_epoch(epoch)
            orders.add(tuple(key.position for key in sampler))
            assert {key.epoch for key in sampler} == {epoch}
    assert len(orders) == 16


def test_it_is_what_lightning_leaves_alone():
    assert isinstance(EpochSampler(range(3)), DistributedSampler)


def test_more_processes_than_samples():
    shares = [list(sampler) for sampler in samplers(2, 5, seed=1)]
    assert [len(share) for share in shares] == [1] * 5
    assert torch.equal(torch.tensor([share[0].position for share in shares]), permutation(1, 0, 2)[torch.arange(5) % 2])
