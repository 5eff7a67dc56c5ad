"""Numbers that misbehave: every criterion keeps the promise of `DistillLoss`, whatever finite answers it compares.

`HYPOTHESIS_PROFILE=search pytest tests/losses/test_properties.py` looks at more of them, other ones each time.
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
    """What a step may meet.

    Attributes:
        samples: Images in the batch.
        classes: Classes, where the case's networks leave a choice.
        shrink: By what the feature maps are smaller than in the table.
        dtype: What the networks answer in; in half precision under autocast, as in a run.
        sizes: Size of the student's answers, and of the teacher's.
        forms: Form of the student's answers, and of the teacher's.
        labels: Which images have a label.
        same_index: Whether all images are the same one of the data set.
        equal: Whether the student says what the teacher says, where shapes agree.
        seed: What the answers are drawn from.
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

    def answers(self, case: FeatureCase) -> tuple[Outputs, Outputs]:
        """What student and teacher say."""
        limit = HALF.get(self.dtype, LARGEST)
        both = zip(case.answers(self.samples, seed=self.seed), self.sizes, self.forms, strict=True)
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
        """Labels and positions."""
        batch = case.batch(self.samples)
        target = LABELS[self.labels](batch.target)
        return batch._replace(target=target, index=torch.zeros_like(batch.index) if self.same_index else batch.index)

    def may_refuse(self) -> bool:
        """Whether a criterion may say that it cannot work here: too few classes, images or pixels."""
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
    """The value, as a run computes it, and what the student said."""
    (student, teacher), batch = situation.answers(case), situation.batch(case)
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
def test_finite_answers(name: str, situation: Situation) -> None:
    """Value and gradient are finite; or too few classes, images or pixels are refused in a sentence."""
    case = TABLE[name].of(situation.classes, situation.shrink)
    try:
        criterion = case.criterion()
        loss, student = _loss(criterion, case, situation)
    except ValueError:
        if not situation.may_refuse():
            raise
        return
    assert loss.isfinite(), loss
    # In float16 a gradient may be too large, until the loss scaler of mixed precision has halved it often enough.
    (loss * 2**-40 if situation.dtype == torch.float16 else loss).backward()
    grads = [tensor.grad for tensor in (*tensors(student), *criterion.parameters()) if tensor.grad is not None]
    assert all(grad.isfinite().all() for grad in grads), [grad.shape for grad in grads if not grad.isfinite().all()]


@every
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_where_little_is_said(name: str, form: str) -> None:
    """Images that a student sees alike, and neurons that say nothing, do not blow the gradient up."""
    loss, student = _loss(TABLE[name].criterion(), TABLE[name], Situation(forms=(form, "any")))
    loss.backward()
    assert all(tensor.grad.abs().max() < 1e8 for tensor in tensors(student) if tensor.grad is not None)


def _with(outputs: Outputs, layer: str, place: int, number: float) -> Outputs:
    """The answers with one number changed, of a layer or, without a name, of the logits."""
    tensor = outputs.features[layer] if layer else outputs.logits
    other = tensor.flatten().index_fill(0, torch.tensor([place % tensor.numel()]), number).view_as(tensor)
    return outputs._replace(features={**outputs.features, layer: other}) if layer else outputs._replace(logits=other)


@every
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_teacher_is_not_hidden(name: str, broken: float) -> None:
    """The value is not finite, unless it stands where nothing is read: the value is the same for any number."""
    case = TABLE[name]
    if case.signs_only and broken == torch.inf:
        return
    student, teacher = case.answers()

    def compared(other: Outputs) -> Tensor:
        return value(case.criterion(), student, other, case.batch())

    shown = not case.criterion().needs_teacher
    for layer in ("", *case.teacher):
        for place in (0, 123, -1):
            if compared(_with(teacher, layer, place, broken)).isfinite():
                values = [compared(_with(teacher, layer, place, number)) for number in (1e4, -1e4)]
                assert values[0] == values[1]
            else:
                shown = True
    assert shown


@every
@pytest.mark.parametrize("label", [-1, 5, 1000])
def test_labels_out_of_range(name: str, label: int) -> None:
    """They get a sentence, unless only which images have a label is read."""
    case = TABLE[name]
    batch = case.batch()

    def compared(label: int) -> Tensor:
        target = batch.target.index_fill(0, torch.tensor([1]), label)
        return value(case.criterion(), *case.answers(), batch._replace(target=target))

    says = ""
    try:
        found = compared(label)
    except ValueError as error:
        says = str(error)
    if says:
        assert "a label is out of range" in says
        assert "labels must lie in 0..4, or be -100" in says
    else:
        assert all(torch.equal(compared(number), found) for number in range(5))


@every
def test_masks_for_criteria_of_images(name: str) -> None:
    """They are rejected, unless the labels are not read."""
    case = TABLE[name]
    batch = case.batch()
    if not isinstance(batch.target, Tensor):
        return  # boxes
    masks = batch._replace(target=batch.target.view(len(batch.target), -1)[:, :1, None].repeat(1, 8, 8))
    says = ""
    try:
        found = value(case.criterion(), *case.answers(), masks)
    except ValueError as error:
        says = str(error)
    assert "one class per image" in says if says else found.isfinite()


def _numbers() -> list[tuple[type[DistillLoss], str]]:
    """All settings of all criteria that are one number."""
    kinds = (getattr(lkd.losses, name) for name in lkd.losses.__all__)
    criteria = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, DistillLoss)]
    return [
        (kind, setting.name)
        for kind in criteria
        for setting in inspect.signature(kind).parameters.values()
        if setting.annotation == "float"
    ]


@pytest.mark.parametrize(("kind", "setting"), _numbers())
@pytest.mark.parametrize("number", [-1.0, float("nan"), float("inf")])
def test_settings_that_make_no_sense(kind: type[DistillLoss], setting: str, number: float) -> None:
    if number == float("inf") and (kind, setting) in {(KTA, "p"), (KTA, "q"), (FT, "p")}:
        return  # of a norm, the largest entry
    parts = {"criterion": KD()} if kind is LogitStandardization else {}
    with pytest.raises(ValueError, match=rf"{setting}\b.* got .*{number}"):
        kind(**parts, **{setting: number})
