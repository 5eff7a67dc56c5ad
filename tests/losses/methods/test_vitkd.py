"""ViTKD: feature distillation between vision transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lkd import Batch, Outputs
from lkd import functional as KF
from lkd.losses import ViTKD
from tests.losses import parity
from tests.losses.cases import CLASSES, LAYERS, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, built_on_shapes, outputs

TOKENS = {"student": {"a": (10, 4), "b": (10, 4)}, "teacher": {"c": (10, 6), "d": (10, 6)}}

IMAGES = 6

CASES = {
    "ViTKD": FeatureCase(lambda: ViTKD(*LAYERS, alpha=0.03, beta=0.003), **TOKENS),
}


class _NoiseGiven(ViTKD):
    """ViTKD with the fixture's noise."""

    given: Tensor

    def noise(self, tokens: Tensor) -> Tensor:
        return self.given


def _vitkd(inputs: Values, hyper: Hyper) -> Values:
    features = {
        f"{network}_features.{number}": tokens
        for network in ("student", "teacher")
        for number, tokens in enumerate([*inputs[f"{network}_low"].unbind(1), inputs[f"{network}_high"]])
    }
    settings = {"alpha": hyper["alpha"], "beta": hyper["beta"], "mask_ratio": hyper["lambda_"]}
    criterion = _NoiseGiven(*parity.layers(features), **settings, student_prefix_tokens=0, teacher_prefix_tokens=0)
    criterion.given = inputs["noise"]
    given = parity.parameters(inputs, align2="shallow", align="last", generation="generation")
    criterion = parity.built(criterion, features)
    return {"loss": parity.terms(criterion, features, **given, mask_token=inputs["params.mask_token"])["loss"]}


PARITY = {"vitkd": _vitkd}


def _batch(samples: int = IMAGES) -> Batch:
    return Batch(None, torch.arange(samples) % CLASSES)


def _tokens(seed: int, count: int, width: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    return outputs(**{name: torch.randn(IMAGES, count, width, generator=generator) for name in "abc"})


def test_vitkd_drops_the_prefix_tokens_of_each_network() -> None:
    """Student and teacher may have different numbers, as DeiT's student has one more than its teacher."""
    student, teacher = _tokens(0, 11, 4), _tokens(1, 10, 6)
    criterion = built(ViTKD(list("abc"), list("abc"), student_prefix_tokens=2), student, teacher)
    torch.manual_seed(0)
    found = criterion(student, teacher, _batch())
    both = (
        outputs(**{name: tokens[:, 2:] for name, tokens in student.features.items()}),
        outputs(**{name: tokens[:, 1:] for name, tokens in teacher.features.items()}),
    )
    criterion.student_prefix_tokens = criterion.teacher_prefix_tokens = 0
    torch.manual_seed(0)
    for name, term in criterion(*both, _batch()).items():
        torch.testing.assert_close(term, found[name])


def test_vitkd_drops_the_class_tokens() -> None:
    student, teacher = _tokens(0, 11, 4), _tokens(1, 11, 6)
    criterion = ViTKD(list("abc"), list("abc"), student_prefix_tokens=2, teacher_prefix_tokens=2)
    criterion = built(criterion, student, teacher)
    found = []
    for factor in (1, 100):
        for both in (student, teacher):
            for tokens in both.features.values():
                tokens[:, :2] *= factor
        torch.manual_seed(0)
        found.append(criterion(student, teacher, _batch()))
    torch.testing.assert_close(*found)


def test_vitkd_generates_the_masked_tokens() -> None:
    student, teacher = _tokens(0, 10, 4), _tokens(1, 10, 6)
    criterion = built(ViTKD(list("abc"), list("abc"), mask_ratio=0.3), student, teacher)
    masked = []
    loss = KF.vitkd_generation_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lkd.losses.vitkd.vitkd_generation_loss", lambda *given: masked.append(given[2]) or loss(*given))
        terms = [criterion(student, teacher, _batch()) for _ in range(2)]
    assert (masked[0].sum(1) == 9 - int(9 * 0.7)).all()
    assert not torch.equal(*masked)
    assert terms[0]["generation"] != terms[1]["generation"]


@pytest.mark.parametrize(
    ("make", "student", "teacher", "message"),
    [
        (lambda: ViTKD(list("aa"), list("bb")), (2, 4, 4, 4), (2, 10, 4), r"ViTKD reads tokens \(B, N, C\)"),
        (lambda: ViTKD(["a"], ["b"]), (2, 10, 4), (2, 10, 4), "ViTKD requires at least two layers"),
        (
            lambda: ViTKD(list("aa"), list("bb")),
            (2, 10, 4),
            (2, 17, 4),
            "got 9 from the student and 16 from the teacher; use",
        ),
        (
            lambda: ViTKD(list("aa"), list("bb"), teacher_prefix_tokens=2),
            (2, 10, 4),
            (2, 10, 4),
            r"teacher layer returns 10 tokens, 8 without the 2 class tokens; .* \(teacher_prefix_tokens\)",
        ),
    ],
)
def test_invalid_layers(make, student, teacher, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built_on_shapes(make(), student, teacher)


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="mask_ratio must be greater than 0 and at most 1"):
        ViTKD(mask_ratio=0)
