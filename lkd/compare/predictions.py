"""Asking several networks about the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from lkd.compare.metrics import divergences
from lkd.features.extractor import logits_of
from lkd.modules import ClassificationModule
from lkd.types import Batch, Normalization

Split = Literal["test", "val"]


@dataclass(frozen=True)
class Candidate:
    """A network that is compared.

    Args:
        name: What it is called.
        network: Returns logits `(B, K)`, or has them as `.logits` or `["logits"]`.
        normalization: How it wants its images normalised; None: as the data is.
        source: Where it comes from, in words.
        unpack: Makes a `Batch` of what the data gives; None: as `ClassificationModule.unpack`.
        group: Name of the method that it was trained by; networks of one group differ only by the seed.
    """

    name: str
    network: nn.Module
    normalization: Normalization | None = None
    source: str = ""
    unpack: Callable[[Any], Batch] | None = None
    group: str | None = None


@dataclass
class Disputed:
    """Images on which a network and the teacher choose different classes, the greatest divergence first.

    Attributes:
        image: `(M, ...)`, as the data normalises it.
        position: Their positions in the split `(M,)`.
        divergence: KL(teacher || network), in nats `(M,)`.
    """

    image: Tensor
    position: Tensor
    divergence: Tensor


@dataclass
class Answers:
    """What the networks said.

    Attributes:
        logits: Name to `(N, K)`, float32.
        target: The images' classes `(N,)`.
        disputed: Name to the images on which it disagrees with the teacher the most.
        example: The inputs of the first batch, on the CPU.
        device: Where they were asked.
    """

    logits: dict[str, Tensor]
    target: Tensor
    device: torch.device
    disputed: dict[str, Disputed] = field(default_factory=dict)
    example: Any = None


class _Asking(L.LightningModule):
    """All candidates, each asked about every batch."""

    def __init__(self, candidates: Sequence[Candidate], teacher: str | None, shown: int) -> None:
        super().__init__()
        self.candidates, self.teacher, self.shown = candidates, teacher, shown
        self.networks = nn.ModuleList(one.network for one in candidates)
        own = (one.unpack for one in candidates if one.unpack)
        self.unpack = next(own, None) or ClassificationModule(nn.Identity()).unpack
        self.logits: dict[str, list[Tensor]] = {one.name: [] for one in candidates}
        self.target: list[Tensor] = []
        self.disputed: dict[str, Disputed] = {}
        self.example: Any = None
        self._seen = 0

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Ask about one batch."""
        batch = self.unpack(batch)
        if self.example is None:
            self.example = _on_cpu(batch.input)
        answers = {one.name: self._answer(one, batch).float().cpu() for one in self.candidates}
        for name, logits in answers.items():
            if not logits.isfinite().all():
                raise ValueError(
                    f"{name} answers with logits that are not finite; look at its weights and normalization"
                )
            self.logits[name].append(logits)
        self.target.append(batch.target.cpu())
        if self.teacher is not None and isinstance(batch.input, Tensor) and batch.input.dim() == 4:
            for name in set(answers) - {self.teacher}:
                self._keep_disputed(name, answers[name], answers[self.teacher], batch.input)
        self._seen += len(batch.target)

    validation_step = test_step

    def _answer(self, candidate: Candidate, batch: Batch) -> Tensor:
        try:
            logits = logits_of(candidate.network(self.normalized(candidate, batch.input)))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{candidate.name} cannot take this data's input: {reason}") from error
        wanted = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None) or logits.shape[-1]
        first = self.logits[self.candidates[0].name]
        classes = first[0].shape[1] if first else logits.shape[-1]
        if logits.dim() != 2 or logits.shape[1] < wanted or logits.shape[1] != classes:
            raise ValueError(
                f"{candidate.name} answers with the shape {tuple(logits.shape)}, and the data has {wanted} classes, "
                f"{self.candidates[0].name} {classes}; compare networks of the same classes"
            )
        return logits

    def normalized(self, candidate: Candidate, input: Any) -> Any:
        """The input as a candidate wants it."""
        given, wanted = statistics_of(getattr(self.trainer, "datamodule", None)), candidate.normalization
        if wanted is None or given == wanted:
            return input
        if given is None or not isinstance(input, Tensor):
            raise ValueError(
                f"{candidate.name} has a normalization of its own, and this data does not tell its mean and std, or "
                "its input is no tensor; use a data module that has them, or normalise in the network"
            )
        shape = (1, -1, 1, 1)
        data_mean, data_std, own_mean, own_std = (
            torch.tensor(values, device=input.device, dtype=input.dtype).view(shape)
            for values in (given.mean, given.std, wanted.mean, wanted.std)
        )
        return (input * data_std + data_mean - own_mean) / own_std

    def _keep_disputed(self, name: str, ours: Tensor, theirs: Tensor, image: Tensor) -> None:
        differs = (ours.argmax(1) != theirs.argmax(1)).nonzero().squeeze(1)
        found = Disputed(
            image[differs.to(image.device)].cpu(), differs + self._seen, divergences(ours[differs], theirs[differs])
        )
        if (kept := self.disputed.get(name)) is not None:
            found = Disputed(*(torch.cat([getattr(part, each) for part in (kept, found)]) for each in vars(found)))
        order = found.divergence.argsort(descending=True, stable=True)[: self.shown]
        self.disputed[name] = Disputed(*(values[order] for values in vars(found).values()))


def statistics_of(data: Any) -> Normalization | None:
    """How a data module normalises, as far as it tells.

    Args:
        data: The data module; its `mean` and `std` are numbers, or one for each channel.
    """
    told = getattr(data, "mean", None), getattr(data, "std", None)
    if any(values is None for values in told):
        return None
    mean, std = (tuple(torch.as_tensor(values, dtype=torch.float64).flatten().tolist()) for values in told)
    return Normalization(mean, std)


def _on_cpu(input: Any) -> Any:
    return L.pytorch.utilities.move_data_to_device(input, torch.device("cpu"))


def ask(
    candidates: Sequence[Candidate],
    data: L.LightningDataModule,
    split: Split = "test",
    teacher: str | None = None,
    accelerator: str = "auto",
    shown: int = 12,
    progress: bool = False,
) -> Answers:
    """Ask all candidates about all images of a split, on one device, in float32.

    Args:
        candidates: The networks; they are given back as they were.
        data: Brings the images; what a `LightningDataModule` does to a batch is done.
        split: `test`, or `val`: the validation images.
        teacher: The name of the candidate whose answers the others are compared with.
        accelerator: Lightning's word for the device.
        shown: Images to keep of those on which a network and the teacher disagree.
        progress: Whether to show a progress bar.

    Returns:
        The answers.

    Raises:
        ValueError: If a network cannot take the images, or has other classes than the data or the first network; or
            there are no images.
    """
    asking = _Asking(candidates, teacher, shown)
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
        trainer.test(asking, data, verbose=False)
    else:
        trainer.validate(asking, data, verbose=False)
    if not asking.target:
        raise ValueError(f"{type(data).__name__} has no images in its {split} split; take the other one: --split")
    logits = {name: torch.cat(parts) for name, parts in asking.logits.items()}
    device = trainer.strategy.root_device
    return Answers(logits, torch.cat(asking.target), device, asking.disputed, asking.example)
