"""What every criterion owes its users, a row in the table for each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import lkd.losses
from lkd import Batch, DistillLoss, Outputs, Probe
from lkd.losses import (
    AT,
    CTKD,
    DIST,
    DKD,
    KD,
    MLKD,
    NKD,
    RLD,
    SKD,
    SSKD,
    TTM,
    USKD,
    WSLD,
    WTTM,
    LogitMSE,
    LogitStandardization,
    TfKD,
    WeightedSum,
)
from lkd.types import IGNORE_INDEX
from tests.losses.cases import CASES as FEATURE_CASES


@dataclass(frozen=True)
class Case:
    """A criterion and what its paper says of it.

    Attributes:
        make: Builds it.
        best: The student's logits that it asks for, from the teacher's logits and the targets.
        zero_at_best: Whether it is 0 there.
        shift_invariant: Whether a constant added to all of a sample's logits changes nothing.
        batch_mean: Whether it is the mean of its values for the single samples.
        reads_target: Whether it reads the labels; images without one then count as if they were not there.
    """

    make: Callable[[], DistillLoss]
    best: Callable[[Tensor, Tensor], Tensor] = lambda teacher, target: teacher
    zero_at_best: bool = True
    shift_invariant: bool = True
    batch_mean: bool = True
    reads_target: bool = False


def _sure(teacher: Tensor, target: Tensor) -> Tensor:
    """The label, and then as the teacher."""
    return teacher.scatter(1, target.unsqueeze(1), 60.0)


def _corrected(teacher: Tensor, target: Tensor) -> Tensor:
    """The teacher, with its first choice and the label exchanged."""
    first, label = teacher.argmax(1, keepdim=True), target.unsqueeze(1)
    swapped = teacher.scatter(1, first, teacher.gather(1, label))
    return swapped.scatter(1, label, teacher.gather(1, first))


def _zipf(teacher: Tensor, target: Tensor) -> Tensor:
    """The label, and then 1 / rank: the classes' order will do."""
    classes = torch.arange(teacher.shape[1])
    rank = classes + 2 - (classes > target.unsqueeze(1)).int()
    return _sure(-rank.to(teacher).log(), target)


def _virtual(teacher: Tensor, target: Tensor) -> Tensor:
    """0.9 for the label, the rest shared by the others."""
    rest = torch.full_like(teacher, 0.1 / (teacher.shape[1] - 1))
    return rest.scatter(1, target.unsqueeze(1), 0.9).log()


def _uskd() -> USKD:
    criterion = USKD("layer")
    probe = Probe(criterion, Outputs(torch.zeros(1, 5), {"layer": torch.ones(1, 3)}))
    criterion.build(probe, probe)
    torch.nn.init.zeros_(criterion.head.weight)  # the ranks are then the student's own
    torch.nn.init.zeros_(criterion.head.bias)
    return criterion


