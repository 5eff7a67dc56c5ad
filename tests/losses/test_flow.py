"""Flow matrices, singular vectors, factors, correlations and review, where the table of criteria does not reach."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lkd import Batch, DistillLoss, Outputs, Probe
from lkd import functional as KF
from lkd.losses import FSP, FT, KDSVD, ReviewKD

SHAPES = ((6, 5, 5), (8, 4, 4), (7, 3, 3))
BATCH = Batch(None, torch.zeros(3))


def _features(seed: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *shape, generator=generator, dtype=torch.float64).relu() for shape in shapes]


def _outputs(features: list[Tensor]) -> Outputs:
    return Outputs(torch.zeros(3, 2), {f"layer{number}": feature for number, feature in enumerate(features)})


def _built(kind: type[DistillLoss], student: list[Tensor], teacher: list[Tensor], **settings: object) -> DistillLoss:
    answers = [_outputs(student), _outputs(teacher)]
    criterion = kind(*(list(answer.features) for answer in answers), **settings)
    criterion.build(*(Probe(nn.Identity(), answer) for answer in answers))
    return criterion.double()


def test_fsp_is_the_frobenius_norm_of_the_matrices_difference() -> None:
    shapes = ((2, 8, 8), (3, 4, 4), (4, 4, 4))
    ours, theirs = _features(0, shapes), _features(1, shapes)
    total = 0.0
    for layer in range(2):
        for sample in range(3):
            matrices = []
            for features in (ours, theirs):
                bottom, top = features[layer][sample].numpy(), features[layer + 1][sample].numpy()
                if bottom.shape[1] == 8:
                    bottom = bottom.reshape(len(bottom), 4, 2, 4, 2).max((2, 4))
                matrices.append(np.einsum("ihw,jhw->ij", bottom, top) / 16)
            total += np.linalg.norm(matrices[0] - matrices[1]) ** 2 / 3
    assert float(KF.fsp_loss(ours, theirs)) == pytest.approx(total, rel=1e-12)


def _by_numpy(ours: list[Tensor], theirs: list[Tensor], number: int, signs: Iterator[int], settle: bool) -> float:
    """The loss of KDSVD by loops, with singular vectors of these signs, the teacher's largest entry made positive."""
    total = 0.0
    for sample in range(3):
        vectors: list[tuple[np.ndarray, np.ndarray]] = []
        for student, teacher in zip(ours, theirs, strict=True):
            found = np.linalg.svd(student[sample].flatten(1).numpy().T)[2][: number + 3]
            _, values, wanted = np.linalg.svd(teacher[sample].flatten(1).numpy().T)
            aligned, wanted = [], wanted[:number]
            for vector in wanted:
                vector *= next(signs)
                vector *= np.sign(vector[np.abs(vector).argmax()]) if settle else 1
                nearest = max(found, key=lambda other, vector=vector: abs(other @ vector))
                aligned.append(nearest * np.sign(nearest @ vector))
            lengths = (values[:number] / np.linalg.norm(values[:number]))[:, None]
            vectors.append((np.stack(aligned) * lengths, wanted * lengths))
        for before, behind in pairwise(vectors):
            rbf = [
                np.exp(-((here[:, :, None] - there[:, None, :]) ** 2) / 8)
                for here, there in zip(before, behind, strict=True)
            ]
            total += ((rbf[0] - rbf[1]) ** 2).sum() / 3
    return total


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_signs_of_singular_vectors_do_not_count(number: int, sign: int) -> None:
    ours, theirs = _features(10), _features(11)
    expected = _by_numpy(ours, theirs, number, repeat(sign), settle=True)
    assert float(KF.kdsvd_loss(ours, theirs, number)) == pytest.approx(expected, rel=1e-10)


def test_the_benchmarks_kdsvd_is_that_of_some_signs() -> None:
    """It takes the teacher's vectors as the library gave them; of the 64 choices of signs one has its value."""
    values = load_file(Path(__file__).parent.parent / "reference" / "kdsvd.safetensors")
    ours, theirs = (
        [values[f"case0.input.{network}_features.{layer}"] for layer in (0, 1)] for network in ("student", "teacher")
    )
    found = [_by_numpy(ours, theirs, 1, iter(signs), settle=False) for signs in product((1, -1), repeat=6)]
    wanted = float(values["case0.expected.loss.repdistiller"])
    assert min(abs(value - wanted) for value in found) < 1e-12 * wanted
    settled = float(KF.kdsvd_loss(ours, theirs, 1))
    assert min(abs(value - settled) for value in found) < 1e-12 * settled


@pytest.mark.parametrize("number", [1, 2])
def test_gradient_of_kdsvd(number: int) -> None:
    """By differences; the library's own gradient, exact here, is the same."""
    ours, theirs = [feature.requires_grad_() for feature in _features(20)], _features(21)
    assert torch.autograd.gradcheck(lambda *features: KF.kdsvd_loss(features, theirs, number), ours, atol=1e-6)


def test_equal_singular_values_have_a_finite_gradient() -> None:
    square = torch.eye(9).view(1, 9, 3, 3).repeat(3, 1, 1, 1).requires_grad_()
    other = torch.ones(3, 9, 3, 3, requires_grad=True)  # all singular values but one are 0
    teacher = [torch.rand(3, 9, 3, 3), torch.rand(3, 9, 3, 3)]
    loss = KF.kdsvd_loss([square, other], teacher, 2)
    grads = torch.autograd.grad(loss, [square, other])
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


def test_kdsvd_asks_for_as_many_pixels_as_vectors() -> None:
    features = _features(0, ((4, 8, 8), (6, 1, 2)))
    with pytest.raises(ValueError, match="compares 3 singular vectors, but the teacher's layer1 has 6 channels of 1x2"):
        _built(KDSVD, features, features, num_vectors=3)


