"""What criteria that read classifiers, exits, tokens or backbones promise beyond the table."""

from __future__ import annotations

import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import TokenDistillationTask
from torch import Tensor, nn

from lkd import Batch, DistillLoss, DistillModule, Outputs, Probe
from lkd import functional as KF
from lkd.losses import CATKD, OFAKD, SRRL, BackboneKD, DeiT, DISTPlus, SemCKD, SimKD, ViTKD
from lkd.models import resnet8
from lkd.types import IGNORE_INDEX

SAMPLES, CLASSES = 6, 5


def _outputs(logits: Tensor | None = None, **features: Tensor) -> Outputs:
    return Outputs(torch.zeros(SAMPLES, CLASSES) if logits is None else logits, features)


def _batch(samples: int = SAMPLES) -> Batch:
    return Batch(None, torch.arange(samples) % CLASSES)


def _built(
    criterion: DistillLoss, student: Outputs, teacher: Outputs, heads: tuple[nn.Module, nn.Module] | None = None
) -> DistillLoss:
    ours, theirs = heads or (nn.Identity(), nn.Identity())
    criterion.build(Probe(ours, student), Probe(theirs, teacher))
    return criterion


@pytest.fixture
def heads() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, CLASSES)), nn.Sequential(nn.Linear(7, CLASSES))


@pytest.fixture
def maps() -> tuple[Outputs, Outputs]:
    torch.manual_seed(1)
    return _outputs(a=torch.randn(SAMPLES, 4, 8, 8)), _outputs(c=torch.randn(SAMPLES, 7, 4, 4))


def test_catkd_sees_the_classes_maps(heads, maps) -> None:
    found = _built(CATKD("a", "c"), *maps, heads)(*maps, _batch())
    classes = [
        torch.stack([head[0](pixel) for pixel in outputs.features[layer].flatten(2).unbind(2)], 2).unflatten(
            2, (-1, size)
        )
        for head, outputs, layer, size in zip(heads, maps, "ac", (8, 4), strict=True)
    ]
    own = _outputs(a=classes[0]), _outputs(c=classes[1])
    given = _built(CATKD("a", "c", student_head=None, teacher_head=None), *own)(*own, _batch())
    torch.testing.assert_close(found, given)


def test_catkd_trains_the_students_classifier_alone(heads, maps) -> None:
    """Also where the teacher is a peer, which trains itself."""
    criterion = _built(CATKD("a", "c"), *maps, heads)
    assert not list(criterion.parameters())
    criterion(*maps, _batch()).backward()
    assert heads[0][0].weight.grad.any()
    assert heads[1][0].weight.grad is None


@pytest.mark.parametrize("make", [CATKD, SRRL])
def test_classifiers_stay_parts_of_their_networks(make, distill) -> None:
    module = distill(criterion=make())
    module.build(torch.zeros(1, 3, 8, 8))
    assert not [name for name in module.criterion.state_dict() if "head" in name]
    assert not [name for name in module.state_dict() if name.startswith("teacher")]


def test_srrl_asks_the_teachers_classifier(heads, maps) -> None:
    criterion = _built(SRRL("a", "c"), *maps, heads)
    terms = criterion(*maps, _batch())
    connected = criterion.connector(maps[0].features["a"]).mean((2, 3))
    torch.testing.assert_close(terms["fm"], F.mse_loss(connected, maps[1].features["c"].mean((2, 3))))
    torch.testing.assert_close(terms["sr"], F.mse_loss(heads[1](connected), maps[1].logits))
    weight, bias = heads[1][0].weight, heads[1][0].bias
    connected = criterion.connector(maps[0].features["a"])
    loss = KF.srrl_loss(connected, maps[1].features["c"], maps[1].logits, weight, bias, 3.0)
    torch.testing.assert_close(loss, terms["fm"] + 3 * terms["sr"])
    loss.backward()
    assert weight.grad is None


