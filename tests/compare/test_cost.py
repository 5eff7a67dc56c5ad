from __future__ import annotations

import torch
from torch import nn

from lkd.compare.cost import costs, resized


def test_costs() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)).eval()
    found = costs({"a": network}, torch.zeros(2, 3, 2, 2), [1, 3], seconds=0.02, rounds=2)["a"]
    assert found.parameters == 12 * 5 + 5 + 5 + 5
    assert found.flops == 2 * 12 * 5
    assert found.bytes == 4 * (65 + 10 + 10) + 8  # the statistics, and the number of batches, an int64
    assert [time.batch_size for time in found.times] == [1, 3]
    assert all(time.median > 0 and time.throughput == time.batch_size / time.median for time in found.times)


def test_slower_network_takes_longer() -> None:
    small, large = nn.Linear(64, 64), nn.Sequential(*(nn.Linear(64, 64) for _ in range(60)))
    found = costs({"small": small, "large": large}, torch.zeros(1, 64), [1], seconds=0.05)
    assert found["large"].times[0].median > 3 * found["small"].times[0].median


def test_batches_are_resized() -> None:
    batch = {"tokens": torch.arange(3), "mask": (torch.ones(3, 2), "kept")}
    larger = resized(batch, 5)
    assert larger["tokens"].tolist() == [0, 1, 2, 0, 1]
    assert larger["mask"][0].shape == (5, 2)
    assert larger["mask"][1] == "kept"
    assert resized(batch, 2)["tokens"].tolist() == [0, 1]


def test_network_in_training_mode_is_not_modified() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    network[1].eval()
    # In training mode, a batch of one image would raise an error.
    costs({"a": network}, torch.randn(8, 4), [1], seconds=0.01, rounds=1)
    assert [layer.training for layer in network.modules()] == [True, True, False]
    network[1].train()
    costs({"a": network}, torch.randn(8, 4), [8], seconds=0.01, rounds=1)
    assert network[1].num_batches_tracked == 0


def test_shared_weights_are_counted_once() -> None:
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    network[1].weight = network[0].weight
    other = nn.Linear(4, 4, bias=False).double()
    found = costs({"a": network}, torch.zeros(1, 4), [1], seconds=0.01, rounds=1)
    assert found["a"].bytes == 4 * 16
    found = costs({"a": other}, torch.zeros(1, 4, dtype=torch.double), [1], seconds=0.01, rounds=1)
    assert found["a"].bytes == 8 * 16
