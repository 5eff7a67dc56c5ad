"""Predictions of several networks for the same images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from lkd._compat import tree_map_only
from lkd._moved import former_members, renamed
from lkd.compare.metrics import divergences
from lkd.features.extractor import tensors_in
from lkd.io.refused import first_line
from lkd.modules import ClassificationModule
from lkd.tasks import Classification, Task
from lkd.types import Batch, Normalization

Split = Literal["test", "val"]


@dataclass(frozen=True)
class Candidate:
    """Network to compare.

    Args:
        name: Name of the network.
        network: Network that returns logits `(B, K)`, or an output that contains them as `.logits` or `["logits"]`.
        normalization: Normalization that the network expects; None for that of the data.
        source: Description of its origin.
        unpack: Function that converts a batch of the data to a `Batch`; None for `ClassificationModule.unpack`.
        group: Name of the method by which it was trained; networks of one group differ only in their seed.
    """

    name: str
    network: nn.Module
    normalization: Normalization | None = None
    source: str = ""
    unpack: Callable[[Any], Batch] | None = None
    group: str | None = None


@dataclass
class Disagreements:
    """Images for which a network and the teacher predict different classes, in decreasing order of divergence.

    Attributes:
        image: Images `(M, ...)` with the normalization of the data.
        position: Positions in the split `(M,)`.
        divergence: KL(teacher || network) `(M,)`, in nats.
    """

    image: Tensor
    position: Tensor
    divergence: Tensor


@former_members(disputed="disagreements")
@dataclass
class Predictions:
    """Predictions of the networks.

    Attributes:
        logits: Logits `(N, K)` of each network in float32, by name.
        target: Class indices `(N,)`.
        device: Device on which the logits were computed.
        disagreements: Images with the largest disagreement with the teacher, by the name of the network.
        example: Inputs of the first batch, on the CPU.
    """

    logits: dict[str, Tensor]
    target: Tensor
    device: torch.device
    disagreements: dict[str, Disagreements] = field(default_factory=dict)
    example: Any = None


class Collector(ABC):
    """Base class of collectors, which receive the logits of all networks batch by batch."""

    @abstractmethod
    def add(self, batch: Batch, logits: Mapping[str, Tensor], data: Any) -> None:
        """Process one batch.

        Args:
            batch: The batch, as prepared by the task.
            logits: Logits of each network in float32, by name.
            data: Data module.
        """


class _Logits(Collector):
    """Collector that stores all logits, and the images on which a network disagrees most with the teacher."""

    def __init__(self, candidates: Sequence[Candidate], teacher: str | None, shown: int) -> None:
        self.teacher, self.shown = teacher, shown
        self.logits: dict[str, list[Tensor]] = {one.name: [] for one in candidates}
        self.target: list[Tensor] = []
        self.disagreements: dict[str, Disagreements] = {}
        self._seen = 0

    def add(self, batch: Batch, logits: Mapping[str, Tensor], data: Any) -> None:
        """Store the logits of a batch."""
        outputs = {name: own.cpu() for name, own in logits.items()}
        for name, own in outputs.items():
            self.logits[name].append(own)
        self.target.append(batch.target.cpu())
        if self.teacher is not None and isinstance(batch.input, Tensor) and batch.input.dim() == 4:
            for name in set(outputs) - {self.teacher}:
                self._keep_disagreements(name, outputs[name], outputs[self.teacher], batch.input)
        self._seen += len(batch.target)

    def _keep_disagreements(self, name: str, logits: Tensor, teacher: Tensor, image: Tensor) -> None:
        differs = (logits.argmax(1) != teacher.argmax(1)).nonzero().squeeze(1)
        found = Disagreements(
            image[differs.to(image.device)].cpu(), differs + self._seen, divergences(logits[differs], teacher[differs])
        )
        if (kept := self.disagreements.get(name)) is not None:
            found = Disagreements(*(torch.cat([getattr(part, each) for part in (kept, found)]) for each in vars(found)))
        order = found.divergence.argsort(descending=True, stable=True)[: self.shown]
        self.disagreements[name] = Disagreements(*(values[order] for values in vars(found).values()))


class _Predictor(L.LightningModule):
    """Lightning module that applies all networks to every batch."""

    def __init__(self, candidates: Sequence[Candidate], task: Task, collector: Collector) -> None:
        super().__init__()
        self.candidates, self.task, self.collector = candidates, task, collector
        self.networks = nn.ModuleList(one.network for one in candidates)
        own = (one.unpack for one in candidates if one.unpack)
        self.unpack = next(own, None) or ClassificationModule(nn.Identity()).unpack
        self.example: Any = None
        self._classes: int | None = None

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Compute the logits of all networks for a batch."""
        batch = self.task.prepare(self.unpack(batch))
        if self.example is None:
            self.example = _on_cpu(batch.input)
        logits = {one.name: tree_map_only(Tensor, _wide, self._logits_of(one, batch)) for one in self.candidates}
        for name, own in logits.items():
            if not all(leaf.isfinite().all() for leaf in tensors_in(own)):
                raise ValueError(f"the logits of {name} are not finite; check its weights and normalization")
        self.collector.add(batch, logits, getattr(self.trainer, "datamodule", None))

    validation_step = test_step

    def _logits_of(self, candidate: Candidate, batch: Batch) -> Tensor:
        try:
            logits: Tensor = self.task.logits(candidate.network(self.normalized(candidate, batch.input)))
        except RuntimeError as error:
            reason = first_line(error)
            raise ValueError(f"{candidate.name} does not accept the input of this data: {reason}") from error
        self.task.check(candidate.name, logits)
        classes = self.task.num_outputs(logits)
        if classes is None:
            return logits
        wanted = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None) or classes
        self._classes = self._classes or classes
        if classes < wanted or classes != self._classes:
            raise ValueError(
                f"{candidate.name} returns logits of shape (batch, {classes}, ...), but the data has {wanted} "
                f"classes, and {self.candidates[0].name} has {self._classes}; compare networks with the same classes"
            )
        return logits

    def normalized(self, candidate: Candidate, input: Any) -> Any:
        """Convert the input to the normalization that a network expects."""
        given, wanted = statistics_of(getattr(self.trainer, "datamodule", None)), candidate.normalization
        if wanted is None or given == wanted:
            return input
        if given is None or not isinstance(input, Tensor):
            raise ValueError(
                f"{candidate.name} has its own normalization, but this data does not provide mean and std, or its "
                "input is not a tensor; use a data module that provides them, or normalize in the network"
            )
        shape = (1, -1, 1, 1)
        data_mean, data_std, own_mean, own_std = (
            torch.tensor(values, device=input.device, dtype=input.dtype).view(shape)
            for values in (given.mean, given.std, wanted.mean, wanted.std)
        )
        return (input * data_std + data_mean - own_mean) / own_std