@pytest.mark.parametrize("kind", [FSP, KDSVD])
def test_channels_must_be_equal_or_connected(kind: type[DistillLoss]) -> None:
    ours, theirs = _features(0), _features(1, ((6, 5, 5), (9, 4, 4), (7, 3, 3)))
    with pytest.raises(
        ValueError, match=rf"{kind.__name__} requires the same number of channels .* got 8 \(layer1\) and 9"
    ):
        _built(kind, ours, theirs)
    criterion = _built(kind, ours, theirs, connect=True)
    assert {name.partition(".")[2].partition(".")[0] for name, _ in criterion.named_parameters()} == {"1"}
    with pytest.raises(ValueError, match="requires at least two, got 1"):
        _built(kind, ours[:1], ours[:1])


@pytest.mark.parametrize(("frozen", "weights"), [("factor", (1.0, 0.0)), ("reconstruction", (0.0, 1.0))])
def test_a_stage_of_ft_trains_its_own_part_alone(frozen: str, weights: tuple[float, float]) -> None:
    """Not even weight decay moves the other part."""
    ours, theirs = [feature.requires_grad_() for feature in _features(0)[:1]], _features(1)[:1]
    criterion = _built(FT, ours, theirs)
    criterion.reconstruction_weight, criterion.factor_weight = weights
    before = {name: parameter.detach().clone() for name, parameter in criterion.named_parameters()}
    optimizer = torch.optim.SGD([*criterion.parameters(), *ours], lr=0.1, weight_decay=0.1, momentum=0.9)
    student = ours[0].detach().clone()
    for _ in range(2):
        terms = criterion(_outputs(ours), _outputs(theirs), BATCH)
        assert frozen not in terms
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    moved = {
        name.partition(".")[0] for name, parameter in criterion.named_parameters() if not parameter.equal(before[name])
    }
    assert moved == ({"encoders", "decoders"} if frozen == "factor" else {"translators"})
    assert ours[0].equal(student) == (frozen == "factor")


def test_the_paraphraser_learns_nothing_from_the_student() -> None:
    ours, theirs = _features(0)[:1], _features(1)[:1]
    criterion = _built(FT, ours, theirs)
    terms = criterion(_outputs(ours), _outputs(theirs), BATCH)
    paraphraser = [*criterion.encoders.parameters(), *criterion.decoders.parameters()]
    grads = torch.autograd.grad(terms["factor"], paraphraser, allow_unused=True, retain_graph=True)
    assert all(grad is None for grad in grads)
    assert all(grad.any() for grad in torch.autograd.grad(terms["reconstruction"], paraphraser))


def test_a_paraphraser_bears_features_of_any_size() -> None:
    """Untrained networks have large ones; the error is relative."""
    feature = _features(2)[:1]
    torch.manual_seed(0)
    criterion = _built(FT, feature, feature, factor_weight=0.0)
    for decoder in criterion.decoders:
        nn.init.zeros_(decoder[-2].weight)
        nn.init.zeros_(decoder[-2].bias)
    values = [criterion(_outputs(feature), _outputs([size * feature[0]]), BATCH)["reconstruction"] for size in (1, 1e4)]
    torch.testing.assert_close(values, [torch.ones_like(value) for value in values])


def test_weights_of_ft() -> None:
    for weights, says in (
        ((-1.0, 1.0), "reconstruction_weight must not be negative, got -1.0"),
        ((1.0, float("inf")), "factor_weight must not be negative, got inf"),
        ((0.0, 0.0), "factor_weight are both 0"),
    ):
        with pytest.raises(ValueError, match=says):
            FT(reconstruction_weight=weights[0], factor_weight=weights[1])
    for name, value in (("paraphrase_rate", 0.0), ("p", 0.5)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            FT(**{name: value})


def test_correlations_do_not_see_where_or_how_strong() -> None:
    feature = _features(3)[1]
    other = 7 * feature.flatten(2)[:, :, torch.randperm(16)].view_as(feature)
    assert KF.ickd_loss(other, feature) < 1e-20
    assert KF.ickd_loss(feature[:, torch.arange(7, -1, -1)], feature) > 1e-3


def test_deeper_levels_reach_the_levels_before_them() -> None:
    """The first level's output depends on all deeper ones, not the reverse."""
    shapes = ((4, 8, 8), (6, 4, 4), (5,))
    ours, theirs = _features(4, shapes), _features(5, shapes)
    criterion = _built(ReviewKD, ours, theirs).eval()
    levels = criterion.levels(_outputs(ours), _outputs(theirs))
    assert [tuple(own.shape[1:]) for own, _ in levels] == [(5, 1, 1), (6, 4, 4), (4, 8, 8)]
    for feature in ours:
        feature.requires_grad_()
    deeper, reached = None, []
    for fusion, (own, other) in zip(criterion.fusions, criterion.levels(_outputs(ours), _outputs(theirs)), strict=True):
        output, deeper = fusion(own, deeper, other.shape[2:])
        assert output.shape == other.shape
        grads = torch.autograd.grad(output.square().sum(), ours, allow_unused=True, retain_graph=True)
        reached.append([grad is not None for grad in grads])
    assert reached == [[False, False, True], [False, True, True], [True, True, True]]


def test_review_reads_maps_or_pooled_features() -> None:
    tokens = [torch.zeros(3, 4, 6, dtype=torch.float64)]
    with pytest.raises(ValueError, match=r"ReviewKD reads feature maps .* returns \(3, 4, 6\)"):
        _built(ReviewKD, tokens, tokens)
    with pytest.raises(ValueError, match="max_mid_channels must be at least 1"):
        ReviewKD(max_mid_channels=0)
