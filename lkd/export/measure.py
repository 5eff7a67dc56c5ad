"""How the files of an export compare with the checkpoint, on real images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lkd.export.files import Run
from lkd.types import IGNORE_INDEX, Batch

_SINGLE = 16  # images that are asked one by one, too


@dataclass
class Checked:
    """One file against the checkpoint.

    Attributes:
        file: Its name.
        size: Its size in bytes.
        difference: The largest absolute difference of a logit.
        images: Images seen.
        labelled: Those of them that have a label.
        same: Images for which file and checkpoint choose the same class.
        correct: Labelled images for which the file chooses the right one.
        expected: Labelled images for which the checkpoint does.
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
        """Share of images for which file and checkpoint choose the same class."""
        return self.same / self.images

    @property
    def accuracy(self) -> float:
        """The file's accuracy on the labelled images; NaN without any."""
        return self.correct / self.labelled if self.labelled else float("nan")

    @property
    def expected_accuracy(self) -> float:
        """The checkpoint's on the same images."""
        return self.expected / self.labelled if self.labelled else float("nan")

    def see(self, got: Tensor, expected: Tensor, target: Tensor) -> None:
        """Compare the answers to one batch.

        Args:
            got: The file's logits `(B, K)`.
            expected: The checkpoint's.
            target: Classes `(B,)`; `IGNORE_INDEX` where there is no label.
        """
        self.differ(got, expected)
        choice, right = got.argmax(1), expected.argmax(1)
        self.images += len(target)
        self.labelled += int((target != IGNORE_INDEX).sum())
        self.same += int((choice == right).sum())
        self.correct += int((choice == target).sum())
        self.expected += int((right == target).sum())

    def differ(self, got: Tensor, expected: Tensor) -> None:
        """Note how far answers are apart; other shapes, and what is not finite, infinitely far."""
        apart = (got - expected).abs().max() if got.shape == expected.shape else torch.tensor(torch.inf)
        self.difference = max(self.difference, float(apart.nan_to_num(torch.inf, torch.inf)))


def compare(reference: Run, runs: Mapping[str, Run], batches: Iterable[Batch], folder: Path) -> list[Checked]:
    """Ask the checkpoint and every file about the same images, in batches, and some of them one by one.

    Args:
        reference: The checkpoint.
        runs: Name of each file to what it answers.
        batches: The images.
        folder: Where the files lie.
    """
    found = {file: Checked(file, _size(folder, file)) for file in runs}
    with torch.no_grad():
        for number, batch in enumerate(batches):
            expected = reference(batch.input)
            for file, run in runs.items():
                found[file].see(run(batch.input), expected, batch.target)
            if number:
                continue
            twice = torch.cat((batch.input, batch.input))  # larger than 1 where the data's batches are not
            for image in (*batch.input[:_SINGLE].split(1), twice):
                answer = reference(image)
                for file, run in runs.items():
                    found[file].differ(run(image), answer)
    return list(found.values())


def _size(folder: Path, file: str) -> int:
    """A file's bytes, with those of weights that ONNX keeps beside it."""
    return sum(path.stat().st_size for path in folder.glob(f"{file}*"))
