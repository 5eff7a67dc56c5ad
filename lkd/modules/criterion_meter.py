"""Measuring a distillation in validation and test: its loss, and whether it trains the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import reduce

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lkd.modules.meter import WeightedMean
from lkd.types import Outputs

_LIMIT = 2**28
"""Bytes of logits that are remembered."""


class RememberedLogits:
    """The logits of a frozen teacher for batches that come again in every epoch.

    Logits take at most 256 MiB; batches beyond that are computed each time. Features are not remembered.
    """

    def __init__(self) -> None:
        self._logits: dict[tuple[bytes, int], Tensor] = {}
        self._free = _LIMIT

    def outputs(self, batch: tuple[bytes, int], compute: Callable[[], Outputs]) -> Outputs:
        """The teacher's outputs for a batch, without features where the logits are remembered.

        Args:
            batch: What identifies the batch and the teacher's weights.
            compute: Runs the teacher.
        """
        if batch in self._logits:
            return Outputs(self._logits[batch], {})
        outputs = compute()
        if outputs.logits.nbytes <= self._free:
            self._logits[batch] = outputs.logits
            self._free -= outputs.logits.nbytes
        return outputs


class CriterionMeter:
    """Adds the terms of a criterion to the metrics of an evaluation, and creates these metrics when a term is new.

    An evaluation must not fail where training does not. The first batch of each size is therefore a trial: if the
    criterion raises an exception, a warning reports it and batches of this size are left out.

    Attributes:
        recorded: A dict that receives the terms themselves, in place of the metrics; None: there is none.
    """

    def __init__(self) -> None:
        self.recorded: dict[str, Tensor] | None = None
        self._works: dict[int, bool] = {}

    def is_tried(self, size: int) -> bool:
        """Whether a batch of this size was measured before.

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
        """Measure one batch.

        Args:
            metrics: The metrics of the stage, by name.
            terms: Computes the terms.
            size: Number of images.
            weight: Number of images that the terms are a mean over.
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
        except Exception as error:  # whatever the criterion of a user raises
            self._works[size] = False
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            rank_zero_warn(f"the criterion is not measured in evaluation batches of {size} images ({reason})")
            return {}
        self._works[size] = True
        return found


def with_total(terms: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Terms and, where there are several, their sum.

    Args:
        terms: Name to scalar.
        name: The name of the sum; a single term that has it is the sum.
    """
    return dict(terms) if name in terms or not terms else {**terms, name: reduce(torch.add, terms.values())}


def has_untrained_part(logits: Tensor, loss: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether logits depend on trainable parameters that the loss does not reach.

    Args:
        logits: `(B, K)`, with their graph.
        loss: A scalar, with its graph.
        parameters: All parameters that may train.

    Example:
        >>> body, head = torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)
        >>> feature = body(torch.ones(1, 2))
        >>> has_untrained_part(head(feature), feature.sum(), [*body.parameters(), *head.parameters()])
        True
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable or not logits.requires_grad:
        return False
    in_logits = torch.autograd.grad(logits.sum(), trainable, retain_graph=True, allow_unused=True)
    if not loss.requires_grad:
        return True
    in_loss = torch.autograd.grad(loss, trainable, retain_graph=True, allow_unused=True)
    return any(own is not None and other is None for own, other in zip(in_logits, in_loss, strict=True))
