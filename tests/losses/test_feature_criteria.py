"""Properties that every criterion of features guarantees, for all `FeatureCase`s of tests/losses/methods/."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from lkd import Probe
from lkd.types import IGNORE_INDEX
from tests.losses.cases import SAMPLES, FeatureCase, changed, tensors, value
from tests.losses.collected import FEATURE_CASES

every = pytest.mark.parametrize("case", FEATURE_CASES.values(), ids=FEATURE_CASES)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


@every
def test_gradient_reaches_student_and_adapters_alone(case: FeatureCase) -> None:
    criterion = case.criterion()
    answers = case.answers()
    student, teacher = (changed(outputs, _leaf) for outputs in answers)
    value(criterion, student, changed(teacher, Tensor.detach), case.batch()).backward()
    reached = [tensor for tensor in tensors(student) if tensor.grad is not None and tensor.grad.any()]
    assert reached
    assert all(tensor.grad is None for tensor in tensors(teacher))
    assert all(parameter.grad is not None for parameter in criterion.parameters() if parameter.requires_grad)


@every
def test_a_teacher_that_wants_gradients_gets_none(case: FeatureCase) -> None:
    """DistillModule runs the teacher without gradient; a criterion called by hand must not need that."""
    criterion, (student, teacher) = case.criterion(), case.answers()
    with torch.no_grad():
        before = [tensor.clone() for tensor in (*tensors(student), *tensors(teacher))]
        value(criterion, student, teacher, case.batch())
    assert all(torch.equal(*pair) for pair in zip(before, (*tensors(student), *tensors(teacher)), strict=True))


@every
def test_equal_answers(case: FeatureCase) -> None:
    _, teacher = case.answers()
    if not case.zero_at_equality:
        criterion = case.criterion()
        differ = case.student != case.teacher or list(criterion.parameters()) or not criterion.needs_teacher
        assert differ, "is it not 0 at equality?"
        return
    teacher = changed(teacher, Tensor.double)
    criterion = case.criterion().double()
    names = zip(case.student, teacher.features.values(), strict=True)
    student = changed(teacher._replace(features=dict(names)), _leaf)
    other = changed(case.answers(seed=1)[0], lambda tensor: _leaf(tensor.double()))
    zero, more = (value(criterion, outputs, teacher, case.batch()) for outputs in (student, other))
    assert zero.abs() < 1e-5 * more
    zero.backward()
    more.backward()
    here, there = (
        sum(float(tensor.grad.norm()) for tensor in tensors(outputs) if tensor.grad is not None)
        for outputs in (student, other)
    )
    assert here < 1e-4 * there


@every
def test_images_without_a_label(case: FeatureCase) -> None:
    criterion, batch = case.criterion(), case.batch()
    student, teacher = (changed(outputs, _leaf) for outputs in case.answers())
    nothing = value(criterion, student, teacher, batch._replace(target=torch.full_like(batch.target, IGNORE_INDEX)))
    assert nothing.isfinite()
    if not case.reads_target:
        torch.testing.assert_close(nothing, value(case.criterion(), student, teacher, batch))
    nothing.backward()
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in tensors(student))


@every
def test_a_small_batch(case: FeatureCase) -> None:
    student, teacher = case.answers(case.min_samples)
    student = changed(student, _leaf)
    loss = value(case.criterion(), student, teacher, case.batch(case.min_samples))
    loss.backward()
    assert loss.isfinite()
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in tensors(student))


@every
def test_the_mean_over_the_batch(case: FeatureCase) -> None:
    if not case.batch_mean:
        return
    criterion = case.criterion().eval().double()
    assert not criterion.compares_samples
    student, teacher = (changed(outputs, Tensor.double) for outputs in case.answers())
    whole = value(criterion, student, teacher, case.batch())
    halves = []
    for half in torch.arange(SAMPLES * case.views).view(case.views, 2, -1).unbind(1):
        rows, batch = half.flatten(), case.batch()
        own, other = (changed(outputs, lambda tensor, rows=rows: tensor[rows]) for outputs in (student, teacher))
        part = batch._replace(target=batch.target[rows], index=batch.index[rows])
        halves.append(value(criterion, own, other, part))
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_single(case: FeatureCase, dtype: torch.dtype) -> None:
    """As under autocast: the networks' answers are in half precision, the adapters' parameters are not."""
    rounded = [changed(outputs, lambda tensor: tensor.to(dtype)) for outputs in case.answers()]
    with torch.autocast("cpu", dtype):
        loss = value(case.criterion(), *rounded, case.batch())
    assert loss.dtype == torch.float32
    single = value(case.criterion(), *(changed(outputs, Tensor.float) for outputs in rounded), case.batch())
    torch.testing.assert_close(loss, single, rtol=0.05, atol=1e-3)


@every
@pytest.mark.parametrize("size", [1e4, 1e-4, 0.0])
def test_extreme_answers_are_finite(case: FeatureCase, size: float) -> None:
    student, teacher = case.answers(size=size)
    student = changed(student, _leaf)
    criterion = case.criterion()
    loss = value(criterion, student, teacher, case.batch())
    loss.backward()
    assert loss.isfinite()
    grads = [tensor.grad for tensor in (*tensors(student), *criterion.parameters()) if tensor.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)


@every
def test_descent_lowers_it(case: FeatureCase) -> None:
    criterion = case.criterion()
    student, teacher = case.answers()
    student = changed(student, _leaf)
    memory = deepcopy(criterion)  # what a criterion remembers is not to change between the two readings
    first = value(deepcopy(memory), student, teacher, case.batch())
    optimizer = torch.optim.Adam([*tensors(student), *criterion.parameters()], lr=case.lr)
    for _ in range(40):
        optimizer.zero_grad()
        value(criterion, student, teacher, case.batch()).backward()
        optimizer.step()
    memory.load_state_dict({**memory.state_dict(), **dict(criterion.named_parameters())})
    last = value(memory, student, teacher, case.batch())
    assert last < first - 0.1 * first.abs()


@every
def test_compiled_equals_eager(case: FeatureCase, request: pytest.FixtureRequest) -> None:
    """All are traced as one graph; AOTAutograd, which takes as long, traces one case of each criterion."""
    torch.compiler.reset()
    if case.no_compile:
        return
    name = request.node.callspec.id
    is_variant = name.partition("-")[0] in FEATURE_CASES.keys() - {name}
    compiled = torch.compile(case.criterion(), fullgraph=True, backend="eager" if is_variant else "aot_eager")
    answers, batch = case.answers(), case.batch()
    torch.testing.assert_close(value(compiled, *answers, batch), value(case.criterion(), *answers, batch))


@every
def test_adapters_and_memories_are_saved(case: FeatureCase) -> None:
    """What was learned and remembered comes back from the state dict, bit by bit."""
    criterion = case.criterion()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True), *criterion.parameters()], lr=0.01)
    for seed in (1, 2):
        optimizer.zero_grad()
        student, teacher = case.answers(seed=seed)
        value(criterion, changed(student, _leaf), teacher, case.batch()).backward()
        optimizer.step()
    torch.manual_seed(5)
    again = case.make()
    again.build(*_probes(case))
    again.load_state_dict(deepcopy(criterion.state_dict()))
    answers = case.answers(seed=3)
    assert torch.equal(value(again, *answers, case.batch()), value(criterion, *answers, case.batch()))


def _probes(case: FeatureCase) -> tuple[Probe, Probe]:
    torch.manual_seed(0)
    networks = (case.student_network(), case.teacher_network())
    student, teacher = (Probe(*pair) for pair in zip(networks, case.answers(2), strict=True))
    return student, teacher


@every
def test_channels_last_says_the_same(case: FeatureCase) -> None:
    """As networks return them when `Speed` lays their weights out so."""

    def laid_out(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor.detach().requires_grad_()

    torch.manual_seed(1)
    expected = value(case.criterion(), *case.answers(), case.batch())
    torch.manual_seed(1)
    student, teacher = (changed(outputs, laid_out) for outputs in case.answers())
    found = value(case.criterion(), student, changed(teacher, Tensor.detach), case.batch())
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
