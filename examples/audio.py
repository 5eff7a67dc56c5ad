"""Audio classification: distill a convolutional network on spectrograms into a smaller one.

The data set is synthetic: eight waveforms at a random pitch, with additive noise of standard deviation 0.5 to 1.5. It
is a toy task, and the results do not carry over to speech or music. Spectrograms are computed as for real recordings.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lkd.types import IGNORE_INDEX

KINDS = ("sine", "square", "sawtooth", "triangle", "rising", "falling", "beating", "wavering")
RATE, LENGTH = 8000, 2048  # samples per second and per sound
WINDOW, HOP = 128, 64


def make_sounds(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Generate sounds `(number, LENGTH)` and their classes `(number,)` as a function of the seed."""
    draw = torch.Generator().manual_seed(seed)
    kind = torch.randint(len(KINDS), (number,), generator=draw)
    pitch = 200 * 4 ** torch.rand(number, 1, generator=draw)  # two octaves, in Hz
    time = torch.arange(LENGTH) / RATE
    turns = pitch * time + torch.rand(number, 1, generator=draw)
    bend = 0.4 * time / time[-1] * pitch * time
    slow = torch.sin(2 * math.pi * 12 * time)
    sine = torch.sin(2 * math.pi * turns)
    waves = torch.stack(
        [
            sine,
            torch.sign(sine) / math.sqrt(2),
            math.sqrt(1.5) * (2 * (turns % 1) - 1),
            math.sqrt(1.5) * (4 * (turns % 1 - 0.5).abs() - 1),
            torch.sin(2 * math.pi * (turns + bend)),
            torch.sin(2 * math.pi * (turns - bend)),
            sine * (1 + slow) / math.sqrt(1.5),
            torch.sin(2 * math.pi * turns + 4 * slow),
        ]
    )
    loudness = 0.5 + torch.rand(number, 1, generator=draw)
    noise = loudness * torch.randn(number, LENGTH, generator=draw)
    return waves[kind, torch.arange(number)] + noise, kind


class SoundDataModule(L.LightningDataModule):
    """Synthetic sounds; spectrograms are computed for whole batches, on the device.

    Args:
        batch_size: Number of sounds per batch.
        label_size: Number of training sounds that keep their label; `None` keeps all labels.
        drop_unlabelled: Train only on labelled sounds, repeated so that the number of steps is the same.
        train_size: Number of training sounds.
    """

    num_classes = len(KINDS)
    class_names = KINDS
    input_shape = (1, WINDOW // 2 + 1, LENGTH // HOP + 1)  # shape of a spectrogram, the input of the networks

    def __init__(
        self, batch_size: int = 64, label_size: int | None = None, drop_unlabelled: bool = False, train_size: int = 4000
    ) -> None:
        super().__init__()
        self.batch_size, self.label_size, self.drop_unlabelled = batch_size, label_size, drop_unlabelled
        self.train_size = train_size

    def setup(self, stage: str) -> None:
        """Generate the sounds and remove labels beyond `label_size`."""
        sounds, kinds = make_sounds(self.train_size, seed=1)
        index = torch.arange(self.train_size)
        if self.label_size is not None and self.drop_unlabelled:
            index = torch.arange(self.train_size) % self.label_size
        elif self.label_size is not None:
            kinds = kinds.masked_fill(index >= self.label_size, IGNORE_INDEX)
        self.splits = {"train": TensorDataset(sounds[index], kinds[index], index)}
        for seed, (split, number) in enumerate({"val": 500, "test": 1000}.items(), start=2):
            self.splits[split] = TensorDataset(*make_sounds(number, seed), torch.arange(number))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Convert sounds `(B, LENGTH)` to log spectrograms `(B, 1, frequencies, times)` with values of about 1."""
        sound, kind, index = batch
        window = torch.hann_window(WINDOW, device=sound.device)
        parts = torch.stft(sound, WINDOW, HOP, window=window, return_complex=True)
        return (parts.abs() + 1e-3).log()[:, None] - 2, kind, index

    def _loader(self, split: str) -> DataLoader[Any]:
        training = split == "train"
        return DataLoader(self.splits[split], batch_size=self.batch_size, shuffle=training, drop_last=training)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the training sounds, shuffled."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the validation sounds."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test sounds."""
        return self._loader("test")

    predict_dataloader = test_dataloader


class SpectrogramNet(nn.Sequential):
    """Three convolutions with stride 2, global average pooling and a linear classifier.

    Args:
        width: Number of channels of the first convolution.
        num_classes: Number of classes.
    """

    def __init__(self, width: int, num_classes: int = len(KINDS)) -> None:
        layers: list[nn.Module] = []
        channels = 1
        for out in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
