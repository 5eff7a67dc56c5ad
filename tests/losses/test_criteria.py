"""What every criterion owes its users, a row in the table for each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import lkd.losses
from lkd import Batch, DistillLoss, Outputs
from lkd.losses import KD, WeightedSum


@dataclass(frozen=True)
class Case:
    """A criterion and what its paper says of it.

    Attributes:
        make: Builds it.
        zero_at_equality: Whether it is 0 where the student answers as the teacher does.
        shift_invariant: Whether a constant added to all of a sample's logits changes nothing.
        batch_mean: Whether it is the mean of its values for the single samples.
    """

    make: Callable[[], DistillLoss]
    zero_at_equality: bool = True
    shift_invariant: bool = True
    batch_mean: bool = True


CASES = {
    "KD": Case(KD),
    "KD-1": Case(lambda: KD(temperature=1.0)),
    "WeightedSum": Case(lambda: WeightedSum({"soft": KD(), "sharp": KD(1.0)}, {"soft": 0.3})),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _value(criterion: DistillLoss, student: Tensor, teacher: Tensor) -> Tensor:
    batch = Batch(None, torch.arange(len(student)) % student.shape[1], torch.arange(len(student)))
    loss = criterion(Outputs(student, {}), Outputs(teacher, {}), batch)
    return loss if isinstance(loss, Tensor) else torch.stack(list(loss.values())).sum()


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 5, generator=generator) * 3, torch.randn(8, 5, generator=generator) * 3


def test_every_criterion_has_a_row() -> None:
    kinds = {name for name in lkd.losses.__all__ if inspect.isclass(getattr(lkd.losses, name))} - {"DistillLoss"}
    assert kinds <= set(CASES)


@every
def test_gradient_reaches_the_student_alone(case: Case, logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = (tensor.clone().requires_grad_() for tensor in logits)
    _value(case.make(), student, teacher.detach()).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@every
def test_inputs_stay_as_they_are(case: Case, logits: tuple[Tensor, Tensor]) -> None:
    before = [tensor.clone() for tensor in logits]
    _value(case.make(), *logits)
    assert all(torch.equal(*pair) for pair in zip(before, logits, strict=True))


@every
def test_equality_is_the_minimum(case: Case, logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    lowest = _value(case.make(), teacher, teacher)
    assert lowest < _value(case.make(), student, teacher)
    if case.zero_at_equality:
        assert lowest.abs() < 1e-6


@every
def test_invariances(case: Case, logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = (tensor.double() for tensor in logits)
    value = _value(case.make(), student, teacher)
    if case.shift_invariant:
        shift = torch.linspace(-3, 3, 8, dtype=torch.float64).unsqueeze(1)
        torch.testing.assert_close(_value(case.make(), student + shift, teacher - shift), value)
    if case.batch_mean:
        single = [_value(case.make(), student[i : i + 1], teacher[i : i + 1]) for i in range(8)]
        torch.testing.assert_close(torch.stack(single).mean(), value)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_single(case: Case, logits: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    student, teacher = (tensor.to(dtype) for tensor in logits)
    value = _value(case.make(), student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, _value(case.make(), student.float(), teacher.float()))


@every
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_are_finite(case: Case, size: float) -> None:
    student = torch.zeros(2, 5)
    student[:, 0] = size
    student.requires_grad_()
    teacher = torch.zeros(2, 5)
    teacher[:, 1] = size
    value = _value(case.make(), student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@every
def test_descent_lowers_it(case: Case, logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    student = student.clone().requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.1)
    first = _value(case.make(), student, teacher)
    for _ in range(50):
        optimizer.zero_grad()
        _value(case.make(), student, teacher).backward()
        optimizer.step()
    assert _value(case.make(), student, teacher) < 0.5 * first


@every
def test_compiled_equals_eager(case: Case, logits: tuple[Tensor, Tensor]) -> None:
    criterion = case.make()
    compiled = torch.compile(_value, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(criterion, *logits), _value(criterion, *logits))


def test_kd_is_the_textbook_s(logits: tuple[Tensor, Tensor]) -> None:
    """The definition, term by term."""
    student, teacher = (tensor.double() for tensor in logits)
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        q, p = ((row / 4).exp() / (row / 4).exp().sum() for row in (ours, theirs))
        total += sum(float(p[c] * (p[c].log() - q[c].log())) for c in range(5))
    assert _value(KD(temperature=4.0), student, teacher).item() == pytest.approx(16 * total / 8, rel=1e-12)


def test_temperature_keeps_the_gradient_s_size() -> None:
    """For small logits the gradient does not depend on the temperature: that is what its square is for."""
    student, teacher = torch.tensor([[1e-3, 0, 0]], dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    grads = []
    for temperature in (2.0, 20.0):
        logits = student.clone().requires_grad_()
        _value(KD(temperature), logits, teacher).backward()
        grads.append(logits.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=0)


def test_weighted_sum(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    criterion = WeightedSum({"soft": KD(2.0), "sharp": KD(1.0)}, weights={"soft": 0.25})
    terms = criterion(Outputs(student, {}), Outputs(teacher, {}), Batch(None, torch.zeros(8)))
    torch.testing.assert_close(terms["soft"], 0.25 * _value(KD(2.0), student, teacher))
    torch.testing.assert_close(terms["sharp"], _value(KD(1.0), student, teacher))


@pytest.mark.parametrize(
    ("criteria", "weights", "says"),
    [
        ({}, None, "at least one criterion"),
        ({"kd": KD()}, {"kd": -1.0}, r"must not be negative, got \{'kd': -1.0\}"),
        ({"kd": KD()}, {"dk": 1.0}, r"weights for \['dk'\], but its criteria are \['kd'\]"),
        ({"hard": KD()}, None, r"must not be called \['hard'\]"),
    ],
)
def test_mistakes_in_a_weighted_sum(criteria, weights, says) -> None:
    with pytest.raises(ValueError, match=says):
        WeightedSum(criteria, weights)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        KD(temperature)
