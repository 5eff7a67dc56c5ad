"""Several students that learn from one another."""

from __future__ import annotations

from collections.abc import MutableMapping
from copy import deepcopy
from itertools import permutations
from typing import Any, cast

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

from lkd.features.extractor import FeatureTaps
from lkd.losses import KD, CompositeLoss, DistillLoss, named_terms
from lkd.modules.classification import ClassificationModule
from lkd.modules.criterion_meter import with_total
from lkd.modules.distill import DistillModule
from lkd.modules.meter import Accuracy
from lkd.schedules.relative import Interval
from lkd.types import Batch, Outputs, Probe


class Mutual(CompositeLoss):
    """A criterion between all students: a copy of it for each and each of its peers, as adapters differ.

    Args:
        criterion: What compares two of them.
        students: All of them.
    """

    def __init__(self, criterion: DistillLoss, students: list[nn.Module]) -> None:
        super().__init__([criterion])
        self.students = list(permutations(range(len(students)), 2))
        copies = [criterion, *(deepcopy(criterion) for _ in self.students[1:])]
        for copy, (own, peer) in zip(copies, self.students, strict=True):
            copy.locate(students[own], students[peer])
        self.criteria = nn.ModuleList(copies)
        self.student_layers = self.layers_of(0)

    @property
    def name(self) -> str:
        """The criterion's."""
        return self.parts[0].name

    @property
    def parts(self) -> list[DistillLoss]:
        """The copies."""
        return list(self.criteria)  # type: ignore[arg-type]

    def layers_of(self, student: int) -> tuple[str, ...]:
        """The layers of one student that are read: in what it says of itself, and as a peer.

        Args:
            student: Its number, from 0.
        """
        own = [copy.student_layers for copy, pair in self._copies() if pair[0] == student]
        as_peer = [copy.teacher_layers for copy, pair in self._copies() if pair[1] == student]
        return tuple(dict.fromkeys(layer for layers in (*own, *as_peer) for layer in layers))

    def locate(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """The copies have found their layers already."""

    def build(self, *probes: Probe) -> None:
        """Build each copy.

        Args:
            probes: All students and what they say of a blank input.
        """
        for copy, (own, peer) in self._copies():
            student, teacher = _answers(copy, probes[own].outputs, probes[peer].outputs)
            copy.build(probes[own]._replace(outputs=student), probes[peer]._replace(outputs=teacher))

    def forward(self, answers: list[Outputs], student: int, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """The mean of one student's terms over its peers.

        Args:
            answers: What all students say.
            student: The student's number, from 0.
            batch: The batch that all of them saw.
        """
        terms: dict[str, Tensor] = {}
        for copy, (own, peer) in self._copies():
            if own == student:
                for key, term in named_terms("", copy(*_answers(copy, answers[own], answers[peer]), batch)).items():
                    terms[key] = terms[key] + term if key in terms else term
        return {key: term / (len(answers) - 1) for key, term in terms.items()}

    def _copies(self) -> list[tuple[DistillLoss, tuple[int, int]]]:
        return list(zip(self.parts, self.students, strict=True))


def _answers(criterion: DistillLoss, own: Outputs, peer: Outputs) -> tuple[Outputs, Outputs]:
    """What a criterion is given of two students: the layers that it named; of the peer, without gradient."""
    student = Outputs(own.logits, {layer: own.features[layer] for layer in criterion.student_layers})
    teacher = Outputs(peer.logits, {layer: peer.features[layer] for layer in criterion.teacher_layers})
    return student, tree_map_only(Tensor, Tensor.detach, teacher)


class MutualModule(DistillModule):
    r"""Deep mutual learning: students that are trained at once, each with the labels and with what its peers say.

    $$ L_i = \text{hard\_weight} \cdot \mathrm{CE}(z_i, y)
       + \text{distill\_weight} \cdot \frac{1}{M - 1} \sum_{j \neq i} \mathrm{criterion}(z_i, z_j) $$

    and the loss is the sum over the M students; a peer's answers are taken as they are, without gradient. All students
    are in the checkpoint; the first is `model`, so that a checkpoint's weights serve as another run's teacher, and the
    one that chooses the best checkpoint.

    Curves of the first student are called as those of a `DistillModule`, the others' have a number behind: `val/acc`,
    `val/acc_2`, `train/kd_2`, ...

    Args:
        students: The networks, two or more; each returns logits `(B, K)`. They may differ.
        criterion: What a student imitates of a peer; each pair has its own copy. None: `KD(temperature=1.0)`.
        distill_weight: Weight of the criterion, at least 0.
        hard_weight: Weight of the cross-entropy with the labels, at least 0.
        optimizer: Makes the optimizer from the parameters that train, all students' and the criteria's.
        lr_scheduler: Makes the learning rate's schedule from the optimizer; None: constant. `lkd.schedules` has
            schedules that follow the length of the run.
        label_smoothing: Share of the target's probability spread over all classes, in [0, 1).
        lr_scheduler_interval: Whether the schedule is stepped after each `epoch` or each optimizer `step`.

    Raises:
        ValueError: If there are fewer than two students, a weight is negative, or, before training, the students have
            different classes.

    References:
        Zhang, Xiang, Hospedales, Lu: Deep Mutual Learning, CVPR 2018 (arXiv 1706.00384). They update one student after
        the other, each from its peers' newest answers; here all are updated at once, from the same forward pass, as in
        their equations but not in their algorithm 1: it costs half, for two students, and lets them share an optimizer.
        The mean over the peers is the paper's; the authors' code adds the peers' divergences without dividing by
        M - 1, which `distill_weight` M - 1 gives here.
    """

    def __init__(
        self,
        students: list[nn.Module],
        criterion: DistillLoss | None = None,
        distill_weight: float = 1.0,
        hard_weight: float = 1.0,
        optimizer: OptimizerCallable = lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        lr_scheduler_interval: Interval = "epoch",
    ) -> None:
        if len(students) < 2:
            raise ValueError(f"MutualModule needs at least two students, got {len(students)}")
        mutual = Mutual(criterion if criterion is not None else KD(temperature=1.0), students)
        super().__init__(
            students[0],
            criterion=mutual,
            distill_weight=distill_weight,
            hard_weight=hard_weight,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            label_smoothing=label_smoothing,
            lr_scheduler_interval=lr_scheduler_interval,
        )
        self.taps = [self.student_taps]
        for number, student in enumerate(students[1:], 2):
            self.add_module(f"student_{number}", student)
            self.network_names += (f"student_{number}",)
            self.taps.append(FeatureTaps(student, mutual.layers_of(number - 1)))
            self.logit_metrics += (f"acc_{number}",)
            for metrics in self.metrics.values():
                cast("nn.ModuleDict", metrics)[f"acc_{number}"] = Accuracy()

    @property
    def asks_teacher(self) -> bool:
        """There is none: the peers are the teachers."""
        return False

    def build(self, example: Any) -> None:
        """Check the students on a blank input, and let the criterion build its adapters."""
        named = zip(self.network_names, self.taps, strict=True)
        probes = [self.probe(name, taps, example) for name, taps in named]
        classes = [probe.outputs.logits.shape[1] for probe in probes]
        if self.criterion.reads_logits and self.distill_weight and len(set(classes)) > 1:
            raise ValueError(
                f"the students have {', '.join(map(str, classes))} classes, and their logits are compared: set the "
                "same num_classes"
            )
        self.build_criterion(*probes)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The first student's logits `(B, K)`; the weighted terms of all students."""
        self._check_batch(batch)
        answers = [taps(batch.input) for taps in self.taps]
        terms = {}
        for number, answer in enumerate(answers):
            self.watch(self.network_names[number], answer.logits)
            if self.hard_weight:
                terms[f"hard{_suffix(number)}"] = self.hard_weight * self._labels_loss(answer.logits, batch)
            if self.distill_weight:
                terms |= _numbered(self._terms_of(answers, number, batch), number)
        self._reach_all(terms, *(answer.logits for answer in answers))
        return answers[0].logits, terms

    def _terms_of(self, answers: list[Outputs], student: int, batch: Batch) -> dict[str, Tensor]:
        terms = named_terms(self.distill_name, self.criterion(answers, student, batch))
        return {name: self.distill_weight * term for name, term in terms.items()}

    def update_metrics(self, metrics: MutableMapping[str, Metric], batch: Batch) -> Tensor:
        """Measure all students on one batch, and the criterion of each."""
        self.student_taps.clear()
        logits = ClassificationModule.update_metrics(self, metrics, batch)
        peers = [taps(batch.input) for taps in self.taps[1:]]
        for number, peer in enumerate(peers, 2):
            metrics[f"acc_{number}"].update(peer.logits, batch.target)

        def terms() -> dict[str, Tensor]:
            answers = [self.student_taps.outputs(logits), *peers]
            found: dict[str, Tensor] = {}
            for number in range(len(answers)):
                own = with_total(self._terms_of(answers, number, batch), self.criterion_curve)
                found |= _numbered(own, number)
            return found

        self.measure_criterion(metrics, batch, terms)
        return logits


def _suffix(student: int) -> str:
    return f"_{student + 1}" if student else ""


def _numbered(terms: dict[str, Tensor], student: int) -> dict[str, Tensor]:
    return {f"{name}{_suffix(student)}": term for name, term in terms.items()}
