from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lkd import Outputs
from tests.losses.tools import CLASSES, outputs


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Return the logits of student and teacher for eight samples of five classes."""
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(8, CLASSES, generator=generator, dtype=torch.float64) * 3 for _ in range(2))


@pytest.fixture
def target() -> Tensor:
    """Return the labels of the eight samples of `logits`."""
    return torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor]:
    """Return features of student and teacher of different sizes for six samples."""
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(6, size, generator=generator, dtype=torch.float64) for size in (5, 7))


@pytest.fixture
def heads() -> tuple[nn.Module, nn.Module]:
    """Return classifiers of student and teacher for `maps`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, CLASSES)), nn.Sequential(nn.Linear(7, CLASSES))


@pytest.fixture
def maps() -> tuple[Outputs, Outputs]:
    """Return feature maps of student (a) and teacher (c) for six samples."""
    torch.manual_seed(1)
    return outputs(a=torch.randn(6, 4, 8, 8)), outputs(c=torch.randn(6, 7, 4, 4))
