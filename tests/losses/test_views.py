"""Criteria that read several views, against what loops make of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd import Batch, Outputs, Probe
from lkd import functional as KF
from lkd.losses import CSKD, KD, MLKD, SSKD, LogitStandardization
from lkd.types import IGNORE_INDEX

CLASSES = 7
TARGET = torch.arange(5) % CLASSES


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(views: int = 4, images: int = 5) -> list[int]:
    """Rows of the turned views, image by image."""
    return [view * images + image for image in range(images) for view in range(1, views)]


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> float:
    p, q = (F.softmax(logits / temperature, dim=0) for logits in (teacher, student))
    return float(temperature**2 * (p * (p / q).log()).sum())


@pytest.mark.parametrize("percentile", [50.0, 30.0, 100.0])
def test_mlkd_as_the_paper_has_it(percentile: float) -> None:
    student, teacher, temperatures = draw(10, CLASSES), draw(10, CLASSES, seed=1), (4.0, 1.5)
    weak = F.softmax(teacher[:5], dim=1).numpy()
    images = weak.max(1) <= np.percentile(weak.max(1), percentile)
    classes = weak.sum(0) <= np.percentile(weak.sum(0), percentile)
    expected = dict.fromkeys(("kd", "class", "batch"), 0.0)
    for view in (slice(0, 5), slice(5, 10)):
        for temperature in temperatures:
            ours, theirs = (F.softmax(logits[view] / temperature, dim=1).numpy() for logits in (student, teacher))
            for i in np.flatnonzero(images):
                expected["kd"] += divergence(student[view][i], teacher[view][i], temperature) / 5
                expected["batch"] += sum((theirs[i] @ theirs[j] - ours[i] @ ours[j]) ** 2 for j in range(5)) / 5
            for c in np.flatnonzero(classes):
                products = ((theirs[:, c] @ theirs[:, d] - ours[:, c] @ ours[:, d]) ** 2 for d in range(CLASSES))
                expected["class"] += sum(products) / CLASSES
    criterion = MLKD("paper", temperatures, percentile)
    found = criterion(Outputs(student, {}), Outputs(teacher, {}), Batch(None, TARGET, views=2))
    assert {name: float(term) for name, term in found.items()} == pytest.approx(expected)
    assert float(KF.mlkd_loss(student, teacher, temperatures, percentile, "paper")) == pytest.approx(
        sum(expected.values())
    )


def test_mlkd_with_everything_kept_is_hintons_loss_at_each_temperature() -> None:
    student, teacher, temperatures = draw(10, CLASSES), draw(10, CLASSES, seed=1), (4.0, 3.0)
    for form in ("paper", "code"):
        found = MLKD(form, temperatures, 100.0)(Outputs(student, {}), Outputs(teacher, {}), Batch(None, TARGET))
        plain = [2 * KF.kd_loss(student, teacher, temperature) for temperature in temperatures]
        torch.testing.assert_close(found["kd"], sum(plain))


def test_mlkds_authors_read_the_weak_view_from_the_fourth_temperature_on() -> None:
    student, teacher = draw(10, CLASSES), draw(10, CLASSES, seed=1)
    strong = {}
    for number in (3, 4):
        leaf = student.clone().requires_grad_()
        MLKD("code", (4.0, 3.0, 5.0, 2.0)[:number])(Outputs(leaf, {}), Outputs(teacher, {}), Batch(None, TARGET))[
            "kd"
        ].backward()
        strong[number] = leaf.grad[5:]
    assert strong[3].any()
    assert torch.equal(strong[3], strong[4])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 1.0])
def test_sskds_similarities(ratio: float) -> None:
    student, teacher = draw(20, 6), draw(20, 3, seed=1)
    ours, theirs = (
        F.cosine_similarity(rows[turned()].unsqueeze(1), rows[:5].unsqueeze(0), dim=2) for rows in (student, teacher)
    )
    rank = [sorted(row.tolist(), reverse=True).index(float(row[number // 3])) for number, row in enumerate(theirs)]
    right = rank.count(0)
    assert 0 < right < 15
    chosen = sorted(range(15), key=rank.__getitem__)[: right + int((15 - right) * ratio)]
    expected = [divergence(ours[row], theirs[row], 0.5) for row in chosen]
    assert float(KF.sskd_ss_loss(student, teacher, 0.5, ratio)) == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize("labelled", [5, 3])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_sskds_turned_images(ratio: float, labelled: int) -> None:
    student, teacher, target = draw(20, 3), draw(20, 3, seed=2), torch.arange(5) % 3
    target[labelled:] = IGNORE_INDEX
    rows = turned()[: 3 * labelled]
    rank = [sorted(teacher[row].tolist(), reverse=True).index(float(teacher[row][target[row % 5]])) for row in rows]
    right = rank.count(0)
    assert 0 < right < len(rows)
    places = sorted(range(len(rows)), key=rank.__getitem__)[: right + int((len(rows) - right) * ratio)]
    expected = [divergence(student[rows[place]], teacher[rows[place]], 4.0) for place in places]
    found = KF.sskd_tf_loss(student, teacher, target, 4.0, ratio)
    assert float(found) == pytest.approx(sum(expected) / len(expected))


def sskd(**settings: float) -> SSKD:
    torch.manual_seed(0)
    criterion = SSKD("s", "t", **settings).double()
    student, teacher = (Probe(nn.Identity(), outputs) for outputs in answers())
    criterion.build(student, teacher)
    return criterion.double()


def answers() -> tuple[Outputs, Outputs]:
    student = Outputs(draw(20, CLASSES).requires_grad_(), {"s": draw(20, 6, seed=3).requires_grad_()})
    return student, Outputs(draw(20, CLASSES, seed=1), {"t": draw(20, 9, seed=4)})


BATCH = Batch(None, torch.cat([TARGET, torch.full((15,), IGNORE_INDEX)]), views=4)


def test_sskds_teacher_head_learns_by_its_own_loss_alone() -> None:
    criterion, (student, teacher) = sskd(), answers()
    terms = criterion(student, teacher, BATCH)
    (terms["kd"] + terms["ss"] + terms["tf"]).backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in criterion.teacher_head.parameters())
    assert all(parameter.grad.any() for parameter in criterion.student_head.parameters())
    student.logits.grad = student.features["s"].grad = None
    terms["teacher_head"].backward()
    assert all(parameter.grad.any() for parameter in criterion.teacher_head.parameters())
    assert student.logits.grad is student.features["s"].grad is None
    said = criterion.teacher_head(teacher.features["t"])
    similarity = F.cosine_similarity(said[turned()].unsqueeze(1), said[:5].unsqueeze(0), dim=2)
    expected = F.cross_entropy(similarity, torch.arange(5).repeat_interleave(3))
    torch.testing.assert_close(terms["teacher_head"], expected)


def test_sskds_teacher_head_stays_as_it_is_when_its_weight_is_0() -> None:
    """Weight decay goes on, and shrinks the head; what the student sees of it does not change."""
    criterion, (student, teacher) = sskd(teacher_head_weight=0.0), answers()
    before = criterion(student, teacher, BATCH)["ss"]
    parameters = list(criterion.teacher_head.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1)
    size = torch.cat([parameter.flatten() for parameter in parameters]).norm()
    for _ in range(30):
        optimizer.zero_grad()
        torch.stack(list(criterion(student, teacher, BATCH).values())).sum().backward()
        optimizer.step()
    assert torch.cat([parameter.flatten() for parameter in parameters]).norm() < 0.8 * size
    torch.testing.assert_close(criterion(student, teacher, BATCH)["ss"], before)


def test_sskd_without_labels_keeps_what_needs_none() -> None:
    criterion, (student, teacher) = sskd(), answers()
    terms, none = (
        criterion(student, teacher, BATCH._replace(target=target))
        for target in (BATCH.target, torch.full((20,), IGNORE_INDEX))
    )
    assert none["tf"] == 0
    assert all(torch.equal(terms[name], none[name]) for name in ("kd", "ss", "teacher_head"))


def test_cskd_is_hintons_loss_with_the_partner_as_teacher() -> None:
    logits = draw(10, CLASSES).requires_grad_()
    batch = Batch(None, torch.cat([TARGET, torch.full((5,), IGNORE_INDEX)]), views=2)
    loss = CSKD(temperature=3.0)(Outputs(logits, {}), Outputs(torch.empty(0), {}), batch)
    torch.testing.assert_close(loss, KF.kd_loss(logits[:5], logits[5:], 3.0))
    loss.backward()
    assert logits.grad[:5].all()
    assert not logits.grad[5:].any()


def test_cskd_leaves_images_without_a_label_out() -> None:
    logits, target = draw(10, CLASSES), TARGET.clone()
    target[3:] = IGNORE_INDEX
    expected = KF.kd_loss(logits[:3], logits[5:8], 4.0)
    torch.testing.assert_close(KF.cskd_loss(logits[:5], logits[5:], target), expected)


def test_a_wrapper_reads_as_many_views() -> None:
    assert [LogitStandardization(each).num_views for each in (KD(), MLKD(), SSKD())] == [1, 2, 4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLKD("papers"), "form must be 'code' or 'paper', got 'papers'"),
        (lambda: MLKD(temperatures=()), "MLKD requires at least one temperature"),
        (lambda: MLKD(temperatures=(4.0, 0.0)), "temperature must be greater than 0, got 0.0"),
        (lambda: MLKD(percentile=101.0), "percentile must be between 0 and 100, got 101.0"),
        (lambda: SSKD(ss_ratio=1.5), "ss_ratio must be between 0 and 1, got 1.5"),
        (lambda: SSKD(tf_weight=-1.0), "tf_weight must not be negative"),
        (lambda: SSKD(ss_temperature=0.0), "temperature must be greater than 0"),
        (lambda: CSKD(0.0), "temperature must be greater than 0"),
    ],
)
def test_wrong_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
