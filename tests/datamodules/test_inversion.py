"""Training images synthesized from a network (DeepInversion)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lkd.datamodules import DeepInversion, DigitsDataModule
from lkd.datamodules.inversion import statistics_distance, total_variation
from lkd.models import load_weights, resnet8
from lkd.types import Normalization
from tests.datamodules.test_extra import epoch_samples

GRAY = Normalization((0.3057,), (0.3762,))
CPU = torch.device("cpu")


def digits_teacher() -> nn.Module:
    return load_weights(resnet8(num_classes=10, in_channels=1), "lkd:digits_resnet8")


def inversion(network: nn.Module | None = None, **settings) -> DeepInversion:
    return DeepInversion(network or digits_teacher(), **{"number": 20, "steps": 2, "jitter": 1, **settings})


def test_total_variation_includes_all_neighbours() -> None:
    image = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        total = 0.0
        for y in range(4 - down):
            for x in range(5):
                if 0 <= x + right < 5:
                    total += float(((image[:, :, y, x] - image[:, :, y + down, x + right]) ** 2).sum())
        expected += total**0.5
    assert float(total_variation(image)) == pytest.approx(expected, rel=1e-12)
    assert float(total_variation(torch.ones(1, 1, 3, 3))) == 0


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, nn.BatchNorm1d])
def test_statistics_distance_uses_batch_statistics(layer) -> None:
    """The distance is 0 for the statistics that BatchNorm with momentum 1 computes, up to its bias correction."""
    shape = (6, 3, 4, 5) if layer is nn.BatchNorm2d else (6, 3, 20)
    batch = 2 + 3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = layer(3, momentum=1.0).double().train()
    norm(batch)
    norm.running_var *= 119 / 120
    assert float(statistics_distance(batch, norm)) == pytest.approx(0, abs=1e-12)
    norm.running_mean += torch.tensor([3.0, 0.0, 4.0])
    norm.running_var += torch.tensor([0.0, 6.0, 8.0])
    assert float(statistics_distance(batch, norm)) == pytest.approx(5 + 10, rel=1e-12)


def test_gradients_are_correct_and_finite_at_zero() -> None:
    image = torch.rand(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    norm = nn.BatchNorm2d(2).double().eval()
    assert torch.autograd.gradcheck(lambda x: total_variation(x) + statistics_distance(x, norm), [image])
    flat = torch.zeros(2, 2, 4, 4, requires_grad=True)
    norm = nn.BatchNorm2d(2).eval()
    norm.running_var.zero_()
    (total_variation(flat) + statistics_distance(flat, norm)).backward()
    assert torch.equal(flat.grad, torch.zeros_like(flat))


class RecordInputs(nn.Module):
    """A network that records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(4, 2)
        self.register_buffer("unused", torch.zeros(1))
        self.seen: list[torch.Tensor] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.seen.append(image.detach().clone())
        return self.head(self.norm(image).flatten(1))

    def __deepcopy__(self, memo: dict) -> RecordInputs:
        return self


def test_step_is_adam_on_the_sum_of_the_terms() -> None:
    torch.manual_seed(0)
    network, scale = RecordInputs().eval(), Normalization((0.5,), (0.25,))
    settings = {"statistics_weight": 3.0, "variation_weight": 2.0, "l2_weight": 0.5, "lr": 0.01, "jitter": 0}
    DeepInversion(network, number=4, steps=3, **settings).synthesize((1, 2, 2), 2, scale, CPU)
    first, second = network.seen[1:3]  # after the blank image
    assert first.abs().max() <= 2  # black and white
    image = first.clone().requires_grad_()
    loss = nn.functional.cross_entropy(network(image), torch.tensor([0, 1, 0, 1]))
    mean, variance = image.mean(), image.pow(2).mean() - image.mean() ** 2
    loss = loss + 3 * ((mean - 0).abs() + (variance - 1).abs()) + 0.5 * image.pow(2).sum().sqrt()
    (a, b), (c, d) = ((image[:, 0, y, 0], image[:, 0, y, 1]) for y in (0, 1))
    pairs = ((torch.cat((a, c)), torch.cat((b, d))), (torch.cat((a, b)), torch.cat((c, d))), (a, d), (b, c))
    loss = loss + 2 * sum((one - other).pow(2).sum().sqrt() for one, other in pairs)
    loss.backward()
    expected = (first - 0.01 * image.grad.sign()).clamp(-2, 2)  # Adam's first step
    assert torch.allclose(second, expected, atol=1e-5)


