"""CRD: contrastive representation distillation."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lkd import Batch, Outputs, Probe
from lkd import functional as KF
from lkd.losses import CRD
from lkd.types import IGNORE_INDEX
from tests.losses import parity
from tests.losses.cases import FeatureCase
from tests.losses.parity import Hyper, Values

VECTORS = {"student": {"a": (6,)}, "teacher": {"c": (9,)}}

MEMORIES = ("student_memory", "teacher_memory", "targets")


def _example(num_negatives: int = 16, own_class: bool = False) -> CRD:
    return CRD("a", "c", num_samples=20, feat_dim=5, num_negatives=num_negatives, own_class=own_class)


ROWS = 12

CASES = {
    "CRD": FeatureCase(_example, **VECTORS, memories=MEMORIES),
    "CRD-all": FeatureCase(lambda: _example(own_class=True), **VECTORS, memories=MEMORIES),
    "CRD-views": FeatureCase(_example, **VECTORS, views=2, memories=MEMORIES),
}


class _GivenCRD(CRD):
    """CRD with the fixture's images as negatives."""

    drawn: Tensor

    def draw(self, index: Tensor, target: Tensor) -> Tensor:
        return self.drawn


def _crd(inputs: Values, hyper: Hyper) -> Values:
    """Compute two steps.

    The fixture's `memory_v1` is the student's memory, and `Z_v1` the normalization of the student's embeddings.
    """
    settings = hyper["temperature"], hyper["momentum"], True, hyper["eps"]
    shape = inputs["memory_v1"].shape
    criterion = parity.built(_GivenCRD("student", "teacher", *shape, int(hyper["nce_k"]), *settings), inputs)
    criterion.student_memory.copy_(inputs["memory_v1"])
    criterion.teacher_memory.copy_(inputs["memory_v2"])
    names = {"student_embedding": "embed_s", "teacher_embedding": "embed_t"}
    kinds = [(own, name, kind) for own, name in names.items() for kind in ("weight", "bias")]
    parameters = {f"{own}.1.{kind}": inputs[f"params.{name}.linear.{kind}"] for own, name, kind in kinds}
    values = {}
    for step in ("", "_step2"):
        features = {f"{name}_features.0": inputs[f"{name}_features{step}.0"] for name in ("student", "teacher")}
        index, criterion.drawn = inputs[f"index{step}"], inputs[f"contrast_index{step}"][:, 1:]
        assert torch.equal(index, inputs[f"contrast_index{step}"][:, 0])
        target = torch.zeros_like(index)
        values[f"loss{step}"] = parity.terms(criterion, {**inputs, **features, "target": target}, index, **parameters)[
            "loss"
        ]
        values[f"memory_v1_after{step}"] = criterion.student_memory.clone()
        values[f"memory_v2_after{step}"] = criterion.teacher_memory.clone()
    values["Z_v1"], values["Z_v2"] = criterion.log_z.exp()
    return {**values, **{f"loss.{peer}": values["loss"] for peer in ("mdistiller", "torchdistill")}}


PARITY = {"crd": _crd}


def _criterion(kind: type[CRD] = CRD, train_index: Tensor | None = None, **settings) -> CRD:
    torch.manual_seed(0)
    criterion = kind("s", "t", **{"num_samples": ROWS, "feat_dim": 4, "num_negatives": 6, **settings})
    criterion.train_index = train_index
    criterion.build(*(Probe(criterion, outputs) for outputs in _outputs(1)))
    return criterion


def _outputs(size: int, seed: int = 0) -> tuple[Outputs, Outputs]:
    generator = torch.Generator().manual_seed(seed)
    features = {"s": torch.randn(size, 3, generator=generator), "t": torch.randn(size, 5, generator=generator)}
    return tuple(Outputs(torch.zeros(size, 2), {name: feature}) for name, feature in features.items())


def _step(criterion: CRD, index: list[int], target: list[int] | None = None, seed: int = 0) -> Tensor:
    target = torch.tensor([i % 3 for i in index] if target is None else target)
    return criterion(*_outputs(len(index), seed), Batch(None, target, torch.tensor(index)))


