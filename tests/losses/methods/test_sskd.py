"""SSKD: self-supervised knowledge distillation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd import Batch, Outputs, Probe
from lkd import functional as KF
from lkd.losses import SSKD
from lkd.types import IGNORE_INDEX
from tests.losses import parity
from tests.losses.cases import FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import divergence, draw

CLASSES = 7

TARGET = torch.arange(5) % CLASSES

BATCH = Batch(None, torch.cat([TARGET, torch.full((15,), IGNORE_INDEX)]), views=4)

CASES = {
    "SSKD": FeatureCase(lambda: SSKD("a", "b"), student={"a": (6,)}, teacher={"b": (9,)}, views=4, reads_target=True),
}


def _by_view(rows: Tensor) -> Tensor:
    """Reorder rows from image by image, as in the fixture, to view by view, as in lkd."""
    return rows.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)


def _sskd(inputs: Values, hyper: Hyper) -> Values:
    """The fixture contains the outputs of the heads."""
    hard, kd, ss, tf = hyper["loss_weights"]
    criterion = SSKD(
        *("student", "teacher"),
        **{"kd_weight": kd, "ss_weight": ss, "tf_weight": tf, "teacher_head_weight": 0.0},
        **{"kd_temperature": hyper["kl_temp"], "ss_temperature": hyper["ss_temp"], "tf_temperature": hyper["tf_temp"]},
        **{"ss_ratio": hyper["ss_ratio"], "tf_ratio": hyper["tf_ratio"]},
    )
    views = {name: _by_view(inputs[name]) for name in ("student_logits", "teacher_logits")}
    views |= {f"{network}_features.0": _by_view(inputs[f"{network}_ss"]) for network in ("student", "teacher")}
    views["target"] = torch.cat([inputs["target"], inputs["target"].new_full((3 * len(inputs["target"]),), -100)])
    parity.built(criterion, views)
    criterion.student_head = criterion.teacher_head = nn.Identity()
    cross_entropy = nn.functional.cross_entropy(views["student_logits"], views["target"])
    return {"loss": hard * cross_entropy + parity.terms(criterion, views)["loss"]}


PARITY = {"sskd": _sskd}


def _rotated(views: int = 4, images: int = 5) -> list[int]:
    """Return the row indices of the rotated views, image by image."""
    return [view * images + image for image in range(images) for view in range(1, views)]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 1.0])
def test_sskd_ss_loss(ratio: float) -> None:
    student, teacher = draw(20, 6, scale=2), draw(20, 3, seed=1, scale=2)
    ours, theirs = (
        F.cosine_similarity(rows[_rotated()].unsqueeze(1), rows[:5].unsqueeze(0), dim=2) for rows in (student, teacher)
    )
    rank = [sorted(row.tolist(), reverse=True).index(float(row[number // 3])) for number, row in enumerate(theirs)]
    right = rank.count(0)
    assert 0 < right < 15
    chosen = sorted(range(15), key=rank.__getitem__)[: right + int((15 - right) * ratio)]
    expected = [divergence(ours[row], theirs[row], 0.5) for row in chosen]
    assert float(KF.sskd_ss_loss(student, teacher, 0.5, ratio)) == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize("labelled", [5, 3])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_sskd_tf_loss(ratio: float, labelled: int) -> None:
    student, teacher, target = draw(20, 3, scale=2), draw(20, 3, seed=2, scale=2), torch.arange(5) % 3
    target[labelled:] = IGNORE_INDEX
    rows = _rotated()[: 3 * labelled]
    rank = [sorted(teacher[row].tolist(), reverse=True).index(float(teacher[row][target[row % 5]])) for row in rows]
    right = rank.count(0)
    assert 0 < right < len(rows)
    places = sorted(range(len(rows)), key=rank.__getitem__)[: right + int((len(rows) - right) * ratio)]
    expected = [divergence(student[rows[place]], teacher[rows[place]], 4.0) for place in places]
    found = KF.sskd_tf_loss(student, teacher, target, 4.0, ratio)
    assert float(found) == pytest.approx(sum(expected) / len(expected))


def _built(**settings: float) -> SSKD:
    torch.manual_seed(0)
    criterion = SSKD("s", "t", **settings).double()
    student, teacher = (Probe(nn.Identity(), outputs) for outputs in _outputs())
    criterion.build(student, teacher)
    return criterion.double()


def _outputs() -> tuple[Outputs, Outputs]:
    student = Outputs(draw(20, CLASSES, scale=2).requires_grad_(), {"s": draw(20, 6, seed=3, scale=2).requires_grad_()})
    return student, Outputs(draw(20, CLASSES, seed=1, scale=2), {"t": draw(20, 9, seed=4, scale=2)})


def test_sskd_teacher_head_learns_only_from_its_own_loss() -> None:
    criterion, (student, teacher) = _built(), _outputs()
    terms = criterion(student, teacher, BATCH)
    (terms["kd"] + terms["ss"] + terms["tf"]).backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in criterion.teacher_head.parameters())
    assert all(parameter.grad.any() for parameter in criterion.student_head.parameters())
    student.logits.grad = student.features["s"].grad = None
    terms["teacher_head"].backward()
    assert all(parameter.grad.any() for parameter in criterion.teacher_head.parameters())
    assert student.logits.grad is student.features["s"].grad is None
    embeddings = criterion.teacher_head(teacher.features["t"])
    similarity = F.cosine_similarity(embeddings[_rotated()].unsqueeze(1), embeddings[:5].unsqueeze(0), dim=2)
    expected = F.cross_entropy(similarity, torch.arange(5).repeat_interleave(3))
    torch.testing.assert_close(terms["teacher_head"], expected)


def test_sskd_teacher_head_with_zero_weight_has_no_effect() -> None:
    """Weight decay shrinks the head's weights, but does not change the student's loss."""
    criterion, (student, teacher) = _built(teacher_head_weight=0.0), _outputs()
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


def test_sskd_without_labels_keeps_the_unsupervised_terms() -> None:
    criterion, (student, teacher) = _built(), _outputs()
    terms, none = (
        criterion(student, teacher, BATCH._replace(target=target))
        for target in (BATCH.target, torch.full((20,), IGNORE_INDEX))
    )
    assert none["tf"] == 0
    assert all(torch.equal(terms[name], none[name]) for name in ("kd", "ss", "teacher_head"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ss_ratio": 1.5}, "ss_ratio must be between 0 and 1, got 1.5"),
        ({"tf_weight": -1.0}, "tf_weight must not be negative"),
        ({"ss_temperature": 0.0}, "temperature must be greater than 0"),
    ],
)
def test_invalid_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSKD(**settings)