def test_images_match_their_targets() -> None:
    network = digits_teacher()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    right, distance = {}, {}
    for steps in (1, 150):
        image, target = inversion(network, number=50, steps=steps).synthesize((1, 8, 8), 10, GRAY, CPU)
        assert (image.dtype, image.shape) == (torch.uint8, (50, 1, 8, 8))
        assert torch.equal(target.bincount(), torch.full((10,), 5))
        given = (image / 255 - 0.3057) / 0.3762
        with torch.no_grad():
            right[steps] = int((network.eval()(given).argmax(1) == target).sum())
            distance[steps] = float(statistics_distance(network.conv1(given), network.bn1))
    assert right[1] < 25
    assert right[150] > 45
    assert distance[150] < distance[1] / 2
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_images_depend_only_on_the_seed() -> None:
    network, untouched = digits_teacher(), torch.get_rng_state()
    first, again, other = (inversion(network, seed=seed).synthesize((1, 8, 8), 10, GRAY, CPU)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), untouched)


def test_images_are_cached_and_rebuilt(tmp_path, monkeypatch, recwarn) -> None:
    made, synthesize = [], DeepInversion.synthesize
    monkeypatch.setattr(DeepInversion, "synthesize", lambda self, *rest: made.append(1) or synthesize(self, *rest))

    def images(settings: DeepInversion) -> tuple[torch.Tensor, ...]:
        return settings.images((1, 8, 8), 10, GRAY, CPU).tensors

    first = images(inversion())
    again = images(inversion())
    assert len(made) == 1
    assert all(map(torch.equal, first, again))
    (file,) = (tmp_path / "lkd_cache" / "inversion").iterdir()
    images(inversion(steps=3))
    images(inversion(normalization=Normalization((0.5,), (0.5,))))
    changed = digits_teacher()
    with torch.no_grad():
        changed.fc.bias[0] += 1
    images(inversion(changed))
    assert len(made) == 4
    assert not recwarn
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="is ignored and will be recreated: its checksum is wrong"):
        mended = images(inversion())
    assert len(made) == 5
    assert all(map(torch.equal, first, mended))
    images(inversion())
    assert len(made) == 5


def test_cache_that_cannot_be_written(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LKD_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="synthesized images cannot be cached"):
        assert len(inversion().images((1, 8, 8), 10, GRAY, CPU)) == 20


def test_training_uses_only_synthesized_images() -> None:
    extra = inversion(number=30)
    data = DigitsDataModule(label_size=0, drop_unlabelled=True, extra=extra, augment=[], batch_size=10)
    data.setup("fit")
    image, target = extra.images((1, 8, 8), 10, GRAY, CPU).tensors
    seen = epoch_samples(data)
    assert sorted(seen) == list(range(30))
    for index, (given, label) in seen.items():
        assert torch.allclose(given, (image[index] / 255 - 0.3057) / 0.3762, atol=1e-6)
        assert label == int(target[index]) == index % 10
    assert len(data.datasets["val"]) == 144


def test_evaluation_synthesizes_no_images(tmp_path, monkeypatch) -> None:
    data = DigitsDataModule(label_size=0, drop_unlabelled=True, extra=inversion())
    with monkeypatch.context() as patch:
        patch.setattr(DeepInversion, "images", lambda *_: pytest.fail("images were made"))
        data.setup("validate")
        data.setup("test")
        assert sum(len(batch.target) for batch in data.val_dataloader()) == 144
    data.setup("fit")
    assert data.num_samples == 20


@pytest.mark.parametrize(
    ("shape", "num_classes", "message"),
    [
        ((3, 8, 8), 10, r"does not accept images of shape \(3, 8, 8\): .*expected input"),
        ((1, 8, 8), 11, r"must return logits of shape \(batch, 11\), got \(1, 10\)"),
    ],
)
def test_network_for_other_data_is_rejected(shape, num_classes, message) -> None:
    with pytest.raises(ValueError, match=message):
        inversion().images(shape, num_classes, GRAY, CPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"number": 0}, "number must be at least 1, got 0"),
        ({"jitter": -1}, "jitter must be at least 0, got -1"),
        ({"l2_weight": -0.1}, "l2_weight must be at least 0, got -0.1"),
        ({"lr": 0.0}, "lr must be greater than 0, got 0.0"),
        ({"network": nn.Linear(2, 2)}, "Linear has none; use a teacher with BatchNorm"),
    ],
)
def test_invalid_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        inversion(**settings)
