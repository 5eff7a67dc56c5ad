"""Property-based tests: every criterion has a finite value and gradient for all finite outputs.

`HYPOTHESIS_PROFILE=search pytest tests/losses/test_properties.py` tries more examples, different ones in each run.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lkd.losses
from lkd import Batch, DistillLoss, Outputs
from lkd.losses import FT, KD, KTA, LogitStandardization
from lkd.types import IGNORE_INDEX
from tests.losses.cases import FeatureCase, changed, tensors, value
from tests.losses.processes import table

PROFILES = {
    "suite": settings(max_examples=8, derandomize=True, deadline=None, database=None),
    "search": settings(max_examples=400, deadline=None, database=None),
}
profile = PROFILES[os.environ.get("HYPOTHESIS_PROFILE", "suite")]
TABLE = table()
every = pytest.mark.parametrize("name", TABLE)

LARGEST = 1e8
HALF = {torch.float16: 1e3, torch.bfloat16: LARGEST}
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "any": lambda tensor: tensor,
    "negative": lambda tensor: -tensor.abs(),
    "equal images": lambda tensor: tensor[:1].expand_as(tensor),
    "constant": lambda tensor: tensor.flatten()[0].expand_as(tensor),
    "one number": lambda tensor: tensor * (torch.arange(tensor[0].numel()) == 0).view(tensor[0].shape),
    "zeros": torch.zeros_like,
}
LABELS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda target: target,
    "one class": torch.zeros_like,
    "some": lambda target: target.index_fill(0, torch.arange(0, len(target), 2), IGNORE_INDEX),
    "none": lambda target: torch.full_like(target, IGNORE_INDEX),
}


@dataclass(frozen=True)
class Situation:
    """Properties of the inputs of one step.

    Attributes:
        samples: Number of images in the batch.
        classes: Number of classes, if the case's networks do not fix it.
        shrink: Factor by which the feature maps are smaller than in the case.
        dtype: Data type of the outputs. Half precision is used under autocast, as in a run.
        sizes: Scale of the student's outputs, and of the teacher's.
        forms: Form of the student's outputs, and of the teacher's.
        labels: Which images are labelled.
        same_index: Whether all images have the same index in the dataset.
        equal: Whether the student's outputs equal the teacher's where the shapes agree.
        seed: Seed of the random outputs.
    """

    samples: int = 8
    classes: int = 5
    shrink: int = 1
    dtype: torch.dtype = torch.float32
    sizes: tuple[float, float] = (1.0, 1.0)
    forms: tuple[str, str] = ("any", "any")
    labels: str = "all"
    same_index: bool = False
    equal: bool = False
    seed: int = 0

    def outputs(self, case: FeatureCase) -> tuple[Outputs, Outputs]:
        """Return random outputs of student and teacher."""
        limit = HALF.get(self.dtype, LARGEST)
        both = zip(case.outputs(self.samples, seed=self.seed), self.sizes, self.forms, strict=True)
        student, teacher = (
            changed(
                outputs,
                lambda tensor, size=size, form=form: (size * FORMS[form](tensor)).clamp(-limit, limit).to(self.dtype),
            )
            for outputs, size, form in both
        )
        if self.equal:
            pairs = zip(student.features.items(), teacher.features.values(), strict=False)
            same = {name: other for (name, own), other in pairs if own.shape == other.shape}
            student = Outputs(teacher.logits, {**student.features, **same})
        return changed(student, lambda tensor: tensor.clone().requires_grad_()), teacher

    def batch(self, case: FeatureCase) -> Batch:
        """Return the labels and indices of the batch."""
        batch = case.batch(self.samples)
        target = LABELS[self.labels](batch.target)
        return batch._replace(target=target, index=torch.zeros_like(batch.index) if self.same_index else batch.index)

    def may_raise(self) -> bool:
        """Return whether a criterion may raise an error: there are too few classes, images or pixels."""
        return self.classes < 3 or self.samples == 1 or self.shrink > 1


def _sizes() -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from([1.0, LARGEST]), st.floats(-45, 8).map(lambda power: 10**power))


situations = st.builds(
    Situation,
    samples=st.sampled_from([8, 1, 2, 3]),
    classes=st.sampled_from([5, 1, 2, 3, 40]),
    shrink=st.sampled_from([1, 2, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    sizes=st.tuples(_sizes(), _sizes()),
    forms=st.tuples(st.sampled_from(list(FORMS)), st.sampled_from(list(FORMS))),
    labels=st.sampled_from(list(LABELS)),
    same_index=st.booleans(),
    equal=st.booleans(),
    seed=st.integers(0, 2**20),
)


def _loss(criterion: DistillLoss, case: FeatureCase, situation: Situation) -> tuple[Tensor, Outputs]:
    """Return the loss, computed in the precision of a run, and the student's outputs."""
    (student, teacher), batch = situation.outputs(case), situation.batch(case)
    if situation.dtype in HALF:
        with torch.autocast("cpu", situation.dtype):
            return value(criterion, student, teacher, batch), student
    return value(criterion.to(situation.dtype), student, teacher, batch), student


