"""MLKD: multi-level logit distillation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lkd import Batch, Outputs
from lkd import functional as KF
from lkd.losses import MLKD, LogitStandardization
from tests.losses import parity
from tests.losses.cases import FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import divergence, draw

CLASSES = 7

TARGET = torch.arange(5) % CLASSES

CASES = {
    "MLKD": FeatureCase(MLKD, views=2, zero_at_equality=True),
    "MLKD-paper": FeatureCase(lambda: MLKD("paper", (4.0, 2.0), percentile=80.0), views=2, zero_at_equality=True),
}


def _mlkd(inputs: Values, hyper: Hyper) -> Values:
    """The fixture contains the views separately. The authors add two cross-entropies, while lkd takes their mean."""
    networks = ("student_logits", "teacher_logits")
    both = {name: torch.cat([inputs[f"{name}_{view}"] for view in ("weak", "strong")]) for name in networks}
    both["target"] = inputs["target"].repeat(2)
    temperatures, weight = (hyper["temperature"], 3.0, 5.0, 2.0, 6.0), hyper["kd_weight"]
    criterion = MLKD("code", temperatures, hyper["percentile"])
    total = parity.weighted(criterion, both, weight, 2 * hyper["ce_weight"], views=2)
    parts, standardized = (parity.terms(each, both) for each in (criterion, LogitStandardization(criterion)))
    single = inputs["student_logits_weak"], inputs["teacher_logits_weak"], hyper["temperature"]
    return {
        "loss_ce": 2 * hyper["ce_weight"] * total["ce"],
        "loss_kd": weight * parts["kd"],
        "loss_cc": weight * parts["class"],
        "loss_bc": weight * parts["batch"],
        "loss": total["weighted"],
        "loss_kd.logit_std": weight * standardized["kd"],
        "kd_single": KF.kd_loss(*single),
        "cc_single": KF.mlkd_class_loss(*single),
        "bc_single": KF.mlkd_batch_loss(*single),
    }


PARITY = {"mlkd": _mlkd}


@pytest.mark.parametrize("percentile", [50.0, 30.0, 100.0])
def test_mlkd_paper_form(percentile: float) -> None:
    student, teacher, temperatures = draw(10, CLASSES, scale=2), draw(10, CLASSES, seed=1, scale=2), (4.0, 1.5)
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


def test_mlkd_without_masking_is_kd_at_each_temperature() -> None:
    student, teacher, temperatures = draw(10, CLASSES, scale=2), draw(10, CLASSES, seed=1, scale=2), (4.0, 3.0)
    for form in ("paper", "code"):
        found = MLKD(form, temperatures, 100.0)(Outputs(student, {}), Outputs(teacher, {}), Batch(None, TARGET))
        plain = [2 * KF.kd_loss(student, teacher, temperature) for temperature in temperatures]
        torch.testing.assert_close(found["kd"], sum(plain))


def test_mlkd_code_form_reads_only_the_weak_view_from_the_fourth_temperature() -> None:
    student, teacher = draw(10, CLASSES, scale=2), draw(10, CLASSES, seed=1, scale=2)
    strong = {}
    for number in (3, 4):
        leaf = student.clone().requires_grad_()
        MLKD("code", (4.0, 3.0, 5.0, 2.0)[:number])(Outputs(leaf, {}), Outputs(teacher, {}), Batch(None, TARGET))[
            "kd"
        ].backward()
        strong[number] = leaf.grad[5:]
    assert strong[3].any()
    assert torch.equal(strong[3], strong[4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "papers"}, "form must be 'code' or 'paper', got 'papers'"),
        ({"temperatures": ()}, "MLKD requires at least one temperature"),
        ({"temperatures": (4.0, 0.0)}, "temperature must be greater than 0, got 0.0"),
        ({"percentile": 101.0}, "percentile must be between 0 and 100, got 101.0"),
    ],
)
def test_invalid_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLKD(**settings)
