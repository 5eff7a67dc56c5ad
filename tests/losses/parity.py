"""Helpers that compute lkd's values from the tensors in a file of reference values.

A method's file in tests/losses/methods/ defines its mappings as `PARITY`, which tests/test_parity.py collects.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lkd import Batch, DistillModule, Outputs, Probe
from lkd.losses import DistillLoss, named_terms
from lkd.types import IGNORE_INDEX

Values = dict[str, Tensor]
Hyper = dict[str, float]
Reference = Callable[[Values, Hyper], Values]
"""Function from the inputs and hyperparameters of a case to its values, by their names in the file."""


class Given(nn.Module):
    """A network that returns a tensor of the fixture."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, input: dict[str, Tensor]) -> Tensor:
        return input[self.name]


def weighted(criterion: DistillLoss, inputs: Values, distill: float = 1.0, hard: float = 1.0, views: int = 1) -> Values:
    """Compute a logit criterion and the cross-entropy with the weights of DistillModule."""
    student, teacher = Given("student_logits"), Given("teacher_logits")
    module = DistillModule(student, teacher, criterion, distill_weight=distill, hard_weight=hard)
    _, terms = module.losses(Batch(inputs, inputs["target"], views=views))
    weighted = torch.stack(list(terms.values())).sum()
    return {"loss": (weighted - terms["hard"]) / distill, "ce": terms["hard"] / hard, "weighted": weighted}


def layers(inputs: Values) -> tuple[list[str], list[str]]:
    """Return one layer name for each feature of student and teacher in the fixture."""
    kinds = ("student_features.", "teacher_features.")
    ours, theirs = (sorted(key for key in inputs if key.startswith(kind)) for kind in kinds)
    return ours, theirs


def outputs(criterion: DistillLoss, inputs: Values) -> tuple[Outputs, Outputs]:
    """Return the fixture's outputs of student and teacher: features `<network>_features.<number>`, in layer order."""
    both = []
    for network, layers in (("student", criterion.student_layers), ("teacher", criterion.teacher_layers)):
        features = {layer: inputs[f"{network}_features.{number}"] for number, layer in enumerate(layers)}
        logits = inputs.get(f"{network}_logits", inputs.get("student_logits", torch.zeros(1, 1)))
        both.append(Outputs(logits, features))
    return both[0], both[1]


def built(
    criterion: DistillLoss, inputs: Values, student: nn.Module | None = None, teacher: nn.Module | None = None
) -> DistillLoss:
    """Build a criterion's adapters for the fixture's shapes, in float64 and in training mode.

    Networks are required if the criterion reads the weights of their layers.
    """
    probes = zip((student, teacher), outputs(criterion, inputs), strict=True)
    criterion.build(*(Probe(network or nn.Identity(), output) for network, output in probes))
    return criterion.double().train()


def terms(
    criterion: DistillLoss,
    inputs: Values,
    index: Tensor | None = None,
    batch: Batch | None = None,
    **parameters: Tensor,
) -> Values:
    """Compute a criterion's terms, and their sum as `loss`, with parameters by their names in `named_parameters()`.

    By default, the batch consists of the fixture's labels and the index.

    Raises:
        KeyError: If the criterion has no such parameter, or another one is missing.
    """
    names = {name for name, _ in criterion.named_parameters()}
    if names != set(parameters):
        raise KeyError(f"parameters are {sorted(names)}, given are {sorted(parameters)}")
    student, teacher = outputs(criterion, inputs)
    batch = batch or Batch(None, inputs.get("target"), index)
    found = named_terms("", functional_call(criterion, parameters, (student, teacher, batch)))
    return {**found, "loss": torch.stack(list(found.values())).sum()}


def logits(criterion: DistillLoss, inputs: Values) -> Values:
    """Compute the terms of a logit criterion, for fixtures that name the logits `student` and `teacher`."""
    names = {"student": "student_logits", "teacher": "teacher_logits"}
    return terms(criterion, {names.get(name, name): tensor for name, tensor in inputs.items()})


def named(inputs: Values) -> Values:
    """Rename the features `student`, or `student.0`, ... (likewise for the teacher) as `layers` expects them."""
    named = dict(inputs)
    for network in ("student", "teacher"):
        for key in [key for key in inputs if key.partition(".")[0] == network]:
            named[f"{network}_features.{key.partition('.')[2] or 0}"] = inputs[key]
    return named


def layer_terms(criterion: DistillLoss, inputs: Values, **parameters: Tensor) -> Values:
    """Build a criterion of one layer and compute its terms, for fixtures that name the feature `student`."""
    features = named(inputs)
    return terms(built(criterion, features), features, **parameters)


def parameters(inputs: Values, **names: str) -> Values:
    """Rename the fixture's parameters: a mapping from prefixes in the fixture to prefixes in lkd."""
    given = {}
    for key, value in inputs.items():
        for theirs, ours in names.items():
            prefix = f"params.{theirs}."
            if key.startswith(prefix):
                given[f"{ours}.{key.removeprefix(prefix)}"] = value
    return given


def classifier(inputs: Values) -> nn.Module:
    """Return a network with the fixture's classifier."""
    head = nn.Linear(*inputs["teacher_fc.weight"].T.shape).double()
    head.load_state_dict({name: inputs[f"teacher_fc.{name}"] for name in ("weight", "bias")})
    return nn.Sequential(head)


def masks(inputs: Values, num_classes: int) -> Tensor:
    """Return the masks as prepared by lkd's tasks: labels without a class are ignored."""
    target = inputs["target"]
    return target.masked_fill((target < 0) | (target >= num_classes), IGNORE_INDEX)