def test_loss_by_a_loop() -> None:
    ratio = torch.rand(3, 5, dtype=torch.float64) + 0.1
    noise, total = 4 / 20, 0.0
    for row in ratio.tolist():
        total -= math.log(row[0] / (row[0] + noise + 1e-7))
        total -= sum(math.log(noise / (value + noise + 1e-7)) for value in row[1:])
    assert KF.crd_loss(ratio.log(), num_samples=20).item() == pytest.approx(total / 3, rel=1e-12)


def test_a_low_temperature_does_not_overflow() -> None:
    criterion = _criterion(temperature=0.001)
    loss = _step(criterion, [0, 1, 2])
    loss.backward()
    assert loss.isfinite()
    assert criterion.student_embedding[1].weight.grad.isfinite().all()


def test_only_images_of_the_batch_are_stored() -> None:
    criterion = _criterion(momentum=0.25)
    before = criterion.student_memory.clone(), criterion.teacher_memory.clone()
    _step(criterion, [7, 2])
    ours, theirs = _outputs(2)
    new = criterion.student_embedding(ours.features["s"]), criterion.teacher_embedding(theirs.features["t"])
    for memory, old, embedding in zip((criterion.student_memory, criterion.teacher_memory), before, new, strict=True):
        wanted = F.normalize(0.25 * old[[7, 2]] + 0.75 * F.normalize(embedding, dim=1), dim=1)
        torch.testing.assert_close(memory[[7, 2]], wanted)
        others = [row for row in range(ROWS) if row not in (7, 2)]
        assert torch.equal(memory[others], old[others])
    assert criterion.targets[[7, 2]].tolist() == [1, 2]
    assert (criterion.targets != IGNORE_INDEX).sum() == 2


def test_repeated_images_store_their_mean() -> None:
    criterion, momentum = _criterion(), 0.5
    old = criterion.student_memory.clone()
    _step(criterion, [3, 5, 3])
    new = F.normalize(criterion.student_embedding(_outputs(3)[0].features["s"]), dim=1)
    wanted = F.normalize(momentum * old[3] + (1 - momentum) * (new[0] + new[2]) / 2, dim=0)
    torch.testing.assert_close(criterion.student_memory[3], wanted)


def test_unlabelled_views_keep_the_stored_label() -> None:
    criterion = _criterion()
    _step(criterion, [3, 5, 3, 5], target=[2, 1, IGNORE_INDEX, IGNORE_INDEX])
    assert criterion.targets[[3, 5]].tolist() == [2, 1]
    _step(criterion, [5, 7], target=[IGNORE_INDEX, IGNORE_INDEX])
    assert criterion.targets[[3, 5, 7]].tolist() == [2, 1, IGNORE_INDEX]


def test_normalization_is_fixed_by_the_first_step() -> None:
    criterion = _criterion(num_negatives=500, own_class=True)
    _step(criterion, [0, 1, 2, 3])
    first = criterion.log_z.clone()
    assert first.isfinite().all()
    _step(criterion, [4, 5], seed=1)
    assert torch.equal(criterion.log_z, first)
    again = _criterion(num_negatives=500, own_class=True).eval()
    _step(again, [0, 1, 2, 3])
    assert again.log_z.isneginf().all()


def test_evaluation_stores_nothing() -> None:
    criterion = _criterion().eval()
    before = {name: tensor.clone() for name, tensor in criterion.state_dict().items()}
    assert _step(criterion, [0, 1]).isfinite()
    assert all(torch.equal(tensor, before[name]) for name, tensor in criterion.state_dict().items())


def _drawn(criterion: CRD, target: list[int]) -> Tensor:
    return criterion.draw(torch.zeros(len(target), dtype=torch.int64), torch.tensor(target))


def test_negatives_exclude_known_images_of_the_same_class() -> None:
    criterion = _criterion(num_negatives=4000)
    assert {int(row) for row in _drawn(criterion, [0])[0]} == set(range(ROWS))
    _step(criterion, list(range(10)))
    drawn = _drawn(criterion, [0, 1, 2, IGNORE_INDEX])
    for kind in range(3):
        wanted = {row for row in range(ROWS) if row % 3 != kind or row >= 10}
        counts = drawn[kind].bincount(minlength=ROWS)
        assert set(counts.nonzero().flatten().tolist()) == wanted
        even = 4000 / len(wanted)
        assert (counts[sorted(wanted)] - even).abs().max() < 6 * even**0.5
    assert {int(row) for row in drawn[3]} == set(range(ROWS))