def test_simkd_copies_the_teachers_classifier(heads, maps) -> None:
    criterion = _built(SimKD("a", "c"), *maps, heads)
    before = criterion.answer(maps[0]).logits
    with torch.no_grad():
        heads[1][0].weight.zero_()
    torch.testing.assert_close(criterion.answer(maps[0]).logits, before)
    assert {"head.weight", "head.bias"} <= set(criterion.state_dict())


def test_simkd_projects_once(heads, maps) -> None:
    """In a module that answers with the projection, BatchNorm must not see it twice."""
    criterion = _built(SimKD("a", "c"), *maps, heads)
    answer = criterion.answer(maps[0])
    torch.testing.assert_close(criterion(answer, maps[1], _batch()), criterion(*maps, _batch()))
    assert criterion.projector[1].num_batches_tracked == 2


def test_semckd_in_a_batch_that_is_not_full() -> None:
    """0, and gradients of 0: the other processes wait for them."""
    student = _outputs(a=torch.randn(SAMPLES, 4, 4, 4, requires_grad=True))
    teacher = _outputs(c=torch.randn(SAMPLES, 5, 4, 4))
    criterion = _built(SemCKD(["a"], ["c"], batch_size=8), student, teacher)
    with pytest.warns(UserWarning, match="SemCKD's loss is 0 for a batch of 6 images, as it requires 8"):
        loss = criterion(student, teacher, _batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(student, teacher, _batch())
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in criterion.parameters())
    assert not student.features["a"].grad.any()
    other = _built(SemCKD(["a"], ["c"], batch_size=SAMPLES), student, teacher)
    assert other(student, teacher, _batch()) > 0


def test_semckd_compares_within_a_view() -> None:
    torch.manual_seed(0)
    shapes = {"a": (4, 4, 4)}, {"c": (5, 4, 4), "d": (5, 2, 2)}
    views = [
        [_outputs(**{name: torch.randn(SAMPLES, *shape) for name, shape in role.items()}) for role in shapes]
        for _ in range(2)
    ]
    criterion = _built(SemCKD(["a"], ["c", "d"], batch_size=SAMPLES), *views[0]).eval()
    single = [criterion(*view, _batch()) for view in views]
    both = [
        _outputs(**{name: torch.cat([view[role].features[name] for view in views]) for name in views[0][role].features})
        for role in range(2)
    ]
    loss = criterion(*both, Batch(None, torch.zeros(2 * SAMPLES), views=2))
    torch.testing.assert_close(loss, (single[0] + single[1]) / 2)
    assert loss > 0


def test_semckd_spreads_its_attention_over_the_teachers_layers() -> None:
    student = _outputs(a=torch.randn(SAMPLES, 4, 8, 8), b=torch.randn(SAMPLES, 6, 4, 4))
    features = {name: torch.randn(SAMPLES, 5, 4, 4) for name in "cde"}
    criterion = _built(SemCKD(["a", "b"], list("cde"), batch_size=SAMPLES), student, _outputs(**features))
    attention = criterion.attention(list(student.features.values()), list(features.values()))
    assert attention.shape == (SAMPLES, 2, 3)
    torch.testing.assert_close(attention.sum(2), torch.ones(SAMPLES, 2))
    assert criterion(student, _outputs(**features), _batch()).isfinite()


def test_semckd_takes_the_datas_batch_size(distill, data, trainer) -> None:
    module = distill(criterion=SemCKD(), distill_weight=1.0, hard_weight=1.0)
    trainer(max_epochs=1).fit(module, data)
    assert module.criterion.queries[0].linear1.in_features == data.batch_size


def test_ofa_by_a_loop() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(SAMPLES, CLASSES), torch.randn(SAMPLES, CLASSES)
    target = torch.tensor([0, 1, 2, 3, 4, IGNORE_INDEX])
    total = 0.0
    for i in range(SAMPLES):
        p, q = ((logits[i] / 2).softmax(0).tolist() for logits in (teacher, student))
        for c in range(CLASSES):
            y = float(target[i] == c)
            total -= ((p[c] + y) ** 1.4 - y) * math.log(q[c])
    assert KF.ofa_loss(student, teacher, target, eps=1.4, temperature=2.0).item() == pytest.approx(total / SAMPLES)
    plain = F.cross_entropy(student, teacher.softmax(1))
    torch.testing.assert_close(KF.ofa_loss(student, teacher, target), plain)


