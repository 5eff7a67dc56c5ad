"""Properties that every logit criterion guarantees, for all `LogitCase`s of tests/losses/methods/."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lkd import Batch, DistillLoss, Outputs
from lkd.types import IGNORE_INDEX
from tests.losses.cases import LogitCase
from tests.losses.collected import LOGIT_CASES

every = pytest.mark.parametrize("case", LOGIT_CASES.values(), ids=LOGIT_CASES)


def _target(logits: Tensor) -> Tensor:
    return torch.arange(len(logits)) % logits.shape[1]


def _value(criterion: DistillLoss, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
    batch = Batch(None, _target(student) if target is None else target, torch.arange(len(student)))
    features = {layer: torch.ones(len(student), 3) for layer in criterion.student_layers}
    loss = criterion(Outputs(student, features), Outputs(teacher, {}), batch)
    return loss if isinstance(loss, Tensor) else torch.stack(list(loss.values())).sum()


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 5, generator=generator) * 3, torch.randn(8, 5, generator=generator) * 3


@every
def test_only_the_student_gets_a_gradient(case: LogitCase, logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = (tensor.clone().requires_grad_() for tensor in logits)
    _value(case.make(), student, teacher.detach()).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@every
def test_inputs_are_not_modified(case: LogitCase, logits: tuple[Tensor, Tensor]) -> None:
    before = [tensor.clone() for tensor in logits]
    _value(case.make(), *logits)
    assert all(torch.equal(*pair) for pair in zip(before, logits, strict=True))


@every
def test_minimum(case: LogitCase, logits: tuple[Tensor, Tensor]) -> None:
    """The loss has its minimum where the paper states it: the gradient vanishes, and a distance is 0."""
    student, teacher = (tensor.double() for tensor in logits)
    best = case.best(teacher, _target(teacher)).clone()
    lowest, value = (_value(case.make(), tensor.requires_grad_(), teacher) for tensor in (best, student))
    here, there = (torch.autograd.grad(loss, tensor)[0].norm() for loss, tensor in ((lowest, best), (value, student)))
    assert here < 1e-4 * there
    assert lowest < value
    if case.zero_at_best:
        assert lowest.abs() < 1e-5 * value


@every
def test_invariances(case: LogitCase, logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = (tensor.double() for tensor in logits)
    value = _value(case.make(), student, teacher)
    if case.shift_invariant:
        shift = torch.linspace(-3, 3, 8, dtype=torch.float64).unsqueeze(1)
        torch.testing.assert_close(_value(case.make(), student + shift, teacher - shift), value)
    assert case.make().compares_samples != case.batch_mean
    if case.batch_mean:
        rows = [slice(i, i + 1) for i in range(8)]
        single = [_value(case.make(), student[row], teacher[row], _target(student)[row]) for row in rows]
        torch.testing.assert_close(torch.stack(single).mean(), value)


@every
def test_unlabelled_images(case: LogitCase, logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    target = _target(student)
    some = torch.where(torch.arange(8) % 2 == 0, IGNORE_INDEX, target)
    rows = slice(1, None, 2) if case.reads_target else slice(None)
    wanted = _value(case.make(), student[rows], teacher[rows], target[rows])
    torch.testing.assert_close(_value(case.make(), student, teacher, some), wanted)
    student = student.clone().requires_grad_()
    nothing = _value(case.make(), student, teacher, torch.full_like(target, IGNORE_INDEX))
    nothing.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert case.make().skips_unlabelled == case.reads_target
    if case.reads_target:
        assert nothing == 0
        assert not student.grad.any()


@every
def test_batch_of_one(case: LogitCase, logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = (tensor[:1] for tensor in logits)
    student = student.clone().requires_grad_()
    value = _value(case.make(), student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(case: LogitCase, logits: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    student, teacher = (tensor.to(dtype) for tensor in logits)
    value = _value(case.make(), student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, _value(case.make(), student.float(), teacher.float()))


@every
def test_autocast_keeps_single_precision(case: LogitCase, logits: tuple[Tensor, Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        value = _value(case.make(), *logits)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, _value(case.make(), *logits))


@every
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(case: LogitCase, size: float) -> None:
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
def test_gradient_descent_reduces_the_loss(case: LogitCase, logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    floor = _value(case.make(), case.best(teacher, _target(teacher)), teacher)
    student = student.clone().requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.2)
    first = _value(case.make(), student, teacher) - floor
    for _ in range(25):
        optimizer.zero_grad()
        _value(case.make(), student, teacher).backward()
        optimizer.step()
    assert _value(case.make(), student, teacher) - floor < 0.6 * first


@every
def test_compiled_equals_eager(case: LogitCase, logits: tuple[Tensor, Tensor]) -> None:
    torch.compiler.reset()
    criterion = case.make()
    compiled = torch.compile(_value, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(criterion, *logits), _value(criterion, *logits))