def test_own_class_draws_all_images_equally() -> None:
    criterion = _criterion(num_negatives=6000, own_class=True)
    _step(criterion, list(range(ROWS)))
    counts = _drawn(criterion, [0])[0].bincount(minlength=ROWS)
    assert (counts - 500).abs().max() < 6 * 500**0.5


def test_single_class() -> None:
    criterion = _criterion()
    _step(criterion, list(range(ROWS)), target=[1] * ROWS)
    assert _step(criterion, [0, 1], target=[1, 1]).isfinite()


def test_num_samples_is_required() -> None:
    with pytest.raises(ValueError, match="the data module does not provide their number; set num_samples"):
        _criterion(num_samples=None)


@pytest.mark.parametrize("own_class", [True, False])
def test_only_training_images_are_drawn(own_class: bool) -> None:
    """Other images are never written to the memories: they would remain random negatives, and N would be too large."""
    training = torch.tensor([0, 1, 4, 5, 6, 9])
    criterion = _criterion(train_index=training, num_negatives=3000, own_class=own_class)
    _step(criterion, [0, 1, 4, 5])
    wanted = training if own_class else training[(training % 3 != 0) | (training > 5)]
    counts = _drawn(criterion, [0])[0].bincount(minlength=ROWS)
    assert counts.nonzero().flatten().tolist() == wanted.tolist()
    even = 3000 / len(wanted)
    assert (counts[wanted] - even).abs().max() < 6 * even**0.5


def test_normalization_counts_only_training_images() -> None:
    """Memories that are larger than the number of training images do not change the loss or the normalization."""

    class Given(CRD):
        def draw(self, index: Tensor, target: Tensor) -> Tensor:
            return torch.tensor([[2, 3, 4]]).expand(len(index), -1)

    few, many = (_criterion(Given, num_samples=size, train_index=torch.arange(6)) for size in (6, ROWS))
    with torch.no_grad():
        for name in ("student_memory", "teacher_memory"):
            getattr(many, name)[:6] = getattr(few, name)
    torch.testing.assert_close(_step(many, [0, 1]), _step(few, [0, 1]))
    torch.testing.assert_close(many.log_z, few.log_z)


def test_initial_memories_do_not_depend_on_the_seed() -> None:
    first, second = CRD("s", "t", num_samples=ROWS), CRD("s", "t", num_samples=ROWS)
    for seed, criterion in enumerate((first, second)):
        torch.manual_seed(seed)
        criterion.build(*(Probe(criterion, outputs) for outputs in _outputs(1)))
    assert torch.equal(first.student_memory, second.student_memory)
    assert not torch.equal(first.student_memory, first.teacher_memory)


def test_large_memories_are_reported(monkeypatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _criterion()
    monkeypatch.setattr("lkd.losses.crd._LARGE", 2 * 4 * ROWS * 4 - 1)
    with pytest.warns(UserWarning, match=r"two memory banks of 12 x 4 values, 0.0 GiB on each device"):
        _criterion()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"feat_dim": -1}, "feat_dim must be at least 1, got -1"),
        ({"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
        ({"momentum": 1.5}, "momentum must be between 0 and 1, got 1.5"),
    ],
)
def test_invalid_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CRD(**settings)


@pytest.mark.parametrize("position", [ROWS, -1])
def test_index_out_of_range(position: int) -> None:
    with pytest.raises(ValueError, match=rf"CRD stores {ROWS} images \(num_samples\).*index {position} is out"):
        _step(_criterion(), [0, position])


def test_index_is_required() -> None:
    criterion = _criterion()
    with pytest.raises(ValueError, match="requires the dataset indices of the images"):
        criterion(*_outputs(2), Batch(None, torch.zeros(2, dtype=torch.int64)))
