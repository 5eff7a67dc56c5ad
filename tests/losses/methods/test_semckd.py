"""SemCKD: semantic calibration for cross-layer knowledge distillation."""

from __future__ import annotations

import warnings
from itertools import product

import pytest
import torch

from lkd import Batch
from lkd.losses import SemCKD
from tests.losses import parity
from tests.losses.cases import CLASSES, LAYERS, SAMPLES, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, built_on_shapes, outputs

IMAGES = 6

CASES = {
    "SemCKD": FeatureCase(
        lambda: SemCKD(*LAYERS, batch_size=SAMPLES),
        student={"a": (4, 8, 8), "b": (6, 4, 4)},
        teacher={"c": (5, 8, 8), "d": (7, 2, 2)},
    ),
}


def _semckd(inputs: Values, hyper: Hyper) -> Values:
    settings = {"factor": int(hyper["factor"]), "temperature": hyper["soft"]}
    criterion = SemCKD(*parity.layers(inputs), batch_size=len(inputs["student_features.0"]), **settings)
    parity.built(criterion, inputs)
    names = {f"query_{number}": f"queries.{number}" for number in range(len(criterion.student_layers))}
    names |= {f"key_{number}": f"keys.{number}" for number in range(len(criterion.teacher_layers))}
    pairs = product(range(len(criterion.student_layers)), range(len(criterion.teacher_layers)))
    names |= {f"regressor{own}{other}.regressor": f"regressors.{number}" for number, (own, other) in enumerate(pairs)}
    given = parity.parameters(inputs, **names)
    loss = parity.terms(criterion, inputs, **given)["loss"]
    with torch.no_grad():
        for name, tensor in given.items():
            criterion.get_parameter(name).copy_(tensor)
        student, teacher = parity.outputs(criterion, inputs)
        attention = criterion.attention(list(student.features.values()), list(teacher.features.values()))
    return {"loss": loss, "attention": attention}


PARITY = {"semckd": _semckd}


def _batch(samples: int = IMAGES) -> Batch:
    return Batch(None, torch.arange(samples) % CLASSES)


def test_semckd_incomplete_batch() -> None:
    """Loss and gradients are 0 rather than missing, because the other processes wait for the gradients."""
    student = outputs(a=torch.randn(IMAGES, 4, 4, 4, requires_grad=True))
    teacher = outputs(c=torch.randn(IMAGES, 5, 4, 4))
    criterion = built(SemCKD(["a"], ["c"], batch_size=8), student, teacher)
    with pytest.warns(UserWarning, match="SemCKD's loss is 0 for a batch of 6 images, as it requires 8"):
        loss = criterion(student, teacher, _batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(student, teacher, _batch())
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in criterion.parameters())
    assert not student.features["a"].grad.any()
    other = built(SemCKD(["a"], ["c"], batch_size=IMAGES), student, teacher)
    assert other(student, teacher, _batch()) > 0


def test_semckd_compares_within_a_view() -> None:
    torch.manual_seed(0)
    shapes = {"a": (4, 4, 4)}, {"c": (5, 4, 4), "d": (5, 2, 2)}
    views = [
        [outputs(**{name: torch.randn(IMAGES, *shape) for name, shape in role.items()}) for role in shapes]
        for _ in range(2)
    ]
    criterion = built(SemCKD(["a"], ["c", "d"], batch_size=IMAGES), *views[0]).eval()
    single = [criterion(*view, _batch()) for view in views]
    both = [
        outputs(**{name: torch.cat([view[role].features[name] for view in views]) for name in views[0][role].features})
        for role in range(2)
    ]
    loss = criterion(*both, Batch(None, torch.zeros(2 * IMAGES), views=2))
    torch.testing.assert_close(loss, (single[0] + single[1]) / 2)
    assert loss > 0


def test_semckd_attention_sums_to_one_over_teacher_layers() -> None:
    student = outputs(a=torch.randn(IMAGES, 4, 8, 8), b=torch.randn(IMAGES, 6, 4, 4))
    features = {name: torch.randn(IMAGES, 5, 4, 4) for name in "cde"}
    criterion = built(SemCKD(["a", "b"], list("cde"), batch_size=IMAGES), student, outputs(**features))
    attention = criterion.attention(list(student.features.values()), list(features.values()))
    assert attention.shape == (IMAGES, 2, 3)
    torch.testing.assert_close(attention.sum(2), torch.ones(IMAGES, 2))
    assert criterion(student, outputs(**features), _batch()).isfinite()


def test_semckd_uses_the_batch_size_of_the_data_module(distill, data, trainer) -> None:
    module = distill(criterion=SemCKD(), distill_weight=1.0, hard_weight=1.0)
    trainer(max_epochs=1).fit(module, data)
    assert module.criterion.queries[0].linear1.in_features == data.batch_size


def test_invalid_layers() -> None:
    with pytest.raises(ValueError, match=r"SemCKD requires a fixed batch size, .* set the .* batch_size"):
        built_on_shapes(SemCKD(["a"], ["b"]), (2, 4, 4, 4), (2, 4, 4, 4))


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="factor must be at least 1"):
        SemCKD(factor=0)
