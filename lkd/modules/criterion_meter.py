"""Evaluation of a criterion in validation and test, and a check of whether a loss trains the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import reduce

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lkd.features.extractor import tensors_in
from lkd.tasks.metrics import WeightedMean
from lkd.types import Outputs

_LIMIT = 2**28
"""Maximum size of the stored logits, in bytes."""


class RememberedLogits:
    """In-memory cache of a frozen teacher's logits for batches that recur in each epoch.

    The cache holds at most 256 MiB; further batches are computed each time. Features are not stored.
    """

    def __init__(self) -> None:
        self._logits: dict[tuple[bytes, int], Tensor] = {}
        self._free = _LIMIT

    def outputs(self, batch: tuple[bytes, int], compute: Callable[[], Outputs]) -> Outputs:
        """Return the teacher's outputs for a batch, without features if the logits are in the cache.

        Args:
            batch: Key that identifies the batch and the teacher's weights.
            compute: Function that runs the teacher.
        """
        if batch in self._logits:
            return Outputs(self._logits[batch], {})
        outputs = compute()
        size = sum(leaf.nbytes for leaf in tensors_in(outputs.logits))
        if size <= self._free:
            self._logits[batch] = outputs.logits
            self._free -= size
        return outputs


class CriterionMeter:
    """Updates metrics with the terms of a criterion, creating a metric for each new term.

    Evaluation must not fail if training does not. If the criterion raises an exception for the first batch of a given
    size, a warning reports it, and batches of this size are skipped.

    Attributes:
        recorded: Dict that receives the terms instead of the metrics; None to update the metrics.
    """

    def __init__(self) -> None:
        self.recorded: dict[str, Tensor] | None = None
        self._works: dict[int, bool] = {}

    def is_tried(self, size: int) -> bool:
        """Return whether a batch of this size has been evaluated before.

        Args:
            size: Number of images.
        """
        return size in self._works

    def update(
        self,
        metrics: MutableMapping[str, Metric],
        terms: Callable[[], Mapping[str, Tensor]],
        size: int,
        weight: Tensor | int,
    ) -> None:
        """Evaluate the criterion on one batch.

        Args:
            metrics: Metrics of the stage by name.
            terms: Function that computes the terms.
            size: Number of images.
            weight: Number of images or pixels over which the terms are averaged.
        """
        if self.recorded is not None:
            self.recorded.update(terms())
        elif self._works.get(size, True):
            found = terms() if size in self._works else self._try(terms, size)
            for name, term in found.items():
                if name not in metrics:
                    with torch.inference_mode(False):  # the metric outlives this evaluation
                        metrics[name] = WeightedMean().to(term.device)
                metrics[name].update(term.detach(), weight=weight)

    def _try(self, terms: Callable[[], Mapping[str, Tensor]], size: int) -> Mapping[str, Tensor]:
        try:
            found = terms()
        except Exception as error:  # a custom criterion may raise anything
            self._works[size] = False
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            rank_zero_warn(f"the criterion is not evaluated on batches of {size} images in validation/test ({reason})")
            return {}
        self._works[size] = True
        return found


def with_total(terms: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the terms, with their sum added if there are several.

    Args:
        terms: Mapping from names to scalars.
        name: Name of the sum. If a term already has this name, the terms are returned unchanged.
    """
    return dict(terms) if name in terms or not terms else {**terms, name: reduce(torch.add, terms.values())}


def has_untrained_part(logits: Tensor, loss: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Return whether logits depend on trainable parameters that the loss does not depend on.

    Args:
        logits: Logits `(B, K)`, or other predictions, with their autograd graph.
        loss: Scalar loss with its autograd graph.
        parameters: All parameters; frozen ones are ignored.

    Example:
        >>> body, head = torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)
        >>> feature = body(torch.ones(1, 2))
        >>> has_untrained_part(head(feature), feature.sum(), [*body.parameters(), *head.parameters()])
        True
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    sums = [leaf.sum() for leaf in tensors_in(logits) if leaf.requires_grad]
    if not trainable or not sums:
        return False
    in_logits = torch.autograd.grad(sums, trainable, retain_graph=True, allow_unused=True)
    if not loss.requires_grad:
        return True
    in_loss = torch.autograd.grad(loss, trainable, retain_graph=True, allow_unused=True)
    return any(own is not None and other is None for own, other in zip(in_logits, in_loss, strict=True))
