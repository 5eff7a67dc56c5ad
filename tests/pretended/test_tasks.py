"""Tasks prepare the same images of predictions on all devices."""

from __future__ import annotations

import torch

from lkd.callbacks.prediction_images import _part
from lkd.tasks import SemanticSegmentation
from lkd.types import IGNORE_INDEX, Batch
from tests.pretended.device import NAME


def test_prediction_images(pretended) -> None:
    """The visualizations and the selected rows of a batch equal those on the CPU."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(-1, 3, (4, 6, 6), generator=generator)
    target[target < 0] = IGNORE_INDEX
    logits = torch.randn(4, 3, 3, 3, generator=generator)
    shown = []
    for device in ("cpu", NAME):
        batch = _part(Batch(logits.to(device), target.to(device)), 2)
        shown.append(SemanticSegmentation(3).visualize(batch.target, [], batch.input))
    for ours, theirs in zip(*shown, strict=True):
        assert (ours.text, ours.legend) == (theirs.text, theirs.legend)
        assert torch.equal(ours.image, theirs.image)
