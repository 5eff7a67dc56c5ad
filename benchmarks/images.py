"""The benchmark's images, decoded once: its runs are many and short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from lkd import CIFAR10DataModule
from lkd.datamodules.base import Split
from lkd.datamodules.dataset import ImageSource


class DecodedCIFAR10(CIFAR10DataModule):
    """CIFAR-10 from image files, which are decoded into `<root>/<split>.pt` the first time."""

    def make_dataset(self, split: Split) -> ImageSource | None:
        """The images and classes of a split, in memory."""
        if split == "val":
            return None
        file = Path(self.root) / f"{split}.pt"
        if not file.exists():
            source = super().make_dataset(split)
            pairs = [source[i] for i in range(len(source))]
            images = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image, _ in pairs]))
            classes = torch.tensor([target for _, target in pairs])
            torch.save((images.permute(0, 3, 1, 2).contiguous(), classes), file)
        return TensorDataset(*torch.load(file, weights_only=True))
