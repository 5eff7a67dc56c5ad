"""Comparison of exported files with the checkpoint on real images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lkd.export.files import Run
from lkd.types import IGNORE_INDEX, Batch

_SINGLE = 16  # number of images that are also compared individually


@dataclass
class Checked:
    """Comparison of a file with the checkpoint.

    Attributes:
        file: Name of the file.
        size: Size of the file in bytes.
        difference: Maximum absolute difference of a logit.
        images: Number of images.
        labelled: Number of labelled images.
        same: Number of images for which file and checkpoint predict the same class.
        correct: Number of labelled images that the file classifies correctly.
        expected: Number of labelled images that the checkpoint classifies correctly.
    """

    file: str
    size: int
    difference: float = 0.0
    images: int = 0
    labelled: int = 0
    same: int = 0
    correct: int = 0
    expected: int = 0

    @property
    def agreement(self) -> float:
        """Proportion of images for which file and checkpoint predict the same class."""
        return self.same / self.images

    @property
    def accuracy(self) -> float:
        """Accuracy of the file on the labelled images; NaN without labels."""
        return self.correct / self.labelled if self.labelled else float("nan")

    @property
    def expected_accuracy(self) -> float:
        """Accuracy of the checkpoint on the same images."""
        return self.expected / self.labelled if self.labelled else float("nan")

    def see(self, got: Tensor, expected: Tensor, target: Tensor) -> None:
        """Update the comparison with the predictions and logits of a batch.

        Args:
            got: Logits of the file `(B, K)`.
            expected: Logits of the checkpoint `(B, K)`.
            target: Class indices `(B,)`; `IGNORE_INDEX` for unlabelled images.
        """
        self.differ(got, expected)
        choice, right = got.argmax(1), expected.argmax(1)
        self.images += len(target)
        self.labelled += int((target != IGNORE_INDEX).sum())
        self.same += int((choice == right).sum())
        self.correct += int((choice == target).sum())
        self.expected += int((right == target).sum())

    def differ(self, got: Tensor, expected: Tensor) -> None:
        """Update the maximum difference of the logits; it is infinite for different shapes and non-finite values."""
        apart = (got - expected).abs().max() if got.shape == expected.shape else torch.tensor(torch.inf)
        self.difference = max(self.difference, float(apart.nan_to_num(torch.inf, torch.inf)))


def compare(reference: Run, runs: Mapping[str, Run], batches: Iterable[Batch], folder: Path) -> list[Checked]:
    """Compare files with the checkpoint on the same images, in batches and, for some images, individually.

    Args:
        reference: Function that runs the checkpoint.
        runs: Function that runs each file, by the name of the file.
        batches: Batches of images.
        folder: Folder of the files.
    """
    found = {file: Checked(file, _size(folder, file)) for file in runs}
    with torch.no_grad():
        for number, batch in enumerate(batches):
            expected = reference(batch.input)
            for file, run in runs.items():
                found[file].see(run(batch.input), expected, batch.target)
            if number:
                continue
            twice = torch.cat((batch.input, batch.input))  # at least two images, even if the batches have one
            for image in (*batch.input[:_SINGLE].split(1), twice):
                expected = reference(image)
                for file, run in runs.items():
                    found[file].differ(run(image), expected)
    return list(found.values())


def _size(folder: Path, file: str) -> int:
    """Return the size of a file in bytes, including weights that ONNX stores in a separate file."""
    return sum(path.stat().st_size for path in folder.glob(f"{file}*"))
