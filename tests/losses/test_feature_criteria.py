"""Properties that every feature criterion guarantees, for all `FeatureCase`s of tests/losses/methods/."""

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


def _every(name: str, value: bool = True) -> pytest.MarkDecorator:
    """Parametrize a test over the cases in which a flag has a value."""
    chosen = {key: case for key, case in FEATURE_CASES.items() if getattr(case, name) == value}
    assert chosen
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


@every
def test_only_student_and_adapters_get_gradients(case: FeatureCase) -> None:
    criterion = case.criterion()
    student, teacher = (changed(outputs, _leaf) for outputs in case.outputs())
    value(criterion, student, changed(teacher, Tensor.detach), case.batch()).backward()
    reached = [tensor for tensor in tensors(student) if tensor.grad is not None and tensor.grad.any()]
    assert reached
    assert all(tensor.grad is None for tensor in tensors(teacher))
    assert all(parameter.grad is not None for parameter in criterion.parameters() if parameter.requires_grad)


@every
def test_inputs_are_not_modified(case: FeatureCase) -> None:
    """A criterion leaves its inputs unchanged."""
    criterion, (student, teacher) = case.criterion(), case.outputs()
    with torch.no_grad():
        before = [tensor.clone() for tensor in (*tensors(student), *tensors(teacher))]
        value(criterion, student, teacher, case.batch())
    assert all(torch.equal(*pair) for pair in zip(before, (*tensors(student), *tensors(teacher)), strict=True))


@_every("zero_at_equality", False)
def test_losses_above_zero_have_a_reason(case: FeatureCase) -> None:
    """Only criteria whose networks differ, or that have adapters or no teacher, may be above 0 for equal outputs."""
    criterion = case.criterion()
    assert case.student != case.teacher or list(criterion.parameters()) or not criterion.needs_teacher


@_every("zero_at_equality")
def test_equal_outputs(case: FeatureCase) -> None:
    teacher = changed(case.outputs()[1], Tensor.double)
    criterion = case.criterion().double()
    names = zip(case.student, teacher.features.values(), strict=True)
    student = changed(teacher._replace(features=dict(names)), _leaf)
    other = changed(case.outputs(seed=1)[0], lambda tensor: _leaf(tensor.double()))
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
def test_unlabelled_images(case: FeatureCase) -> None:
    criterion, batch = case.criterion(), case.batch()
    student, teacher = (changed(outputs, _leaf) for outputs in case.outputs())
    nothing = value(criterion, student, teacher, batch._replace(target=torch.full_like(batch.target, IGNORE_INDEX)))
    assert nothing.isfinite()
    if not case.reads_target:
        torch.testing.assert_close(nothing, value(case.criterion(), student, teacher, batch))
    nothing.backward()
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in tensors(student))


@every
def test_smallest_batch(case: FeatureCase) -> None:
    student, teacher = case.outputs(case.min_samples)
    student = changed(student, _leaf)
    loss = value(case.criterion(), student, teacher, case.batch(case.min_samples))
    loss.backward()
    assert loss.isfinite()
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in tensors(student))


@_every("batch_mean")
def test_batch_mean(case: FeatureCase) -> None:
    criterion = case.criterion().eval().double()
    assert not criterion.compares_samples
    student, teacher = (changed(outputs, Tensor.double) for outputs in case.outputs())
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
def test_half_precision(case: FeatureCase, dtype: torch.dtype) -> None:
    """Losses under autocast are close to float32, with outputs in half precision and float32 adapters."""
    rounded = [changed(outputs, lambda tensor: tensor.to(dtype)) for outputs in case.outputs()]
    with torch.autocast("cpu", dtype):
        loss = value(case.criterion(), *rounded, case.batch())
    assert loss.dtype == torch.float32
    single = value(case.criterion(), *(changed(outputs, Tensor.float) for outputs in rounded), case.batch())
    torch.testing.assert_close(loss, single, rtol=0.05, atol=1e-3)


@every
@pytest.mark.parametrize("size", [1e4, 1e-4, 0.0])
def test_extreme_outputs(case: FeatureCase, size: float) -> None:
    student, teacher = case.outputs(size=size)
    student = changed(student, _leaf)
    criterion = case.criterion()
    loss = value(criterion, student, teacher, case.batch())
    loss.backward()
    assert loss.isfinite()
    grads = [tensor.grad for tensor in (*tensors(student), *criterion.parameters()) if tensor.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)


@every
def test_gradient_descent_reduces_the_loss(case: FeatureCase) -> None:
    criterion = case.criterion()
    student, teacher = case.outputs()
    student = changed(student, _leaf)
    memory = deepcopy(criterion)  # so that both values are computed with the same memories
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
    name = request.node.callspec.id
    is_variant = name.partition("-")[0] in FEATURE_CASES.keys() - {name}
    compiled = torch.compile(case.criterion(), fullgraph=True, backend="eager" if is_variant else "aot_eager")
    both, batch = case.outputs(), case.batch()
    torch.testing.assert_close(value(compiled, *both, batch), value(case.criterion(), *both, batch))


@every
def test_adapters_and_memories_are_restored(case: FeatureCase) -> None:
    """The state dict restores adapters and memories exactly: the restored criterion computes the same loss."""
    criterion = case.criterion()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True), *criterion.parameters()], lr=0.01)
    for seed in (1, 2):
        optimizer.zero_grad()
        student, teacher = case.outputs(seed=seed)
        value(criterion, changed(student, _leaf), teacher, case.batch()).backward()
        optimizer.step()
    torch.manual_seed(5)
    again = case.make()
    again.build(*_probes(case))
    again.load_state_dict(deepcopy(criterion.state_dict()))
    both = case.outputs(seed=3)
    assert torch.equal(value(again, *both, case.batch()), value(criterion, *both, case.batch()))


def _probes(case: FeatureCase) -> tuple[Probe, Probe]:
    torch.manual_seed(0)
    networks = (case.student_network(), case.teacher_network())
    student, teacher = (Probe(*pair) for pair in zip(networks, case.outputs(2), strict=True))
    return student, teacher


@every
def test_channels_last(case: FeatureCase) -> None:
    """Channels-last features, as `Speed` produces them, give the same loss."""

    def laid_out(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor.detach().requires_grad_()

    torch.manual_seed(1)
    expected = value(case.criterion(), *case.outputs(), case.batch())
    torch.manual_seed(1)
    student, teacher = (changed(outputs, laid_out) for outputs in case.outputs())
    found = value(case.criterion(), student, changed(teacher, Tensor.detach), case.batch())
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
