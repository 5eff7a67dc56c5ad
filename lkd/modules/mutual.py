"""Deep mutual learning: several students that learn from each other."""

from __future__ import annotations

from collections.abc import MutableMapping
from copy import deepcopy
from itertools import permutations
from typing import Any, cast

from torch import Tensor, nn
from torchmetrics import Metric

from lkd._compat import tree_map_only
from lkd._moved import former_members
from lkd.features.extractor import FeatureExtractor
from lkd.losses import KD, CompositeLoss, DistillLoss, named_terms
from lkd.modules.checks import check_batch
from lkd.modules.classification import ClassificationModule
from lkd.modules.criterion_meter import with_total
from lkd.modules.distill import DistillModule
from lkd.types import Batch, Outputs, Probe


class Mutual(CompositeLoss):
    """A criterion applied to each ordered pair of students, with a copy, and thus separate adapters, for each pair.

    Args:
        criterion: Criterion that compares two students.
        students: All students.
    """

    def __init__(self, criterion: DistillLoss, students: list[nn.Module]) -> None:
        super().__init__([criterion])
        self.students = list(permutations(range(len(students)), 2))
        copies = [criterion, *(deepcopy(criterion) for _ in self.students[1:])]
        for copy, (own, peer) in zip(copies, self.students, strict=True):
            copy.resolve_layers(students[own], students[peer])
        self.criteria = nn.ModuleList(copies)
        self.student_layers = self.layers_of(0)

    @property
    def name(self) -> str:
        """Name of the criterion."""
        return self.parts[0].name

    @property
    def parts(self) -> list[DistillLoss]:
        """Copies of the criterion, one per pair."""
        return list(self.criteria)  # type: ignore[arg-type]

    def layers_of(self, student: int) -> tuple[str, ...]:
        """Return the layers of one student that are read, as student or as peer.

        Args:
            student: Index of the student, from 0.
        """
        own = [copy.student_layers for copy, pair in self._copies() if pair[0] == student]
        as_peer = [copy.teacher_layers for copy, pair in self._copies() if pair[1] == student]
        return tuple(dict.fromkeys(layer for layers in (*own, *as_peer) for layer in layers))

    def resolve_layers(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Do nothing: the layers of the copies are resolved in the constructor."""

    def build(self, *probes: Probe) -> None:
        """Build each copy.

        Args:
            probes: All students and their outputs for a blank input.
        """
        for copy, (own, peer) in self._copies():
            student, teacher = _outputs_for(copy, probes[own].outputs, probes[peer].outputs)
            copy.build(probes[own]._replace(outputs=student), probes[peer]._replace(outputs=teacher))

    def forward(self, outputs: list[Outputs], student: int, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute the terms of one student, averaged over its peers.

        Args:
            outputs: Outputs of all students.
            student: Index of the student, from 0.
            batch: The batch.
        """
        terms: dict[str, Tensor] = {}
        for copy, (own, peer) in self._copies():
            if own == student:
                for key, term in named_terms("", copy(*_outputs_for(copy, outputs[own], outputs[peer]), batch)).items():
                    terms[key] = terms[key] + term if key in terms else term
        return {key: term / (len(outputs) - 1) for key, term in terms.items()}

    def _copies(self) -> list[tuple[DistillLoss, tuple[int, int]]]:
        return list(zip(self.parts, self.students, strict=True))


def _outputs_for(criterion: DistillLoss, own: Outputs, peer: Outputs) -> tuple[Outputs, Outputs]:
    """Select the features that a criterion reads from the outputs of two students, and detach those of the peer."""
    student = Outputs(own.logits, {layer: own.features[layer] for layer in criterion.student_layers})
    teacher = Outputs(peer.logits, {layer: peer.features[layer] for layer in criterion.teacher_layers})
    return student, tree_map_only(Tensor, Tensor.detach, teacher)


@former_members(taps="extractors")
class MutualModule(DistillModule):
    r"""Deep mutual learning: train several students jointly, each with the labels and with the outputs of its peers.

    $$ L_i = \text{hard\_weight} \cdot \mathrm{CE}(z_i, y)
       + \text{distill\_weight} \cdot \frac{1}{M - 1} \sum_{j \neq i} \mathrm{criterion}(z_i, z_j) $$

    The loss is the sum of $L_i$ over the M students. The outputs of the peers are detached. All students are saved in
    the checkpoint. The first one is stored as `model`: a checkpoint of this module can provide it as the teacher of
    another run, and its metrics determine the best checkpoint.

    Metrics of the first student are named as in `DistillModule`; those of the others have their number as a suffix:
    `val/acc`, `val/acc_2`, `train/kd_2`, ...

    Args:
        students: Networks to train, at least two; each returns logits `(B, K)`. Their architectures may differ.
        criterion: Distillation loss between a student and a peer; each pair has its own copy. `None` uses
            `KD(temperature=1.0)`.
        distill_weight: Weight of the criterion, at least 0.
        hard_weight: Weight of the cross-entropy with the labels, at least 0.
        kwargs: Arguments of `ClassificationModule`, except `model` and `model_ckpt`. The optimizer receives the
            trainable parameters of all students and criteria.

    Raises:
        ValueError: If there are fewer than two students, or if a weight is negative or both are 0. Before training, if
            the students have different numbers of classes.

    References:
        Zhang, Xiang, Hospedales, Lu: Deep Mutual Learning, CVPR 2018 (arXiv 1706.00384). The authors update the
        students one after the other, each with the latest outputs of its peers (algorithm 1). Here all students are
        updated at once from the same forward pass, as in the equations of the paper, which halves the cost for two
        students and allows a shared optimizer. The mean over the peers follows the paper; the authors' code sums the
        divergences without dividing by M - 1, which corresponds to `distill_weight` M - 1 here.
    """

    replaced_arguments = ("student", "student_ckpt", "teacher", "teacher_ckpt", "teacher_normalization")

    def __init__(
        self,
        students: list[nn.Module],
        criterion: DistillLoss | None = None,
        distill_weight: float = 1.0,
        hard_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if len(students) < 2:
            raise ValueError(f"MutualModule requires at least two students, got {len(students)}")
        mutual = Mutual(criterion if criterion is not None else KD(temperature=1.0), students)
        super().__init__(
            students[0],
            teacher=None,
            criterion=mutual,
            distill_weight=distill_weight,
            hard_weight=hard_weight,
            teacher_ckpt=None,
            student_ckpt=None,
            teacher_normalization=None,
            **kwargs,
        )
        self.extractors = [self.student_extractor]
        for number, student in enumerate(students[1:], 2):
            self.add_module(f"student_{number}", student)
            self.network_names += (f"student_{number}",)
            self.extractors.append(FeatureExtractor(student, mutual.layers_of(number - 1), self.task.logits))
            names = {f"{name}_{number}": metric for name, metric in self.task.metrics().items()}
            self.logit_metrics += tuple(names)
            self._reserved |= names.keys()
            for metrics in self.metrics.values():
                cast("nn.ModuleDict", metrics).update(deepcopy(names))

    @property
    def uses_teacher(self) -> bool:
        """Always False: the peers take the place of a teacher."""
        return False

    def build(self, example: Any) -> None:
        """Check the students with a blank input, and build the adapters of the criterion.

        Raises:
            ValueError: If a student fails on the input, or the criterion compares logits of different sizes.
        """
        named = zip(self.network_names, self.extractors, strict=True)
        probes = [self.probe(name, extractor, example) for name, extractor in named]
        classes = [self.task.num_outputs(probe.outputs.logits) for probe in probes]
        if self.criterion.reads_logits and self.distill_weight and len(set(classes)) > 1:
            raise ValueError(
                f"the students have {', '.join(map(str, classes))} classes, but the criterion compares their logits; "
                "num_classes must be the same for all students"
            )
        self.build_criterion(*probes)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the first student's logits `(B, K)` and the weighted terms of all students."""
        check_batch(self.criterion, batch)
        outputs: list[Outputs] = [extractor(batch.input) for extractor in self.extractors]
        terms = {}
        for number, own in enumerate(outputs):
            self.watch(self.network_names[number], own.logits)
            if self.hard_weight:
                terms[f"hard{_suffix(number)}"] = self.hard_weight * self._labels_loss(own, batch)
            if self.distill_weight:
                terms |= _numbered(self._terms_of(outputs, number, batch), number)
        self._reach_all(terms, *(logits for own in outputs for logits in self._supervised_logits(own)))
        return outputs[0].logits, terms

    def _terms_of(self, outputs: list[Outputs], student: int, batch: Batch) -> dict[str, Tensor]:
        return self._logged_terms(self.criterion(outputs, student, batch))

    def network_logits(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the logits of all students."""
        named = zip(self.network_names, self.extractors, strict=True)
        return {name: extractor(batch.input).logits for name, extractor in named}

    def update_metrics(self, metrics: MutableMapping[str, Metric], batch: Batch) -> Tensor:
        """Evaluate all students and the criterion of each on one batch."""
        self.student_extractor.clear()
        logits = ClassificationModule.update_metrics(self, metrics, batch)
        peers = [extractor(batch.input) for extractor in self.extractors[1:]]
        for number, peer in enumerate(peers, 2):
            own = {name: metrics[f"{name}_{number}"] for name in self.task_metrics}
            self.task.update(own, peer.logits, batch.target)

        def terms() -> dict[str, Tensor]:
            outputs = [self.student_extractor.outputs(logits), *peers]
            found: dict[str, Tensor] = {}
            for number in range(len(outputs)):
                own = with_total(self._terms_of(outputs, number, batch), self.criterion_curve)
                found |= _numbered(own, number)
            return found

        self.measure_criterion(metrics, batch, terms)
        return logits


def _suffix(student: int) -> str:
    return f"_{student + 1}" if student else ""


def _numbered(terms: dict[str, Tensor], student: int) -> dict[str, Tensor]:
    return {f"{name}{_suffix(student)}": term for name, term in terms.items()}
