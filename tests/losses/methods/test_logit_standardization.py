"""LogitStandardization: logit standardization in knowledge distillation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lkd import Batch, DistillLoss, Outputs, Probe
from lkd import functional as KF
from lkd.losses import CTKD, DKD, KD, MLKD, SSKD, USKD, LogitStandardization, MultiTeacher, TfKD, WeightedSum
from tests.losses import parity
from tests.losses.cases import FeatureCase, LogitCase
from tests.losses.parity import Hyper, Values

CASES = {
    "LogitStandardization-MLKD": FeatureCase(lambda: LogitStandardization(MLKD()), views=2, zero_at_equality=True),
    "LogitStandardization": LogitCase(lambda: LogitStandardization(KD(temperature=2.0))),
    "LogitStandardization-DKD": LogitCase(lambda: LogitStandardization(DKD()), reads_target=True),
}


def _logit_std_kd(inputs: Values, hyper: Hyper) -> Values:
    temperature, eps = hyper["temperature"], hyper["eps"]
    criterion = LogitStandardization(KD(temperature), eps)
    dkd = LogitStandardization(DKD(hyper["dkd_alpha"], hyper["dkd_beta"], temperature), eps)
    values = parity.weighted(criterion, inputs, hyper["kd_weight"], hyper["ce_weight"])
    return {**values, "loss.dkd": parity.terms(dkd, inputs)["loss"]}


PARITY = {"logit_std_kd": _logit_std_kd}


def _call(criterion: DistillLoss, student: Tensor, teacher: Tensor, target: Tensor | None = None):
    return criterion(Outputs(student, {}), Outputs(teacher, {}), Batch(None, target))


def test_standardization_is_invariant_to_scale(logits, target) -> None:
    student, teacher = logits
    size = torch.linspace(0.1, 10, 8, dtype=torch.float64).unsqueeze(1)
    for criterion in (LogitStandardization(KD(2.0)), LogitStandardization(DKD())):
        wanted = _call(criterion, student, teacher, target)
        torch.testing.assert_close(
            _call(criterion, size * student + size, teacher / size, target), wanted, rtol=1e-5, atol=0
        )


def test_standardization_equals_numpy(logits) -> None:
    rows = logits[0].numpy()
    expected = (rows - rows.mean(1, keepdims=True)) / (rows.std(1, ddof=1, keepdims=True) + 1e-7)
    np.testing.assert_allclose(KF.standardize(logits[0]), expected, rtol=1e-12)


def test_wrapper_has_the_attributes_of_its_criterion() -> None:
    inner = WeightedSum({"ctkd": CTKD(), "uskd": USKD("pool")})
    wrapper = LogitStandardization(inner)
    assert (wrapper.student_layers, wrapper.name, wrapper.needs_index, wrapper.reads_logits) == (
        ("pool",),
        "",
        False,
        True,
    )
    probe = Probe(wrapper, Outputs(torch.zeros(1, 5), {"pool": torch.zeros(1, 3)}))
    wrapper.build(probe, probe)
    assert set(dict(wrapper.named_parameters())) == {
        "criterion.criteria.ctkd.theta",
        "criterion.criteria.uskd.head.weight",
        "criterion.criteria.uskd.head.bias",
    }
    assert not LogitStandardization(TfKD()).reads_logits


def test_standardization_without_a_teacher(logits, target) -> None:
    """A module without a teacher passes empty teacher logits."""
    found = LogitStandardization(TfKD())(Outputs(logits[0], {}), Outputs(torch.empty(0), {}), Batch(None, target))
    torch.testing.assert_close(found, _call(TfKD(), KF.standardize(logits[0]), logits[1], target))


@pytest.mark.parametrize("inner", [MultiTeacher(KD()), WeightedSum({"several": MultiTeacher(KD())})])
def test_multi_teacher_must_be_the_outer_criterion(inner: DistillLoss) -> None:
    with pytest.raises(ValueError, match="use MultiTeacher as the outer criterion"):
        LogitStandardization(inner)


def test_constant_logits_become_zero() -> None:
    constant = torch.ones(2, 5, requires_grad=True)
    value = _call(LogitStandardization(KD()), constant, torch.zeros(2, 5))
    value.backward()
    assert value == 0
    assert constant.grad is not None
    assert constant.grad.isfinite().all()


def test_wrapper_has_the_views_of_its_criterion() -> None:
    assert [LogitStandardization(each).num_views for each in (KD(), MLKD(), SSKD())] == [1, 2, 4]


def test_invalid_criteria() -> None:
    with pytest.raises(TypeError, match=r"LogitStandardization requires a criterion .* got MSELoss; use a"):
        LogitStandardization(nn.MSELoss())
