"""Criteria over logits against what others, or a loop, make of their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lkd import Batch, Outputs, Probe
from lkd import functional as KF
from lkd.losses import (
    CTKD,
    DIST,
    DKD,
    KD,
    NKD,
    RLD,
    SKD,
    USKD,
    DistillLoss,
    InstanceCTKD,
    LogitStandardization,
    MultiTeacher,
    TfKD,
    WeightedSum,
)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(8, 5, generator=generator, dtype=torch.float64) * 3 for _ in range(2))


@pytest.fixture
def target() -> Tensor:
    return torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


def _call(criterion: DistillLoss, student: Tensor, teacher: Tensor, target: Tensor | None = None):
    return criterion(Outputs(student, {}), Outputs(teacher, {}), Batch(None, target))


def test_dkd_is_hintons_taken_apart(logits, target) -> None:
    """KD = TCKD + (1 - the teacher's probability of the target) * NCKD, sample by sample."""
    for student, teacher, label in zip(*(tensor.split(1) for tensor in (*logits, target)), strict=True):
        rest = 1 - F.softmax(teacher / 4, dim=1)[0, label]
        parts = KF.tckd_loss(student, teacher, label, 4.0) + rest * KF.nckd_loss(student, teacher, label, 4.0)
        torch.testing.assert_close(parts.squeeze(), KF.kd_loss(student, teacher, 4.0))


def test_nkd_by_a_loop(logits, target) -> None:
    total = 0.0
    for student, teacher, label in zip(*(tensor.tolist() for tensor in (*logits, target)), strict=True):
        q, p = (np.exp(row) / np.exp(row).sum() for row in (student, teacher))
        total -= p[label] * math.log(q[label])
        q, p = (np.exp(np.delete(row, label) / 2) for row in (student, teacher))
        total -= 1.5 * 4 * (p / p.sum() * np.log(q / q.sum())).sum()
    assert KF.nkd_loss(*logits, target, gamma=1.5, temperature=2.0).item() == pytest.approx(total / 8, rel=1e-12)


def test_dist_is_numpys_correlation(logits) -> None:
    student, teacher = (F.softmax(tensor / 4, dim=1).numpy() for tensor in logits)
    rows = [np.corrcoef(student[i], teacher[i])[0, 1] for i in range(8)]
    columns = [np.corrcoef(student[:, c], teacher[:, c])[0, 1] for c in range(5)]
    expected = 16 * (2 * (1 - np.mean(rows)) + 3 * (1 - np.mean(columns)))
    assert KF.dist_loss(*logits, beta=2.0, gamma=3.0, temperature=4.0, eps=0.0).item() == pytest.approx(expected)


def test_skd_is_numpys_mahalanobis_length(logits) -> None:
    student, teacher = (tensor.numpy() / np.linalg.norm(tensor, axis=1, keepdims=True) for tensor in logits)
    difference = student @ student.T - teacher @ teacher.T
    inverse = np.linalg.inv(np.cov(difference, rowvar=False) + 0.3 * np.eye(8))
    expected = np.mean([np.sqrt(row @ inverse @ row) for row in difference])
    assert KF.skd_direction_loss(*logits, tikhonov=0.3).item() == pytest.approx(expected)


def test_skd_needs_no_t_squared(logits) -> None:
    torch.testing.assert_close(KF.skd_instance_loss(*logits, 4.0) * 16, KF.kd_loss(*logits, 4.0))


def test_ttm_softens_the_teacher_alone(logits) -> None:
    student, teacher = logits
    torch.testing.assert_close(KF.ttm_loss(student, teacher, 5.0), KF.kd_loss(student * 5, teacher, 5.0) / 25)


def test_wttm_weighs_flat_teachers_more(logits) -> None:
    student, teacher = logits
    weights = (F.softmax(teacher, dim=1) ** 0.2).sum(1)
    single = [KF.ttm_loss(student[i : i + 1], teacher[i : i + 1], 5.0) for i in range(8)]
    torch.testing.assert_close(KF.wttm_loss(student, teacher, 5.0), (weights * torch.stack(single)).mean())


def test_wsld_weighs_by_a_ratio_of_cross_entropies(logits, target) -> None:
    student, teacher = logits
    weights = 1 - torch.exp(-F.cross_entropy(student, target, reduction="none") / _ce(teacher, target))
    soft = F.cross_entropy(student / 4, F.softmax(teacher / 4, dim=1), reduction="none")
    torch.testing.assert_close(KF.wsld_loss(student, teacher, target, 4.0), 16 * (weights * soft).mean())


def _ce(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none") + 1e-7


def test_tfkd_at_temperature_1_is_label_smoothing(logits, target) -> None:
    student = logits[0]
    smoothing = 0.2
    correct = 1 - smoothing + smoothing / 5
    entropy = -correct * math.log(correct) - (1 - correct) * math.log((1 - correct) / 4)
    expected = F.cross_entropy(student, target, label_smoothing=smoothing) - entropy
    torch.testing.assert_close(KF.tfkd_loss(student, target, 1.0, correct), expected)


def test_tfkd_is_kd_with_a_virtual_teacher(logits, target) -> None:
    virtual = torch.full((8, 5), 0.01 / 4, dtype=torch.float64).scatter(1, target.unsqueeze(1), 0.99).log()
    torch.testing.assert_close(KF.tfkd_loss(logits[0], target, 20.0, 0.99), KF.kd_loss(logits[0], virtual, 20.0))


def test_rld_by_a_loop(logits, target) -> None:
    """Some samples have a teacher that is wrong, one ranks nothing below the label."""
    student, teacher = logits
    teacher = teacher.scatter(1, target[:1].unsqueeze(1), -20.0)
    total = 0.0
    for z_s, z_t, label in zip(student.numpy(), teacher.numpy(), target.tolist(), strict=True):
        q, p = (np.exp(row) / np.exp(row).sum() for row in (z_s, z_t))
        sure, wanted = q[label], p.max()
        total += wanted * math.log(wanted / sure) + (1 - wanted) * math.log((1 - wanted) / (1 - sure))
        below = [c for c in range(5) if z_t[c] < z_t[label]]
        q, p = (np.exp(row[below] / 4) for row in (z_s, z_t))
        total += 8 * 16 * float((p / p.sum() * np.log((p / p.sum()) / (q / q.sum()))).sum()) if below else 0.0
    value = KF.rld_loss(student, teacher, target, confidence_temperature=1.0)
    assert value.item() == pytest.approx(total / 8, rel=1e-12)


def test_rld_trusts_a_teacher_that_is_right(logits) -> None:
    student, teacher = logits
    right = teacher.argmax(1)
    refined = KF.rld_loss(student, teacher, right, 1.0, 8.0, temperature=4.0, confidence_temperature=4.0)
    torch.testing.assert_close(refined, KF.dkd_loss(student, teacher, right, 1.0, 8.0, 4.0))


def test_standardised_logits_have_no_size(logits, target) -> None:
    student, teacher = logits
    size = torch.linspace(0.1, 10, 8, dtype=torch.float64).unsqueeze(1)
    for criterion in (LogitStandardization(KD(2.0)), LogitStandardization(DKD())):
        wanted = _call(criterion, student, teacher, target)
        torch.testing.assert_close(
            _call(criterion, size * student + size, teacher / size, target), wanted, rtol=1e-5, atol=0
        )


def test_standardisation_is_numpys(logits) -> None:
    rows = logits[0].numpy()
    expected = (rows - rows.mean(1, keepdims=True)) / (rows.std(1, ddof=1, keepdims=True) + 1e-7)
    np.testing.assert_allclose(KF.standardize(logits[0]), expected, rtol=1e-12)


def test_standardisation_is_whatever_it_wraps() -> None:
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


def test_standardisation_without_a_teacher(logits, target) -> None:
    """A module without a teacher gives empty logits in its place."""
    found = LogitStandardization(TfKD())(Outputs(logits[0], {}), Outputs(torch.empty(0), {}), Batch(None, target))
    torch.testing.assert_close(found, _call(TfKD(), KF.standardize(logits[0]), logits[1], target))


@pytest.mark.parametrize("inner", [MultiTeacher(KD()), WeightedSum({"several": MultiTeacher(KD())})])
def test_several_teachers_are_not_standardised_from_outside(inner: DistillLoss) -> None:
    with pytest.raises(ValueError, match="use MultiTeacher as the outer criterion"):
        LogitStandardization(inner)


def test_constant_logits_standardise_to_zero() -> None:
    constant = torch.ones(2, 5, requires_grad=True)
    value = _call(LogitStandardization(KD()), constant, torch.zeros(2, 5))
    value.backward()
    assert value == 0
    assert constant.grad is not None
    assert constant.grad.isfinite().all()


def test_ctkd_climbs_where_the_student_descends(logits) -> None:
    def loss(theta: float, reversal: float = 1.0) -> tuple[float, float]:
        criterion = CTKD(min_temperature=2.0, temperature_range=6.0, reversal=reversal).double()
        torch.nn.init.constant_(criterion.theta, theta)
        value = _call(criterion, *logits)
        value.backward()
        assert criterion.theta.grad is not None
        assert criterion.temperature.item() == pytest.approx(2 + 6 / (1 + math.exp(-theta)))
        return value.item(), criterion.theta.grad.item()

    slope = (loss(0.5 + 1e-4)[0] - loss(0.5 - 1e-4)[0]) / 2e-4
    assert loss(0.5)[1] == pytest.approx(-slope, rel=1e-6)
    assert loss(0.5, reversal=0.25)[1] == pytest.approx(-0.25 * slope, rel=1e-6)
    assert loss(0.5, reversal=0.0)[1] == 0


def _instance_ctkd(logits: tuple[Tensor, Tensor], **settings: float) -> InstanceCTKD:
    torch.manual_seed(0)
    criterion = InstanceCTKD(**settings)
    criterion.build(*(Probe(criterion, Outputs(tensor[:1], {})) for tensor in logits))
    return criterion.double()


def test_instance_ctkd_begins_with_the_global_temperature(logits) -> None:
    begun = _instance_ctkd(logits, min_temperature=2.0, temperature_range=6.0)
    torch.testing.assert_close(_call(begun, *logits), _call(CTKD(2.0, 6.0).double(), *logits))


def test_instance_ctkd_is_kd_at_each_sample_s_temperature(logits) -> None:
    criterion = _instance_ctkd(logits, min_temperature=2.0, temperature_range=6.0)
    torch.nn.init.normal_(criterion.mlp[-1].weight)
    temperatures = criterion.temperatures(*logits).flatten().tolist()
    assert min(temperatures) >= 2
    assert max(temperatures) <= 8
    assert max(temperatures) - min(temperatures) > 1
    single = [KF.kd_loss(*(tensor[i : i + 1] for tensor in logits), temperatures[i]) for i in range(8)]
    torch.testing.assert_close(_call(criterion, *logits), torch.stack(single).mean())


def test_instance_ctkd_climbs_and_the_student_does_not_know(logits) -> None:
    """The network's gradient is reversed; the student's is that of KD at temperatures that are given."""
    criterion = _instance_ctkd(logits, reversal=0.25)
    torch.nn.init.normal_(criterion.mlp[-1].weight)
    student, teacher = logits[0].clone().requires_grad_(), logits[1]
    _call(criterion, student, teacher).backward()
    fixed = logits[0].clone().requires_grad_()
    theta = criterion.mlp(torch.cat([fixed.detach(), teacher], dim=1))
    temperature = 1 + 20 * theta.sigmoid()
    KF.kd_loss(fixed, teacher, temperature.detach()).backward()
    torch.testing.assert_close(student.grad, fixed.grad)
    parameters = list(criterion.parameters())
    straight = torch.autograd.grad(KF.kd_loss(logits[0], teacher, temperature), parameters)
    for parameter, slope in zip(parameters, straight, strict=True):
        assert slope.any()
        torch.testing.assert_close(parameter.grad, -0.25 * slope)


def test_uskd_reads_maps_and_vectors(logits, target) -> None:
    feature = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    values = []
    for given in (feature, feature.mean((2, 3))):
        torch.manual_seed(0)
        criterion = USKD("layer", alpha=2.0, beta=0.5, mu=0.1)
        student = Outputs(logits[0], {"layer": given})
        criterion.build(Probe(criterion, student), Probe(criterion, student))
        terms = criterion.double()(student, Outputs(logits[1], {}), Batch(None, target))
        weak = criterion.head(feature.mean((2, 3)))
        whole = KF.uskd_loss(logits[0], weak, target, alpha=2.0, beta=0.5, mu=0.1)
        torch.testing.assert_close(torch.stack(list(terms.values())).sum(), whole)
        values.append(whole)
    torch.testing.assert_close(*values)


def test_uskd_says_which_features_it_reads() -> None:
    criterion = USKD("tokens")
    probe = Probe(criterion, Outputs(torch.zeros(1, 5), {"tokens": torch.zeros(1, 7, 3)}))
    with pytest.raises(ValueError, match=r"layer 'tokens' returns \(1, 7, 3\); use another layer"):
        criterion.build(probe, probe)


@pytest.mark.parametrize("criterion", [DKD(), NKD()], ids=["DKD", "NKD"])
def test_other_classes_need_three(criterion: DistillLoss) -> None:
    with pytest.raises(ValueError, match="at least 3 classes, got logits with 2; use KD"):
        _call(criterion, torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DKD(beta=-1.0), "beta must not be negative, got -1.0"),
        (lambda: DKD(beta=float("inf")), "beta must not be negative, got inf; .* finite"),
        (lambda: NKD(gamma=float("nan")), "gamma must not be negative, got nan"),
        (lambda: DIST(temperature=0.0), "temperature must be greater than 0"),
        (lambda: RLD(confidence_temperature=-1.0), "temperature must be greater than 0"),
        (lambda: SKD(tikhonov=0.0), "tikhonov must be greater than 0, got 0.0"),
        (lambda: TfKD(correct_probability=1.0), "correct_probability must be between 0 and 1, got 1.0"),
        (lambda: CTKD(temperature_range=0.0), "temperature_range must be greater than 0"),
        (lambda: InstanceCTKD(temperature_range=-1.0), "temperature_range must be greater than 0"),
        (lambda: InstanceCTKD(min_temperature=0.0), "temperature must be greater than 0"),
        (lambda: InstanceCTKD(hidden_dim=0), "hidden_dim must be at least 1, got 0"),
    ],
)
def test_mistakes(make, says) -> None:
    with pytest.raises(ValueError, match=says):
        make()
