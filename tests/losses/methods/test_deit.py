"""DeiT: distillation through attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lkd import Batch, DistillModule
from lkd.losses import DeiT
from lkd.models import resnet8
from tests.losses import parity
from tests.losses.cases import CLASSES, FeatureCase
from tests.losses.parity import Hyper, Values
from tests.losses.tools import built, built_on_shapes, outputs

IMAGES = 6

CASES = {
    "DeiT": FeatureCase(
        lambda: DeiT("a", "b"), student={"a": (CLASSES,), "b": (CLASSES,)}, batch_mean=True, reads_target=True
    ),
    "DeiT-soft": FeatureCase(
        lambda: DeiT("a", "b", kind="soft", token_weight=0.1, label_smoothing=0.1),
        student={"a": (CLASSES,), "b": (CLASSES,)},
        batch_mean=True,
        reads_target=True,
    ),
}


def _deit_hard(inputs: Values, hyper: Hyper) -> Values:
    heads = {"student_features.0": inputs["class_token"], "student_features.1": inputs["distillation_token"]}
    given = {**heads, "student_logits": sum(heads.values()) / 2, "teacher_logits": inputs["teacher"]}
    criterion = DeiT("class", "distillation", token_weight=hyper["alpha"], kind="hard")
    return parity.terms(criterion, {**given, "target": inputs["target"]})


PARITY = {"deit_hard": _deit_hard}


def _batch(samples: int = IMAGES) -> Batch:
    return Batch(None, torch.arange(samples) % CLASSES)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_deit_equals_timms_task(kind: str) -> None:
    import timm
    from timm.task import TokenDistillationTask

    torch.manual_seed(0)
    size = {"num_classes": CLASSES, "img_size": 32, "patch_size": 16}
    student = timm.create_model("deit_tiny_distilled_patch16_224", depth=2, **size)
    teacher = resnet8(num_classes=CLASSES).eval()
    for head in (student.head, student.head_dist):
        nn.init.normal_(head.weight)
    image, target = torch.randn(IMAGES, 3, 32, 32), _batch().target
    module = DistillModule(
        student,
        teacher,
        DeiT(kind=kind, token_weight=0.3, temperature=2.0),
        distill_weight=1.0,
        hard_weight=0.0,
    )
    module.build(image[:1])
    logits, terms = module.losses(Batch(image, target))
    torch.testing.assert_close(logits, (student.head(_pooled(student, image, 0)) + _distilled(student, image)) / 2)
    # timm's task renormalizes the teacher's image if the networks' statistics differ; here, they are equal
    task = TokenDistillationTask(
        student,
        _SameStatistics(teacher, student),
        nn.CrossEntropyLoss(),
        distill_type=kind,
        task_loss_weight=0.7,
        temperature=2.0,
        verbose=False,
    )
    torch.testing.assert_close(terms["deit_class"] + terms["deit_token"], task(image, target)["loss"])


def _pooled(student: nn.Module, image: Tensor, token: int) -> Tensor:
    return student.forward_features(image)[:, token]


def _distilled(student: nn.Module, image: Tensor) -> Tensor:
    return student.head_dist(_pooled(student, image, 1))


class _SameStatistics(nn.Module):
    """A teacher with the student's `pretrained_cfg`, from which timm reads mean and std."""

    def __init__(self, network: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.pretrained_cfg = dict(student.pretrained_cfg)

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)


def test_deit_labels_train_only_the_class_head() -> None:
    heads = {name: torch.randn(IMAGES, CLASSES, requires_grad=True) for name in "ab"}
    student, teacher = outputs(**heads), outputs(torch.randn(IMAGES, CLASSES))
    terms = built(DeiT("a", "b"), student, teacher)(student, teacher, _batch())
    grads = torch.autograd.grad(terms["class"], list(heads.values()), allow_unused=True)
    assert grads[0].any()
    assert grads[1] is None
    assert torch.autograd.grad(terms["token"], list(heads.values()), allow_unused=True)[0] is None


def test_invalid_layers() -> None:
    with pytest.raises(ValueError, match=r"DeiT requires two heads that return logits \(2, 5\), .* 'a' returns"):
        built_on_shapes(DeiT("a", "a"), (2, 4), (2, 4, 4, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_weight": 2}, "token_weight must be between 0 and 1"),
        ({"kind": "firm"}, "kind must be 'hard' or 'soft', got 'firm'"),
        ({"label_smoothing": 1}, "label_smoothing must be at least 0 and less than 1"),
    ],
)
def test_invalid_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeiT(**settings)
