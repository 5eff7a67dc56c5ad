from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd import Batch, DistillModule, Outputs
from lkd.io.tensor_cache import network_fingerprint
from lkd.losses import (
    AT,
    CC,
    CRD,
    DIST,
    DKD,
    KD,
    MLKD,
    NKD,
    PKT,
    RKD,
    SKD,
    SP,
    SRD,
    SSKD,
    WSLD,
    DeiT,
    DISTPlus,
    FitNet,
    LogitStandardization,
    MultiTeacher,
    SemCKD,
    TfKD,
    WeightedSum,
)
from lkd.models import Ensemble, load_weights, wrn_16_1
from lkd.types import IGNORE_INDEX


def _batch(samples: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.randn(samples, 3, 8, 8, generator=generator), torch.arange(samples) % 4, torch.arange(samples))


@pytest.fixture
def teachers(tiny) -> Ensemble:
    """Return two networks of different architectures."""
    torch.manual_seed(3)
    return Ensemble([tiny(seed=2), wrn_16_1(num_classes=4)])


def _logits(module: DistillModule, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad():
        return module.student(batch.input), [member(batch.input) for member in module.teacher.members]


def test_ensemble_is_the_mean(tiny) -> None:
    networks = [tiny(seed).eval() for seed in range(3)]
    image = _batch().input
    logits = torch.stack([network(image) for network in networks])
    torch.testing.assert_close(Ensemble(networks)(image), logits.mean(0))
    weights = torch.tensor([2.0, 1.0, 1.0]) / 4
    torch.testing.assert_close(Ensemble(networks, [2.0, 1.0, 1.0])(image), torch.einsum("m,mbk->bk", weights, logits))
    together = Ensemble(networks, [2.0, 1.0, 1.0], mean_of="probabilities")(image)
    torch.testing.assert_close(together.exp(), torch.einsum("m,mbk->bk", weights, logits.softmax(2)))


def test_ensembles_of_the_same_members_have_different_fingerprints(tiny) -> None:
    """Logits that were cached for other weights, or another mean, must not be reused."""
    networks = [tiny(), tiny()]
    ensembles = [
        Ensemble(networks),
        Ensemble(networks, [3.0, 1.0]),
        Ensemble(networks, mean_of="probabilities"),
    ]
    assert len({network_fingerprint(ensemble) for ensemble in ensembles}) == 3
    assert network_fingerprint(Ensemble(networks, [2.0, 2.0])) == network_fingerprint(ensembles[0])


def test_invalid_ensembles(tiny) -> None:
    with pytest.raises(ValueError, match="at least one network"):
        Ensemble([])
    with pytest.raises(ValueError, match=r"one weight greater than 0 for each of its 2 networks, got \[1.0\]"):
        Ensemble([tiny(), tiny()], [1.0])
    with pytest.raises(ValueError, match=r"the same number of classes, got \[4, 5\]"):
        Ensemble([tiny(), tiny(num_classes=5)])(_batch().input)


def test_members_load_their_own_weights(tiny, tmp_path) -> None:
    for seed in (1, 2):
        torch.save(tiny(seed).state_dict(), tmp_path / f"{seed}.pth")
    ensemble = Ensemble([load_weights(tiny(), tmp_path / f"{seed}.pth") for seed in (1, 2)])
    for seed, member in zip((1, 2), ensemble.members, strict=True):
        assert torch.equal(member.conv1.weight, tiny(seed).conv1.weight)


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_fixed_weights(distill, teachers, weights) -> None:
    module = distill(teacher=teachers, criterion=MultiTeacher(KD(2.0), weights=weights), distill_weight=0.5).eval()
    _, terms = module.losses(_batch())
    own, teacher_logits = _logits(module, _batch())
    soft = [4 * F.kl_div((own / 2).log_softmax(1), (z / 2).softmax(1), reduction="batchmean") for z in teacher_logits]
    first = 0.5 if weights is None else 0.75
    torch.testing.assert_close(terms["kd"], 0.5 * (first * soft[0] + (1 - first) * soft[1]))


def test_confidence_of_each_sample(distill, teachers) -> None:
    """Compare with the paper's equations for each sample; both teachers have equal weights for unlabelled images."""
    module = distill(teacher=teachers, criterion=MultiTeacher(KD(4.0), "confidence"), distill_weight=1.0).eval()
    batch = _batch()
    target = batch.target.clone()
    target[2] = IGNORE_INDEX
    _, terms = module.losses(batch._replace(target=target))
    own, teacher_logits = _logits(module, batch)
    total = 0.0
    for i, label in enumerate(target.tolist()):
        hard = [F.cross_entropy(z[i], target[i]).exp() if label >= 0 else torch.tensor(1.0) for z in teacher_logits]
        for z, own_hard in zip(teacher_logits, hard, strict=True):
            p = (z[i] / 4).softmax(0)
            soft = 16 * (p * (p.log() - (own[i] / 4).log_softmax(0))).sum()
            total += (1 - own_hard / sum(hard)) * soft  # the divisor is the number of teachers minus one, here 1
    torch.testing.assert_close(terms["kd"], total / len(target))


@pytest.mark.parametrize("kind", [KD, DKD, NKD, WSLD, AT])
def test_equal_confidence_equals_fixed_weights(distill, tiny, kind) -> None:
    """Criteria that ignore unlabelled images agree as well, because both means are over the same images."""
    teacher = Ensemble([tiny(seed=2), tiny(seed=2)])
    batch = _batch()
    batch.target[:4] = IGNORE_INDEX
    criteria = (MultiTeacher(LogitStandardization(kind()), weighting) for weighting in ("confidence", "fixed"))
    found, wanted = (distill(teacher=teacher, criterion=each).eval().losses(batch)[1] for each in criteria)
    assert set(found) == set(wanted)
    for name, term in wanted.items():
        torch.testing.assert_close(found[name], term)


@pytest.mark.parametrize(
    "kind", [CC, CRD, DIST, DISTPlus, MLKD, PKT, RKD, SKD, SP, SRD, SSKD, SemCKD], ids=lambda kind: kind.__name__
)
def test_confidence_rejects_criteria_that_compare_samples(kind) -> None:
    for criterion in (kind(), WeightedSum({"kd": KD(), "other": kind()})):
        with pytest.raises(
            ValueError, match=r"requires a criterion for single images, but \w+ compares the images of a batch"
        ):
            MultiTeacher(criterion, "confidence")


@pytest.mark.parametrize("criterion", [DeiT(), WeightedSum({"kd": KD(), "dkd": DKD()})])
def test_confidence_rejects_several_terms(criterion) -> None:
    with pytest.raises(ValueError, match="or one MultiTeacher for each criterion of a WeightedSum"):
        MultiTeacher(criterion, "confidence")


def test_combination_with_other_criteria(distill, teachers, data, trainer) -> None:
    """Within a sum, each MultiTeacher still resolves the members and their layers."""
    parts = {"kd": MultiTeacher(KD(), "confidence"), "at": MultiTeacher(AT()), "whole": KD()}
    module = distill(teacher=teachers, criterion=WeightedSum(parts), distill_weight=1.0)
    trainer(max_epochs=1).fit(module, data)
    _, terms = module.eval().losses(_batch())
    alone = distill(teacher=teachers, criterion=MultiTeacher(KD(), "confidence"), distill_weight=1.0).eval()
    alone.model.load_state_dict(module.model.state_dict())
    torch.testing.assert_close(terms["kd"], alone.losses(_batch())[1]["kd"])
    assert {"at", "whole"} <= set(terms)


def test_correct_teacher_has_the_largest_weight() -> None:
    from lkd.functional import teacher_confidence

    right, wrong, unsure = torch.eye(3) * 5, torch.eye(3).roll(1, 0) * 5, torch.zeros(3, 3)
    weight = teacher_confidence(torch.stack([wrong, right, unsure]), torch.arange(3))
    assert (weight[1] > weight[2]).all()
    assert (weight[2] > weight[0]).all()
    torch.testing.assert_close(weight.sum(0), torch.ones(3))


def test_learned_weights_prefer_the_correct_teacher() -> None:
    """One teacher is correct; the other has the student's logits."""
    target = torch.arange(8) % 4
    right, student = F.one_hot(target, 4) * 4.0, torch.zeros(8, 4, requires_grad=True)
    teacher_outputs = Outputs(torch.zeros(8, 4), {"members.0": student.detach(), "members.1": right})
    criterion = MultiTeacher(KD(), "learned")
    criterion.resolve_layers(nn.Identity(), Ensemble([nn.Identity(), nn.Identity()]))
    criterion.theta = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([criterion.theta], lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        terms = criterion(Outputs(student, {}), teacher_outputs, Batch(None, target))
        assert torch.autograd.grad(terms[""], criterion.theta, retain_graph=True, allow_unused=True) == (None,)
        assert torch.autograd.grad(terms["mixture"], student, retain_graph=True, allow_unused=True) == (None,)
        sum(terms.values()).backward()
        optimizer.step()
    assert criterion.theta.softmax(0)[1] > 0.8


def test_layers_are_resolved_per_architecture(distill, teachers, data, trainer) -> None:
    criterion = MultiTeacher(WeightedSum({"at": AT(), "hint": FitNet(["layer1"], ["@stage1"])}))
    module = distill(teacher=teachers, criterion=criterion)
    before = [parameter.clone() for parameter in teachers.parameters()]
    engine = trainer(max_epochs=1)
    engine.fit(module, data)
    assert {"train/at", "train/hint"} <= set(engine.callback_metrics)
    first, second = (part.criteria["hint"].regressors[0][0] for part in criterion.parts)
    assert (first.out_channels, second.out_channels) == (4, 16)
    assert all(torch.equal(*pair) for pair in zip(before, teachers.parameters(), strict=True))
    assert not [name for name in module.state_dict() if "teacher" in name or "members" in name]


@pytest.mark.parametrize("weighting", ["confidence", "learned"])
def test_training_resumes_from_a_checkpoint(distill, tiny, resume, weighting: str) -> None:
    def make() -> DistillModule:
        torch.manual_seed(3)
        teachers = Ensemble([tiny(seed=2), wrn_16_1(num_classes=4)])
        return distill(teacher=teachers, criterion=MultiTeacher(DKD(), weighting))

    saved = resume(make)
    assert ("criterion.theta" in saved) == (weighting == "learned")


def test_invalid_arguments(distill, tiny, teachers, data, trainer) -> None:
    with pytest.raises(
        ValueError, match=r"accepts weights only with weighting 'fixed', got \[1.0, 1.0\] and 'learned'"
    ):
        MultiTeacher(KD(), "learned", [1.0, 1.0])
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weights must be finite and not negative"):
            MultiTeacher(KD(), weights=[1.0, weight])
    with pytest.raises(ValueError, match="requires a criterion that uses a teacher, got TfKD; use it alone"):
        MultiTeacher(TfKD())
    with pytest.raises(ValueError, match=r"at least two teachers, got one CIFARResNet; use an lkd"):
        distill(criterion=MultiTeacher(KD()))
    with pytest.raises(ValueError, match="3 weights for 2 teachers"):
        distill(teacher=teachers, criterion=MultiTeacher(KD(), weights=[1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="requires a criterion for single samples, but FitNet keeps batch statistics"):
        trainer().fit(distill(teacher=teachers, criterion=MultiTeacher(FitNet(), "confidence")), data)