def statistics_of(data: Any) -> Normalization | None:
    """Return the normalization of a data module; None if it does not provide `mean` and `std`.

    Args:
        data: Data module, whose `mean` and `std` are numbers, or contain one number per channel.
    """
    given = getattr(data, "mean", None), getattr(data, "std", None)
    if any(values is None for values in given):
        return None
    mean, std = (tuple(torch.as_tensor(values, dtype=torch.float64).flatten().tolist()) for values in given)
    return Normalization(mean, std)


def _wide(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.is_floating_point() else leaf


def _on_cpu(input: Any) -> Any:
    return L.pytorch.utilities.move_data_to_device(input, torch.device("cpu"))


def predict(
    candidates: Sequence[Candidate],
    data: L.LightningDataModule,
    split: Split = "test",
    teacher: str | None = None,
    accelerator: str = "auto",
    shown: int = 12,
    progress: bool = False,
    task: Classification | None = None,
) -> Predictions:
    """Compute the predictions of all networks for all images of a split, on one device, in float32.

    Args:
        candidates: Networks. Their mode and device are restored.
        data: Data module that provides the images; its batch hooks are applied.
        split: `test`, or `val` for the validation images.
        teacher: Name of the network with which the others are compared.
        accelerator: Device, as in `lightning.Trainer`.
        shown: Maximum number of stored images per network on which network and teacher disagree.
        progress: Whether to show a progress bar.
        task: Task of the networks; None for `Classification()`.

    Returns:
        Predictions of the networks.

    Raises:
        ValueError: If a network does not accept the images, its number of classes differs from that of the data or the
            first network, or there are no images.
    """
    found = _Logits(candidates, teacher, shown)
    device, example = run_networks(candidates, data, split, task or Classification(), found, accelerator, progress)
    logits = {name: torch.cat(parts) for name, parts in found.logits.items()}
    return Predictions(logits, torch.cat(found.target), device, found.disagreements, example)


def run_networks(
    candidates: Sequence[Candidate],
    data: L.LightningDataModule,
    split: Split,
    task: Task,
    collector: Collector,
    accelerator: str = "auto",
    progress: bool = False,
) -> tuple[torch.device, Any]:
    """Apply all networks to all images of a split, on one device, in float32.

    Args:
        candidates: Networks. Their mode and device are restored.
        data: Data module that provides the images; its batch hooks are applied.
        split: `test`, or `val` for the validation images.
        task: Task of the networks.
        collector: Receives the logits.
        accelerator: Device, as in `lightning.Trainer`.
        progress: Whether to show a progress bar.

    Returns:
        The device, and the inputs of the first batch on the CPU.

    Raises:
        ValueError: As in `predict`.
    """
    predictor = _Predictor(candidates, task, collector)
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        precision="32-true",
    )
    if split == "test":
        trainer.test(predictor, data, verbose=False)
    else:
        trainer.validate(predictor, data, verbose=False)
    if predictor.example is None:
        raise ValueError(f"{type(data).__name__} has no images in its {split} split; choose another one with --split")
    return trainer.strategy.root_device, predictor.example


def __getattr__(name: str) -> Any:
    """Provide former names."""
    return renamed(__name__, name)