CASES = {
    "CTKD": Case(CTKD),
    "DIST": Case(DIST, batch_mean=False),
    "DIST-4": Case(lambda: DIST(beta=2.0, gamma=0.5, temperature=4.0), batch_mean=False),
    "DKD": Case(DKD, reads_target=True),
    "KD": Case(KD),
    "KD-1": Case(lambda: KD(temperature=1.0)),
    "LogitMSE": Case(LogitMSE, shift_invariant=False),
    "LogitStandardization": Case(lambda: LogitStandardization(KD(temperature=2.0))),
    "LogitStandardization-DKD": Case(lambda: LogitStandardization(DKD()), reads_target=True),
    "NKD": Case(NKD, best=_sure, zero_at_best=False, reads_target=True),
    "RLD": Case(RLD, best=_corrected, reads_target=True),
    "SKD": Case(SKD, shift_invariant=False, batch_mean=False),
    "TTM": Case(TTM, best=lambda teacher, target: teacher / 10),
    "TfKD": Case(lambda: TfKD(correct_probability=0.9), best=_virtual, reads_target=True),
    "USKD": Case(_uskd, best=_zipf, zero_at_best=False, batch_mean=False, reads_target=True),
    "WSLD": Case(WSLD, zero_at_best=False, reads_target=True),
    "WTTM": Case(WTTM, best=lambda teacher, target: teacher / 5),
    "WeightedSum": Case(lambda: WeightedSum({"soft": KD(), "sharp": KD(1.0)}, {"soft": 0.3})),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


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


def test_every_criterion_has_a_row() -> None:
    kinds = {name for name in lkd.losses.__all__ if inspect.isclass(getattr(lkd.losses, name))}
    elsewhere = {"PerAnchor"}  # it reads the predictions of detectors: tests/tasks/test_detection.py
    assert kinds - {"DistillLoss", "CompositeLoss"} - elsewhere <= set(CASES) | set(FEATURE_CASES)


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
def test_the_best_student(case: Case, logits: tuple[Tensor, Tensor]) -> None:
    """Where the paper has it: no gradient, less than elsewhere, and 0 if it is a distance."""
    student, teacher = (tensor.double() for tensor in logits)
    best = case.best(teacher, _target(teacher)).clone()
    lowest, value = (_value(case.make(), tensor.requires_grad_(), teacher) for tensor in (best, student))
    here, there = (torch.autograd.grad(loss, tensor)[0].norm() for loss, tensor in ((lowest, best), (value, student)))
    assert here < 1e-4 * there
    assert lowest < value
    if case.zero_at_best:
        assert lowest.abs() < 1e-5 * value


@every
def test_invariances(case: Case, logits: tuple[Tensor, Tensor]) -> None:
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
def test_images_without_a_label(case: Case, logits: tuple[Tensor, Tensor]) -> None:
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
def test_a_last_batch_of_one(case: Case, logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = (tensor[:1] for tensor in logits)
    student = student.clone().requires_grad_()
    value = _value(case.make(), student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_single(case: Case, logits: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    student, teacher = (tensor.to(dtype) for tensor in logits)
    value = _value(case.make(), student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, _value(case.make(), student.float(), teacher.float()))


@every
def test_autocast_keeps_single_precision(case: Case, logits: tuple[Tensor, Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        value = _value(case.make(), *logits)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, _value(case.make(), *logits))


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
def test_compiled_equals_eager(case: Case, logits: tuple[Tensor, Tensor]) -> None:
    torch.compiler.reset()
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
        ({"kd": KD()}, {"kd": float("nan")}, r"must not be negative, got \{'kd': nan\}; use finite"),
        ({"kd": KD()}, {"kd": float("inf")}, r"must not be negative, got \{'kd': inf\}; use finite"),
        ({"hard": KD()}, None, r"must not be named \['hard'\]"),
        (
            {"items": KD(), "kd.a": KD(), "": KD(), 1: KD()},
            None,
            r"be named \['items', 'kd.a', '', 1\]: a name",
        ),
        (
            {"kd": MLKD(), "sskd": SSKD()},
            None,
            r"WeightedSum read 2 and 4 views of each image, but all images of a batch",
        ),
    ],
)
def test_mistakes_in_a_weighted_sum(criteria, weights, says) -> None:
    with pytest.raises(ValueError, match=says):
        WeightedSum(criteria, weights)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: WeightedSum([KD()]), "WeightedSum requires a dict of names and criteria, got list"),
        (lambda: WeightedSum({"kd": KD}), r"WeightedSum requires .* got the class KD; create an instance: KD\(\)"),
        (lambda: LogitStandardization(nn.MSELoss()), "LogitStandardization requires a criterion .* got MSELoss; use a"),
        (
            lambda: AT(student_layers="layer1"),
            r"student_layers must be a list of layer names, got 'layer1'; use \['",
        ),
    ],
)
def test_what_is_no_criterion(make, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        make()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        KD(temperature)


def test_repr_shows_the_settings() -> None:
    assert repr(KD(temperature=2.0)) == "KD(temperature=2.0)"
    assert repr(AT()) == "AT(student_layers=('@stages',), teacher_layers=('@stages',), p=2.0)"
    assert "(soft): KD(temperature=4.0)" in repr(WeightedSum({"soft": KD()}))