@every
@profile
@example(Situation(equal=True))
@example(Situation(classes=1))
@example(Situation(classes=2))
@example(Situation(samples=1))
@example(Situation(forms=("equal images", "equal images"), same_index=True))
@example(Situation(forms=("zeros", "zeros")))
@example(Situation(sizes=(LARGEST, LARGEST)))
@example(Situation(sizes=(LARGEST, 1e-30), labels="one class"))
@example(Situation(sizes=(1e-30, LARGEST), labels="some"))
@example(Situation(dtype=torch.bfloat16, sizes=(LARGEST, LARGEST), labels="none"))
@example(Situation(dtype=torch.float16, sizes=(LARGEST, LARGEST)))
@example(Situation(dtype=torch.float16, forms=("one number", "any")))
@example(Situation(sizes=(1e-41, 1.0)))
@given(situation=situations)
def test_finite_outputs(name: str, situation: Situation) -> None:
    """Value and gradient are finite, unless an error reports too few classes, images or pixels."""
    case = TABLE[name].of(situation.classes, situation.shrink)
    try:
        criterion = case.criterion()
        loss, student = _loss(criterion, case, situation)
    except ValueError:
        if not situation.may_raise():
            raise
        return
    assert loss.isfinite(), loss
    # A float16 gradient may overflow until the loss scaler of mixed precision has reduced the scale far enough.
    (loss * 2**-40 if situation.dtype == torch.float16 else loss).backward()
    grads = [tensor.grad for tensor in (*tensors(student), *criterion.parameters()) if tensor.grad is not None]
    assert all(grad.isfinite().all() for grad in grads), [grad.shape for grad in grads if not grad.isfinite().all()]


@every
@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_degenerate_outputs(name: str, form: str) -> None:
    """The gradient stays bounded if all images have equal features or neurons are inactive."""
    loss, student = _loss(TABLE[name].criterion(), TABLE[name], Situation(forms=(form, "any")))
    loss.backward()
    assert all(tensor.grad.abs().max() < 1e8 for tensor in tensors(student) if tensor.grad is not None)


def _replaced(outputs: Outputs, layer: str, place: int, number: float) -> Outputs:
    """Return the outputs with one entry of a layer replaced; an empty name selects the logits."""
    tensor = outputs.features[layer] if layer else outputs.logits
    other = tensor.flatten().index_fill(0, torch.tensor([place % tensor.numel()]), number).view_as(tensor)
    return outputs._replace(features={**outputs.features, layer: other}) if layer else outputs._replace(logits=other)


@every
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_invalid_teacher_outputs_are_not_hidden(name: str, broken: float) -> None:
    """A non-finite teacher output makes the loss non-finite, unless the loss does not depend on that entry."""
    case = TABLE[name]
    if case.signs_only and broken == torch.inf:
        return
    student, teacher = case.outputs()

    def compared(other: Outputs) -> Tensor:
        return value(case.criterion(), student, other, case.batch())

    shown = not case.criterion().needs_teacher
    for layer in ("", *case.teacher):
        for place in (0, 123, -1):
            if compared(_replaced(teacher, layer, place, broken)).isfinite():
                values = [compared(_replaced(teacher, layer, place, number)) for number in (1e4, -1e4)]
                assert values[0] == values[1]
            else:
                shown = True
    assert shown


@every
@pytest.mark.parametrize("label", [-1, 5, 1000])
def test_labels_out_of_range(name: str, label: int) -> None:
    """Invalid labels raise an error, unless the criterion reads only which images are labelled."""
    case = TABLE[name]
    batch = case.batch()

    def compared(label: int) -> Tensor:
        target = batch.target.index_fill(0, torch.tensor([1]), label)
        return value(case.criterion(), *case.outputs(), batch._replace(target=target))

    message = ""
    try:
        found = compared(label)
    except ValueError as error:
        message = str(error)
    if message:
        assert "a label is out of range" in message
        assert "labels must lie in 0..4, or be -100" in message
    else:
        assert all(torch.equal(compared(number), found) for number in range(5))


@every
def test_masks_for_criteria_of_images(name: str) -> None:
    """Masks raise an error, unless the criterion does not read the labels."""
    case = TABLE[name]
    batch = case.batch()
    if not isinstance(batch.target, Tensor):
        return  # boxes
    masks = batch._replace(target=batch.target.view(len(batch.target), -1)[:, :1, None].repeat(1, 8, 8))
    message = ""
    try:
        found = value(case.criterion(), *case.outputs(), masks)
    except ValueError as error:
        message = str(error)
    assert "one class per image" in message if message else found.isfinite()


def _numeric_settings() -> list[tuple[type[DistillLoss], str]]:
    """Return all numeric settings of all criteria."""
    kinds = (getattr(lkd.losses, name) for name in lkd.losses.__all__)
    criteria = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, DistillLoss)]
    return [
        (kind, setting.name)
        for kind in criteria
        for setting in inspect.signature(kind).parameters.values()
        if setting.annotation == "float"
    ]


@pytest.mark.parametrize(("kind", "setting"), _numeric_settings())
@pytest.mark.parametrize("number", [-1.0, float("nan"), float("inf")])
def test_invalid_settings(kind: type[DistillLoss], setting: str, number: float) -> None:
    if number == float("inf") and (kind, setting) in {(KTA, "p"), (KTA, "q"), (FT, "p")}:
        return  # an infinite p selects the maximum norm
    parts = {"criterion": KD()} if kind is LogitStandardization else {}
    with pytest.raises(ValueError, match=rf"{setting}\b.* got .*{number}"):
        kind(**parts, **{setting: number})