def test_ofakd_has_an_exit_for_every_stage() -> None:
    features = {
        "a": torch.randn(SAMPLES, 4, 8, 8),
        "b": torch.randn(SAMPLES, 8, 4, 4),
        "c": torch.randn(SAMPLES, 9, 12),
    }
    student, teacher = _outputs(torch.randn(SAMPLES, CLASSES), **features), _outputs(torch.randn(SAMPLES, CLASSES))
    criterion = _built(OFAKD(list("abc"), exits_weight=0.5), student, teacher)
    logits = [out(feature) for out, feature in zip(criterion.exits, features.values(), strict=True)]
    assert all(answer.shape == (SAMPLES, CLASSES) for answer in logits)
    terms = criterion(student, teacher, _batch())
    wanted = [KF.ofa_loss(answer, teacher.logits, _batch().target) for answer in (*logits, student.logits)]
    torch.testing.assert_close(terms["exits"], 0.5 * sum(wanted[:3]))
    torch.testing.assert_close(terms["logits"], wanted[3])


def test_dist_plus_wants_channels_correlated() -> None:
    """torchdistill has the sign the other way round: there, the opposite of the teacher would be best."""
    feature = torch.randn(SAMPLES, 6, 4, 4)
    assert KF.channel_relation_loss(2 * feature + 1, feature).item() == pytest.approx(0, abs=1e-6)
    assert KF.channel_relation_loss(-feature, feature).item() == pytest.approx(2, abs=1e-6)
    assert KF.spatial_relation_loss(-feature, feature).item() == pytest.approx(2, abs=1e-6)


def test_dist_plus_is_dist_besides() -> None:
    logits = torch.randn(SAMPLES, CLASSES), torch.randn(SAMPLES, CLASSES)
    student, teacher = (_outputs(values, a=torch.randn(SAMPLES, 6, 4, 4)) for values in logits)
    terms = _built(DISTPlus(["a"], ["a"], temperature=4.0), student, teacher)(student, teacher, _batch())
    torch.testing.assert_close(terms["inter"] + terms["intra"], KF.dist_loss(*logits, temperature=4.0))
    assert set(terms) == {"inter", "intra", "channel", "spatial"}


