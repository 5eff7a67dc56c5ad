"""Comparison of exported files with the checkpoint on real images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lkd.export.files import Network, Run
from lkd.tasks.base import Task
from lkd.types import Batch

_SINGLE = 16  # number of images that are also compared individually


class Checked:
    """Comparison of a file with the checkpoint.

    Args:
        file: Name of the file.
        size: Size of the file in bytes.
        task: Task of the network.

    Attributes:
        difference: Maximum absolute difference of a logit.
        images: Number of images.
        labelled: Number of labelled images, or of labelled pixels if the task labels pixels.
    """

    def __init__(self, file: str, size: int, task: Task) -> None:
        self.file, self.size, self.task = file, size, task
        self.difference = 0.0
        self.images = self.labelled = 0
        self._same, self._chosen = 0, 0
        self._metrics = [{task.metric: task.metrics()[task.metric]} for _ in range(2)]

    @property
    def agreement(self) -> float:
        """Proportion of images or pixels with the same prediction; NaN if the task does not define `choice`."""
        return self._same / self._chosen if self._chosen else float("nan")

    @property
    def score(self) -> float:
        """Main metric of the file on the labelled images; NaN without labels."""
        return self._score(0)

    @property
    def expected_score(self) -> float:
        """Main metric of the checkpoint on the same images; NaN without labels."""
        return self._score(1)

    def update(self, got: Tensor, expected: Tensor, target: Tensor) -> None:
        """Update the comparison with the predictions and logits of a batch.

        Args:
            got: Logits of the file, for example `(B, K)`.
            expected: Logits of the checkpoint, for example `(B, K)`.
            target: Targets of the batch; missing labels are `IGNORE_INDEX`.
        """
        self.update_difference(got, expected)
        self.images += len(target)
        self.labelled += int(self.task.labelled(target))
        for metrics, logits in zip(self._metrics, (got, expected), strict=True):
            self.task.update(metrics, logits, target)
        everything = self.task.blank_target(expected)
        choices = [self.task.choice(logits, everything) for logits in (got, expected)]
        if choices[0] is not None and choices[1] is not None:
            self._same += int((choices[0] == choices[1]).sum())
            self._chosen += choices[0].numel()

    def update_difference(self, got: Tensor, expected: Tensor) -> None:
        """Update the maximum difference of the logits; it is infinite for different shapes and non-finite values."""
        apart = (got - expected).abs().max() if got.shape == expected.shape else torch.tensor(torch.inf)
        self.difference = max(self.difference, float(apart.nan_to_num(torch.inf, torch.inf)))

    def _score(self, number: int) -> float:
        return float(self._metrics[number][self.task.metric].compute()) if self.labelled else float("nan")


def compare(network: Network, runs: Mapping[str, Run], batches: Iterable[Batch], folder: Path) -> list[Checked]:
    """Compare files with the checkpoint on the same images, some of them also individually and at another size.

    Args:
        network: Network of the checkpoint.
        runs: Function that runs each file, by the name of the file.
        batches: Batches of images.
        folder: Folder of the files.
    """
    found = {file: Checked(file, _size(folder, file), network.task) for file in runs}
    with torch.no_grad():
        for number, batch in enumerate(batches):
            expected = network(batch.input)
            for file, run in runs.items():
                found[file].update(run(batch.input), expected, batch.target)
            for images in () if number else _variants(network, batch.input):
                expected = network(images)
                for file, run in runs.items():
                    found[file].update_difference(run(images), expected)
    return list(found.values())


def _variants(network: Network, image: Tensor) -> Iterator[Tensor]:
    """Yield single images, a batch of at least two, and images of another size if the files accept them."""
    yield from (image[i : i + 1] for i in range(min(len(image), _SINGLE)))
    yield torch.cat((image, image))
    if network.size_step is not None:
        size = network.sized(network.size_step).shape[2:]
        yield torch.nn.functional.interpolate(image[:_SINGLE], (size[0], size[1]))


def percent(value: float) -> str:
    """Format a proportion, or a dash for NaN."""
    return "-" if value != value else f"{value:.2%}"


def _size(folder: Path, file: str) -> int:
    """Return the size of a file in bytes, including weights that ONNX stores in a separate file."""
    return sum(path.stat().st_size for path in folder.glob(f"{file}*"))
