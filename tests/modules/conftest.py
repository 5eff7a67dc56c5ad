from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
import torch
from torch import Tensor


@pytest.fixture
def resume(data, trainer, tmp_path) -> Callable[..., None]:
    """Return a check that resuming after two of four epochs reproduces every saved tensor of an uninterrupted run."""

    def check(make: Callable[[], L.LightningModule]) -> dict[str, Tensor]:
        whole, first, second = make(), make(), make()
        torch.manual_seed(0)  # `fit` creates the adapters
        trainer(max_epochs=4, num_sanity_val_steps=0).fit(whole, data)
        torch.manual_seed(0)
        engine = trainer(max_epochs=2, num_sanity_val_steps=0)
        engine.fit(first, data)
        engine.save_checkpoint(tmp_path / "half.ckpt")
        trainer(max_epochs=4, num_sanity_val_steps=0).fit(second, data, ckpt_path=tmp_path / "half.ckpt")
        wanted, found = whole.state_dict(), second.state_dict()
        assert list(found) == list(wanted)
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)
        return torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]

    return check