def _tokens(seed: int, count: int, width: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    return _outputs(**{name: torch.randn(SAMPLES, count, width, generator=generator) for name in "abc"})


def test_vitkd_drops_each_networks_class_tokens() -> None:
    """DeiT's student has one more than its teacher, say."""
    student, teacher = _tokens(0, 11, 4), _tokens(1, 10, 6)
    criterion = _built(ViTKD(list("abc"), list("abc"), student_prefix_tokens=2), student, teacher)
    torch.manual_seed(0)
    found = criterion(student, teacher, _batch())
    both = (
        _outputs(**{name: tokens[:, 2:] for name, tokens in student.features.items()}),
        _outputs(**{name: tokens[:, 1:] for name, tokens in teacher.features.items()}),
    )
    criterion.student_prefix_tokens = criterion.teacher_prefix_tokens = 0
    torch.manual_seed(0)
    for name, term in criterion(*both, _batch()).items():
        torch.testing.assert_close(term, found[name])


def test_vitkd_drops_the_class_tokens() -> None:
    student, teacher = _tokens(0, 11, 4), _tokens(1, 11, 6)
    criterion = ViTKD(list("abc"), list("abc"), student_prefix_tokens=2, teacher_prefix_tokens=2)
    criterion = _built(criterion, student, teacher)
    found = []
    for factor in (1, 100):
        for outputs in (student, teacher):
            for tokens in outputs.features.values():
                tokens[:, :2] *= factor
        torch.manual_seed(0)
        found.append(criterion(student, teacher, _batch()))
    torch.testing.assert_close(*found)


def test_vitkd_generates_what_is_masked() -> None:
    student, teacher = _tokens(0, 10, 4), _tokens(1, 10, 6)
    criterion = _built(ViTKD(list("abc"), list("abc"), mask_ratio=0.3), student, teacher)
    masked = []
    loss = KF.vitkd_generation_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lkd.losses.vitkd.vitkd_generation_loss", lambda *given: masked.append(given[2]) or loss(*given))
        terms = [criterion(student, teacher, _batch()) for _ in range(2)]
    assert (masked[0].sum(1) == 9 - int(9 * 0.7)).all()
    assert not torch.equal(*masked)
    assert terms[0]["generation"] != terms[1]["generation"]


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_deit_equals_timms_task(kind: str) -> None:
    torch.manual_seed(0)
    size = {"num_classes": CLASSES, "img_size": 32, "patch_size": 16}
    student = timm.create_model("deit_tiny_distilled_patch16_224", depth=2, **size)
    teacher = resnet8(num_classes=CLASSES).eval()
    for head in (student.head, student.head_dist):
        nn.init.normal_(head.weight)
    image, target = torch.randn(SAMPLES, 3, 32, 32), _batch().target
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
    # timm's task normalises the teacher's image anew where the networks' statistics differ; here, they do not
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
    """A teacher with the student's `pretrained_cfg`, where timm looks for mean and std."""

    def __init__(self, network: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.pretrained_cfg = dict(student.pretrained_cfg)

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)


def test_deit_teaches_the_labels_to_the_class_head_alone() -> None:
    heads = {name: torch.randn(SAMPLES, CLASSES, requires_grad=True) for name in "ab"}
    student, teacher = _outputs(**heads), _outputs(torch.randn(SAMPLES, CLASSES))
    terms = _built(DeiT("a", "b"), student, teacher)(student, teacher, _batch())
    grads = torch.autograd.grad(terms["class"], list(heads.values()), allow_unused=True)
    assert grads[0].any()
    assert grads[1] is None
    assert torch.autograd.grad(terms["token"], list(heads.values()), allow_unused=True)[0] is None


def test_backbone_reads_maps_and_tokens_alike() -> None:
    torch.manual_seed(0)
    feature, pooled = torch.randn(SAMPLES, 6, 4, 4), torch.randn(SAMPLES, 6)
    student = _outputs(p=torch.randn(SAMPLES, 3), m=torch.randn(SAMPLES, 4, 8, 8))
    tokens = torch.cat([torch.randn(SAMPLES, 5, 6), feature.flatten(2).mT], 1)
    found = []
    for given in (feature, tokens):
        torch.manual_seed(1)
        criterion = BackboneKD("p", "q", "m", "n", teacher_prefix_tokens=5)
        teacher = _outputs(q=pooled, n=given)
        found.append(_built(criterion, student, teacher)(student, teacher, _batch()))
    torch.testing.assert_close(*found)
    projected = criterion.patch_projection(F.avg_pool2d(student.features["m"], 2))
    cosine = 1 - F.cosine_similarity(projected, feature, dim=1).mean()
    torch.testing.assert_close(found[0]["patches"], 0.9 * cosine + 0.1 * F.smooth_l1_loss(projected, feature))
    cosine = 1 - F.cosine_similarity(criterion.pooled_projection(student.features["p"]), pooled, dim=1)
    torch.testing.assert_close(found[0]["pooled"], cosine.mean())


def test_backbone_without_a_classifier(distill, data, trainer) -> None:
    """The teacher's answer is its pooled feature; nothing asks for as many classes, or for labels."""
    teacher = timm.create_model("test_vit", num_classes=0, img_size=8, patch_size=2)
    criterion = BackboneKD(teacher_pooled_layer=None)
    module = distill(teacher=teacher, criterion=criterion, distill_weight=1.0, hard_weight=0.0)
    trainer(max_epochs=1).fit(module, data)
    assert criterion.pooled_projection.out_features == 64
    assert {"train/backbonekd_pooled", "train/backbonekd_patches"} <= set(module.trainer.callback_metrics)


MAP, TOKENS, POOLED = (2, 4, 4, 4), (2, 10, 4), (2, 4)


@pytest.mark.parametrize(
    ("make", "shapes", "says"),
    [
        (lambda: CATKD("a", "b"), (POOLED, MAP), "CATKD reads feature maps .* the student layer returns"),
        (
            lambda: CATKD("a", "b"),
            (MAP, MAP),
            r"CATKD requires a student classifier .* map has 4 channels, .* Linear\(in_f",
        ),
        (
            lambda: SRRL("a", "b", teacher_head="fc"),
            (MAP, MAP),
            "the layer 'fc' does not exist; set another feature map",
        ),
        (lambda: SimKD("a", "b"), (TOKENS, MAP), "SimKD reads feature maps"),
        (lambda: SemCKD(["a"], ["b"]), (MAP, MAP), "SemCKD requires a fixed batch size, .* set the .* batch_size"),
        (lambda: OFAKD(["a"]), (POOLED, MAP), r"OFAKD requires feature maps .* returns \(2, 4\); set other"),
        (lambda: ViTKD(list("aa"), list("bb")), (MAP, TOKENS), r"ViTKD reads tokens \(B, N, C\)"),
        (lambda: ViTKD(["a"], ["b"]), (TOKENS, TOKENS), "ViTKD requires at least two layers"),
        (
            lambda: ViTKD(list("aa"), list("bb")),
            (TOKENS, (2, 17, 4)),
            "got 9 from the student and 16 from the teacher; use",
        ),
        (
            lambda: ViTKD(list("aa"), list("bb"), teacher_prefix_tokens=2),
            (TOKENS, TOKENS),
            r"teacher layer returns 10 tokens, 8 without the 2 class tokens; .* \(teacher_prefix_tokens\)",
        ),
        (lambda: DeiT("a", "a"), (POOLED, MAP), r"DeiT requires two heads that return logits \(2, 5\), .* 'a' returns"),
        (
            lambda: BackboneKD("a", "b", patch_weight=0),
            (POOLED, TOKENS),
            r"pooled .* \(2, 10, 4\) .* null",
        ),
        (lambda: BackboneKD("a", "b", "a", "b", 0), (POOLED, MAP), "BackboneKD reads feature maps"),
    ],
)
def test_layers_of_another_form(make, shapes, says: str) -> None:
    student, teacher = (
        Outputs(torch.zeros(2, CLASSES), {name: torch.zeros(shape)}) for name, shape in zip("ab", shapes, strict=True)
    )
    network = nn.Sequential(nn.Linear(3, CLASSES))
    with pytest.raises(ValueError, match=says):
        _built(make(), student, teacher, (network, network))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CATKD(resolution=0), "resolution must be at least 1, got 0"),
        (lambda: SRRL(regression_weight=-1), "regression_weight must not be negative"),
        (lambda: SimKD(factor=0), "factor must be at least 1"),
        (lambda: SemCKD(factor=0), "factor must be at least 1"),
        (lambda: OFAKD(eps=0), "eps must be greater than 0"),
        (lambda: DISTPlus(channel_weight=-1), "channel_weight must not be negative"),
        (lambda: ViTKD(mask_ratio=0), "mask_ratio must be greater than 0 and at most 1"),
        (lambda: DeiT(token_weight=2), "token_weight must be between 0 and 1"),
        (lambda: DeiT(kind="firm"), "kind must be 'hard' or 'soft', got 'firm'"),
        (lambda: DeiT(label_smoothing=1), "label_smoothing must be at least 0 and less than 1"),
        (lambda: BackboneKD(pooled_weight=0, patch_weight=0), "pooled_weight and patch_weight are both 0"),
    ],
)
def test_mistakes(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
