"""`unit_vectors` agrees with PyTorch's `normalize`, except for zero vectors and overflow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lkd.losses._unit_vectors import unit_vectors


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("size", [1e15, 1.0, 1e-10, 1e-13])
def test_agrees_with_pytorch(size: float, p: float) -> None:
    vectors = size * torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unit_vectors(vectors, 1, p), F.normalize(vectors, p, 1))


def test_zero_vectors_have_zero_value_and_gradient() -> None:
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    found = unit_vectors(vectors, dim=1)
    (found * torch.tensor([[1.0, 2.0], [0.0, 1.0]])).sum().backward()
    assert found[0].tolist() == [0, 0]
    torch.testing.assert_close(vectors.grad, torch.tensor([[0.0, 0.0], [-0.096, 0.072]]))


def test_overflow_gives_nan() -> None:
    assert unit_vectors(torch.tensor([[1e30, 1.0]]), dim=1).isnan().all()
